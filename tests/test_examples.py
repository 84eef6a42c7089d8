"""What the examples and docs show runs, on a small random model in place of the demo."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from programs import environment

import flashmoe
from flashmoe.cli.main import app
from flashmoe.cli.report import size
from flashmoe.cli.report_info import rate
from flashmoe.measure.fit import Target, fit_family

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
OF_OTHERS = ("requires a different", "externally-managed", "No CMAKE", "Could NOT find Python")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def _run(directory: Path, code: str) -> str:
    """Output of a program for which "demo" is the model in `directory`."""
    head = (
        "import sys; from pathlib import Path; import flashmoe.checkpoint.find\n"
        f"flashmoe.checkpoint.find.demo_directory = lambda: Path({str(directory)!r})\n"
        "sys.argv = ['example']\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs(endless: Path, example: Path) -> None:
    assert _run(endless, example.read_text()).strip()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, monkeypatch) -> None:
    for needed in ("ipykernel", "matplotlib", "llguidance"):
        pytest.importorskip(needed)
    client = pytest.importorskip("nbclient", reason="pip install '.[dev]' brings nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    book = nbformat.read(notebook, as_version=4)
    client.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == sum("plt.show()" in cell.source for cell in book.cells)


def test_every_argument_and_error_is_on_the_python_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    for function in (flashmoe.Model.__init__, flashmoe.Model.generate, flashmoe.Model.chat):
        parameters = inspect.signature(function).parameters.keys()
        assert parameters - {"self", "source", "prompt", "messages"} <= named
    errors = {name for name in flashmoe.__all__ if name.endswith("Error")}
    assert errors <= named


def test_the_code_of_the_python_page_runs(endless: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = "\n".join(block for block in blocks if not block.startswith("Model("))
    code = code.replace('"mlx-community/Qwen3.5-397B-A17B-4bit"', '"demo", context=600')
    code = code.replace(
        "for question in", "long_document, questions = 'the fox ' * 9, ['a', 'b']\nfor question in"
    )
    code = code.replace(
        "shared = model.new_state()", "long_document = 'the fox ' * 9\nshared = model.new_state()"
    )
    where = "import tempfile, os; os.chdir(tempfile.mkdtemp())\n"
    assert _run(endless, where + code).strip()


def _tested(language: str) -> list[str]:
    """The README's blocks in a language that are marked as tested."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", readme, re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.parametrize("command", "".join(_tested("sh")).splitlines())
def test_a_command_of_the_readme_runs(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "flashmoe"
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_code_of_the_readme_runs(endless: Path) -> None:
    for code in _tested("python"):
        assert _run(endless, code).strip()


def test_what_the_readme_predicts_is_what_info_predicts() -> None:
    readme = (ROOT / "README.md").read_text()
    table = re.search("<!-- predictions -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert table is not None
    head, _, disk, *machines = (
        [cell.strip() for cell in row.strip("| ").split("|")]
        for row in table[1].strip().splitlines()
    )
    for row in machines:
        found = {model.name: (model, fit) for model, fit in fit_family(Target(machine=row[0]))}
        for k, name in enumerate(head[1:], 1):
            model, fit = next(f for full, f in found.items() if f"/{name}-" in full)
            assert disk[k] == size(model.disk)
            assert row[k] == rate(fit.on_text.tokens_per_second), (row[0], name)


def test_errors_that_the_readme_explains_are_raised() -> None:
    readme = (ROOT / "README.md").read_text()
    table = re.search("<!-- errors -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert table is not None
    sources = "".join(p.read_text() for p in sorted((ROOT / "src" / "flashmoe").rglob("*.py")))
    messages = re.sub(r"""["']\n *f?["']""", "", sources)  # literals that stand behind one another
    for quoted in re.findall(r"^\| `(.*?)` \|", table[1], re.MULTILINE):
        if not quoted.startswith(OF_OTHERS):
            for part in quoted.split("..."):
                assert part.strip() in messages, quoted


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    commands = {command.name for command in app.registered_commands}
    named = re.findall(r"(?:^ {4}|^|`)flashmoe ([a-z]+)\b", page.read_text(), re.MULTILINE)
    assert set(named) <= commands
