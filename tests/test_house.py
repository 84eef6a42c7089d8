"""The rooms of the package: what may import what."""

import ast
from collections.abc import Iterator
from pathlib import Path

import flashmoe

ROOT = Path(flashmoe.__file__).parent

# From the ground up. A room imports from its own floor or from below; six are enough.
FLOORS = (
    {"errors", "_native"},
    {"machine", "hub"},
    {"checkpoint"},
    {"pack", "generate"},
    {"measure", "serve"},
    {"cli"},
)


def _modules() -> dict[str, Path]:
    """Every module by its name less "flashmoe.", a package by its own name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                n if n.removeprefix("flashmoe.") in modules else n.rpartition(".")[0] for n in names
            ]
        for name in names:
            if name.startswith("flashmoe."):
                yield name.removeprefix("flashmoe.")


def test_no_import_runs_upward() -> None:
    modules = _modules()
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    upward = []
    for name, path in modules.items():
        room = name.split(".")[0]
        if name in ("", "__main__"):  # the package's own face is above all
            continue
        assert room in floor, f"{name} is in no room of FLOORS"
        for imported in _imports(path, modules):
            other = imported.split(".")[0]
            if floor[other] > floor[room] or (floor[other] == floor[room] and other != room):
                upward.append(f"{name} imports {imported}")
    assert not upward
    assert len(FLOORS) <= 6


def test_no_modules_import_one_another_in_a_circle() -> None:
    modules = _modules()
    graph = {name: set(_imports(path, modules)) for name, path in modules.items() if name}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_a_library_is_touched_in_one_place() -> None:
    """What these raise is turned into flashmoe's errors there."""
    modules = _modules()
    libraries = ("tokenizers", "jinja2", "huggingface_hub", "starlette", "uvicorn")
    users: dict[str, set[str]] = {library: set() for library in libraries}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for library in {n.split(".")[0] for n in names} & users.keys():
                users[library].add(name)
    # `Model.tokenizer` is annotated with the library's own type.
    assert users["tokenizers"] <= {"checkpoint.tokenizer", "generate.model"}
    assert users["jinja2"] == {"checkpoint.jinja"}
    assert users["huggingface_hub"] == {"hub"}
    assert {name.split(".")[0] for name in users["starlette"] | users["uvicorn"]} == {"serve"}
