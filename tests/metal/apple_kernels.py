"""Kernels that Apple's Metal compiler made, for the executor.

The file of kernels in MLX's wheel for macOS holds LLVM bitcode. LLVM's own tools make code for this
machine of it; what it calls (air.*) is in tests/metal/apple/air.cpp.
"""

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from shader_executor import ROOT, SOURCES

_AIR = ROOT / "tests" / "metal" / "apple" / "air.cpp"
TOOLS = ("llvm-dis-19", "clang++-19")


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if not shutil.which(tool)]


def bitcode(library: bytes, kernel: str) -> bytes:
    """A kernel's bitcode in a .metallib: a list of functions, each with tags of four letters."""
    at, section = struct.unpack_from("<Q", library, 24)[0], struct.unpack_from("<Q", library, 72)[0]
    (count,) = struct.unpack_from("<I", library, at)
    at += 4
    for _ in range(count):
        (size,) = struct.unpack_from("<I", library, at)
        tags, tag = {}, at + 4
        while (name := library[tag : tag + 4]) != b"ENDT":
            (length,) = struct.unpack_from("<H", library, tag + 4)
            tags[name] = library[tag + 6 : tag + 6 + length]
            tag += 6 + length
        if tags[b"NAME"].rstrip(b"\0").decode() == kernel:
            begin = section + struct.unpack("<3Q", tags[b"OFFT"])[2]
            return library[begin : begin + struct.unpack("<Q", tags[b"MDSZ"])[0]]
        at += size
    raise KeyError(kernel)


def _argument(node: str, at: int) -> tuple[list[str], str]:
    """Code that makes the `at`-th argument, from what the compiler says of it; "type value"."""

    def number(what: str, default: int) -> int:
        found = re.search(rf'!"air\.{what}", i32 (\d+)', node)
        return int(found[1]) if found else default

    if '!"air.buffer"' in node:
        pointer = f"ptr addrspace({number('address_space', 1)})"
        if "air.arg_unused" in node:
            return [], f"{pointer} null"
        sizes = number("buffer_size", 0), number("arg_type_align_size", 1)
        call = f"call ptr @bound(i32 {number('location_index', 0)}, i32 {sizes[0]}, i32 {sizes[1]})"
        code = [f"%p{at} = {call}", f"%a{at} = addrspacecast ptr %p{at} to {pointer}"]
        return code, f"{pointer} %a{at}"
    place = re.search(r'i32 \d+, !"air\.(\w+)"', node)[1]
    if '!"uint3"' not in node:
        return [f"%a{at} = call i32 @{place}(i32 0)"], f"i32 %a{at}"
    code, vector = [], "poison"
    for axis in range(3):
        code.append(f"%s{at}.{axis} = call i32 @{place}(i32 {axis})")
        element = f"i32 %s{at}.{axis}, i32 {axis}"
        code.append(f"%v{at}.{axis} = insertelement <3 x i32> {vector}, {element}")
        vector = f"%v{at}.{axis}"
    return code, f"<3 x i32> {vector}"


def translate(text: str, kernel: str) -> str:
    """LLVM assembly for any machine, with a function entry_... that runs a kernel."""
    text = re.sub(r"^target .*\n", "", text, flags=re.M)
    # Threadgroup memory in a section of its own, so that air.cpp finds it.
    text = re.sub(
        r"= internal (.*addrspace\(3\) global .*) undef,",
        r'= internal \1 zeroinitializer, section "threadgroup",',
        text,
    )
    nodes = dict(re.findall(r"^!(\d+) = !\{(.*)\}$", text, re.M))
    described = re.search(rf"!\{{ptr @{kernel}, !\d+, !(\d+)\}}", text)[1]
    code, values = ["call void @enter()"], []
    for at, node in enumerate(re.findall(r"!(\d+)", nodes[described])):
        lines, value = _argument(nodes[node], at)
        code += lines
        values.append(value)
    code += [f"call void @{kernel}({', '.join(values)})", "ret void"]
    places = sorted(set(re.findall(r"call i32 @(\w+)", "\n".join(code))))
    declared = ["declare void @enter()", "declare ptr @bound(i32, i32, i32)"]
    declared += [f"declare i32 @{place}(i32)" for place in places]
    entry = [f"define void @entry_{kernel}() {{", *code, "}"]
    return "\n".join([text, *declared, *entry, ""])


def build(directory: Path, library: bytes, kernels: Sequence[str]) -> Path:
    """A library for the executor with some of the kernels of a .metallib."""
    paths = []
    for kernel in kernels:
        packed, path = directory / f"{kernel}.bc", directory / f"{kernel}.ll"
        packed.write_bytes(bitcode(library, kernel))
        subprocess.run([TOOLS[0], packed, "-o", path], check=True)
        path.write_text(translate(path.read_text(), kernel))
        paths.append(path)
    made = directory / "libapple.so"
    listed = "-DAPPLE_KERNELS(X)=" + " ".join(f"X({kernel})" for kernel in kernels)
    command = [TOOLS[1], "-std=c++17", "-O1", "-fPIC", "-shared", "-w", listed, "-o", made, _AIR]
    executor = [SOURCES / "executor.cpp", SOURCES / "fibre.cpp"]
    subprocess.run([*command, *executor, "-x", "ir", *paths], check=True)
    return made
