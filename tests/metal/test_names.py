"""No name of metal/ is one of Apple's.

Every kernel says `using namespace metal`, so that a global name which Apple's library declares too
is ambiguous wherever it is used: one such name keeps all kernels from compiling on every Mac, and
the headers of tests/metal, which declare only what the kernels use, cannot show it.

FLASHMOE_METAL_HEADERS, where it is set, names the folder of Apple's own headers (metal_stdlib lies
in it), whose names are then compared too. `xcrun -sdk macosx metal -print-resource-dir` tells where
Xcode keeps them: in include/metal below.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from shader_executor import ROOT, SHADERS

cindex = pytest.importorskip("clang.cindex", reason="needs libclang")

NAMES = ROOT / "tests" / "metal" / "names"
SHIM = ROOT / "tests" / "metal" / "typecheck"
OPENCL = ["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", "spir64"]
OPENCL += ["-Wno-everything", "-ferror-limit=0"]


def words(name: str) -> frozenset[str]:
    """The lines of a file of names, comments left out."""
    lines = (NAMES / name).read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


APPLE, RESERVED = words("apple.txt"), words("reserved.txt")


@dataclass(frozen=True)
class Name:
    name: str
    where: str  # file:line
    is_global: bool  # `using namespace` finds it
    is_macro: bool


def declared(text: str, folder: Path, options: list[str], *, bodies: bool = True) -> Iterator[Name]:
    """Every name that a source text declares in files of `folder`, with or without those in bodies
    of functions.
    """
    kinds = cindex.CursorKind
    unit = cindex.Index.create().parse(
        "names.metal",
        unsaved_files=[("names.metal", text)],
        args=[*OPENCL, *options],
        options=cindex.TranslationUnit.PARSE_DETAILED_PROCESSING_RECORD
        | (0 if bodies else cindex.TranslationUnit.PARSE_SKIP_FUNCTION_BODIES),
    )
    named = (kinds.MACRO_DEFINITION, kinds.ENUM_CONSTANT_DECL, kinds.FIELD_DECL, kinds.PARM_DECL)

    def visit(cursor: "cindex.Cursor", is_global: bool) -> Iterator[Name]:
        for child in cursor.get_children():
            place = child.location
            if place.file is None or folder not in Path(str(place.file)).resolve().parents:
                continue
            macro = child.kind == kinds.MACRO_DEFINITION
            if child.spelling.isidentifier() and (
                child.kind in named or child.kind.is_declaration()
            ):
                where = f"{Path(str(place.file)).name}:{place.line}"
                yield Name(child.spelling, where, is_global or macro, macro)
            # The names in these are as global as their own.
            transparent = child.kind in (kinds.NAMESPACE, kinds.LINKAGE_SPEC) or (
                child.kind == kinds.ENUM_DECL and not child.is_scoped_enum()
            )
            yield from visit(child, is_global and transparent)

    yield from visit(unit.cursor, True)


def ours(shaders: Path) -> set[Name]:
    """The names of a copy of metal/."""
    # One text, as the host gives it to Metal.
    text = "".join(f'#include "{path.name}"\n' for path in sorted(shaders.glob("*.metal")))
    options = ["-D__METAL_VERSION__=300", f"-I{SHIM}", f"-I{shaders}"]
    return set(declared(text, shaders.resolve(), options))


def collisions(shaders: Path) -> list[str]:
    """What Apple's library or its language has already, "file:line: name"."""
    return sorted(
        f"{n.where}: {n.name}"
        for n in ours(shaders)
        if n.name in RESERVED or (n.is_global and n.name in APPLE)
    )


def test_no_name_is_apples() -> None:
    found = ours(SHADERS)
    # (every kind of name is seen)
    for name in ("rms_norm", "Stored", "kNormThreads", "INLINE", "sigmoid", "bits_constant"):
        assert any(n.name == name and n.is_global for n in found), name
    for name in ("thread_index", "squares", "rope_theta", "weight"):
        assert not any(n.name == name and n.is_global for n in found), name
    assert any(n.name == "squares" for n in found)
    assert collisions(SHADERS) == []


# (what kind of name, file, text, text with a name of Apple's). Those marked * were not in the list
# before it was completed from the specification and from translators' lists.
PLANTED = [
    ("function", "tiles.h", "INLINE void decode16(", "inline void component(Format) {}\n"),
    ("function *", "common.h", "INLINE float sigmoid(", "inline float simd_product(float) {}\n"),
    ("function *", "matvec.h", "INLINE void stage(", "inline float divide(float) {}\n"),
    ("function", "route.metal", "KERNEL(route, ", "inline float saturate(float) {}\n"),
    ("type *", "tiles.h", "struct TileInputs", "struct ray {};\n"),
    ("type", "products.h", "struct Product ", "struct extents {};\n"),
    ("enumerator *", "tiles.h", "enum TilePitch", "enum : uint { memory_order_release };\n"),
    ("enumerator", "delta.metal", "// log(1 + y)", "enum : uint { mem_none };\n"),
    ("macro *", "common.h", "FUNCTION_CONSTANT(bits_constant", "#define METAL_FUNC inline\n"),
    ("macro *", "arguments.h", "namespace shaders {", "#define M_PI_F 3\n"),
    ("local variable *", "norm.metal", "  float squares = 0;", "  float ray_data = 0;\n"),
    ("variable", "embed.metal", "KERNEL(embed, ", "constant uint dynamic_extent = 1;\n"),
]  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: f"{p[0]}: {p[3].strip()}")
def test_a_name_of_apples_is_rejected(planted: tuple[str, str, str, str], tmp_path: Path) -> None:
    _, file, before, line = planted
    for path in SHADERS.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, line + before, 1))
    found = collisions(tmp_path)
    assert len(found) == 1
    assert found[0].split(": ")[1] in line
    assert found[0].startswith(f"{file}:")


def test_no_name_is_in_apples_own_headers() -> None:
    folder = os.environ.get("FLASHMOE_METAL_HEADERS")
    if not folder:
        pytest.skip(
            "FLASHMOE_METAL_HEADERS names no folder of Apple's Metal headers (a Mac's Xcode)"
        )
    theirs = apples(Path(folder).resolve())
    for name in ("simd_shuffle", "component", "float4", "mem_flags"):
        assert name in theirs, f"{folder}: no {name}: not Apple's headers, or not understood"
    assert [f"{n.where}: {n.name}" for n in ours(SHADERS) if n.is_global and n.name in theirs] == []


def apples(folder: Path) -> set[str]:
    """Macros and global names of Apple's headers, those of namespace metal among them. Bodies of
    functions call builtins that only Apple's compiler has.
    """
    options = ["-D__METAL_VERSION__=320", "-D__METAL__", f"-I{folder}"]
    names = declared("#include <metal_stdlib>\n", folder, options, bodies=False)
    return {n.name for n in names if n.is_global}
