"""Writes apple.json: what Apple's own tables say of the Metal API that flashmoe uses.

    pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --platform macosx_10_13_universal2 pyobjc-framework-Metal
    pip download --no-deps --only-binary=:all: --platform macosx_15_0_arm64 mlx-metal
    python tests/metal/api/extract.py pyobjc_framework_metal-*.whl mlx_metal-*.whl

Only facts are kept: selectors, type encodings without offsets, values of constants. Encodings are
those that Apple's compiler put into PyObjC's extension module, where it has the protocol; else they
are made from the signatures of metal-cpp in MLX's wheel.
"""

import json
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

HEADER = Path(__file__).parents[1] / "include" / "Metal" / "Metal.h"
NEWER = Path(__file__).parents[3] / "src" / "flashmoe_native" / "backend" / "metal" / "newer.h"
HERE = Path(__file__).parent


ARM64, SEGMENT_64 = 0x0100000C, 0x19


class Image:
    """The arm64 slice of a universal Mach-O binary, addressed as when loaded."""

    def __init__(self, data: bytes) -> None:
        (slices,) = struct.unpack_from(">I", data, 4)
        for i in range(slices):
            cpu, _, offset, size, _ = struct.unpack_from(">5I", data, 8 + 20 * i)
            if cpu == ARM64:
                data = data[offset : offset + size]
                break
        self.parts: list[tuple[int, bytes]] = []
        self.protocol_list = b""
        (commands,) = struct.unpack_from("<I", data, 16)
        at = 32
        for _ in range(commands):
            command, size = struct.unpack_from("<2I", data, at)
            sections = struct.unpack_from("<I", data, at + 64)[0] if command == SEGMENT_64 else 0
            for section in range(sections):
                entry = at + 72 + 80 * section
                address, length, offset = struct.unpack_from("<QQI", data, entry + 32)
                content = data[offset : offset + length]
                self.parts.append((address, content))
                if data[entry : entry + 16].rstrip(b"\0") == b"__objc_protolist":
                    self.protocol_list = content
            at += size

    def read(self, form: str, at: int) -> int:
        for start, content in self.parts:
            if start <= at < start + len(content):
                return int(struct.unpack_from("<" + form, content, at - start)[0])
        raise KeyError(hex(at))

    def text(self, at: int) -> str:
        for start, content in self.parts:
            if start <= at < start + len(content):
                return content[at - start : content.index(b"\0", at - start)].decode()
        raise KeyError(hex(at))

    def methods(self, at: int) -> Iterator[tuple[str, str]]:
        """(selector, encoding) of an Objective-C method list, relative or not."""
        if not at:
            return
        flags, count = self.read("I", at), self.read("I", at + 4)
        for i in range(count):
            if flags & 0x80000000:
                entry = at + 8 + 12 * i
                name = self.read("Q", entry + self.read("i", entry))
                encoding = entry + 4 + self.read("i", entry + 4)
            else:
                entry = at + 8 + 24 * i
                name, encoding = self.read("Q", entry), self.read("Q", entry + 8)
            yield self.text(name), self.text(encoding)

    def protocols(self) -> dict[str, dict[str, str]]:
        """Instance methods by protocol, those that it inherits included."""
        own: dict[str, dict[str, str]] = {}
        parents: dict[str, list[str]] = {}
        for (at,) in struct.iter_unpack("<Q", self.protocol_list):
            name, inherited = self.text(self.read("Q", at + 8)), self.read("Q", at + 16)
            parents[name] = [
                self.text(self.read("Q", self.read("Q", inherited + 8 + 8 * j) + 8))
                for j in range(self.read("Q", inherited) if inherited else 0)
            ]
            own[name] = {
                selector: re.sub(r"\d+", "", encoding)
                for offset in (24, 40)  # required, optional
                for selector, encoding in self.methods(self.read("Q", at + offset))
            }

        def whole(name: str) -> dict[str, str]:
            found: dict[str, str] = {}
            for parent in parents.get(name, []):
                found |= whole(parent)
            return found | own.get(name, {})

        return {name: whole(name) for name in own}


def encode(kind: str, signed: set[str]) -> str:
    """The encoding of a C++ type of metal-cpp; `signed` are its enums over NS::Integer."""
    kind = kind.strip()
    if kind.split("::")[-1] in signed:
        return "q"
    for pattern, encoding in (
        (r"void$", "v"),
        (r"const void ?\*", "r^v"),
        (r"void ?\*$", "^v"),
        (r"void ?\(\^", "@?"),
        (r"bool\b", "B"),
        (r"uint64_t\b", "Q"),
        (r"NS::Error ?\*\*", "^@"),
        (r"(const )?(NS|MTL)::\w+ ?\*", "@"),
        (r"(NS|MTL)::\w+", "Q"),  # NS::UInteger, and enums over it
    ):
        if re.match(pattern, kind):
            return encoding
    raise ValueError(kind)


def metal_cpp(headers: dict[str, str]) -> dict[tuple[str, str], str]:
    """Encodings by (class, selector)."""
    everything = "\n".join(headers.values())
    signed = set(re.findall(r"_MTL_ENUM\(\s*NS::Integer,\s*(\w+)\s*\)", everything))
    selectors = dict(re.findall(r'_DEF_SEL\((\w+),\s*"([^"]+)"', everything))
    method = re.compile(
        r"_MTL_INLINE ([^\n]+?) MTL::(\w+)::\w+\(([^\n]*)\)(?: const)?\s*\{\s*[^}]*?"
        r"_MTL_PRIVATE_SEL\((\w+)\)"
    )
    found = {}
    for result, owner, parameters, selector in method.findall(everything):
        kinds = re.split(r",(?![^()]*\))", parameters) if parameters else []
        # A parameter's name is its last word; a block's is in its middle.
        kinds = [k if "(^" in k else re.sub(r"\w+\s*$", "", k) for k in kinds]
        try:
            encoding = "@:".join(
                (encode(result, signed), "".join(encode(kind, signed) for kind in kinds))
            )
        except ValueError:
            continue  # a type that flashmoe does not use
        found["MTL" + owner, selectors[selector]] = encoding
    return found


def main(pyobjc: str, mlx: str) -> None:
    with zipfile.ZipFile(pyobjc) as wheel:
        library = next(n for n in wheel.namelist() if n.startswith("Metal/_Metal.cp"))
        protocols = Image(wheel.read(library)).protocols()
        constants = dict(re.findall(r"\$(\w+)@(\d+)", wheel.read("Metal/_metadata.py").decode()))
    with zipfile.ZipFile(mlx) as wheel:
        names = [n for n in wheel.namelist() if "metal_cpp/Metal/" in n and n.endswith(".hpp")]
        signatures = metal_cpp({n: wheel.read(n).decode() for n in names})

    header = HEADER.read_text() + NEWER.read_text()
    used = set(re.findall(r"\b(MTL\w+) = \d", header))
    kept: dict[str, dict[str, str]] = {}
    for name in re.findall(r"@(?:protocol|interface) (?:Newer)?(MTL\w+)", header):
        kept[name] = dict(protocols.get(name, {}))
        kept[name] |= {
            selector: encoding
            for (owner, selector), encoding in signatures.items()
            if owner == name and selector not in kept[name]
        }
    facts = {
        "from": sorted(Path(wheel).name for wheel in (pyobjc, mlx)),
        "compiled by Apple": sorted(set(kept) & set(protocols)),
        "constants": {name: int(constants[name]) for name in sorted(used)},
        "methods": {name: dict(sorted(methods.items())) for name, methods in kept.items()},
    }
    (HERE / "apple.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
