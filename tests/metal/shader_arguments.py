"""metal/arguments.h for Python: its enumerators as ints, its structs as ctypes structures.

K["kNormWeight"], S["NormArguments"](width=96, eps=1e-6)
"""

import ctypes
import re
from pathlib import Path

_HEADER = Path(__file__).parents[2] / "metal" / "arguments.h"
_SCALARS = {
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "Location": ctypes.c_uint64,
    "float": ctypes.c_float,
}


def _parse(text: str) -> tuple[dict[str, int], dict[str, type[ctypes.Structure]]]:
    text = re.sub(r"//[^\n]*", "", text)
    constants: dict[str, int] = {}
    structs: dict[str, type[ctypes.Structure]] = {}
    for keyword, name, body in re.findall(r"(enum|struct) (\w+)[^{;]*\{(.*?)\}", text, re.DOTALL):
        if keyword == "enum":
            for item in filter(None, (part.strip() for part in body.split(","))):
                key, value = item.split("=")
                constants[key.strip()] = int(value)
            continue
        fields: list[tuple[str, type]] = []
        for kind, names in re.findall(r"(\w+) ([^;]+);", body):
            for item in names.split(","):
                field, extent = re.fullmatch(r"\s*(\w+)(?:\[(.+)\])?\s*", item, re.DOTALL).groups()
                element = _SCALARS.get(kind) or structs[kind]
                length = eval(extent, {}, constants) if extent else 0  # (an integer expression)
                fields.append((field, element * length if extent else element))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return constants, structs


K, S = _parse(_HEADER.read_text())


def matvec_quads(rows: int) -> int:
    """As in arguments.h."""
    return 2 if rows > 8192 else 1


def matvec_block_rows(quads: int) -> int:
    """As in arguments.h."""
    return 4 * quads * K["kMatvecSimdgroups"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
