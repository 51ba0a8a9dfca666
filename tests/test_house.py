"""The rules of the house that a machine can check: who imports whom, no pickle, file sizes, a light command line."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("diffusion", "pipelines", "train")
FORBIDDEN = {"diffusion": {"pipelines", "train"}, "pipelines": {"train"}, "train": set()}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERY_SOURCE = SOURCES + sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
    "eval",
    "exec",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def imports_of_the_module(tree: ast.Module) -> set[str]:
    """Top-level packages imported when the file itself is imported (not inside functions, not only for types)."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.split(".")[0] for name in imports(node)}
        pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_keep_the_direction_of_knowledge(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert not tops & (FORBIDDEN[package] | {"tests", "benchmarks"})


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_one_role(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", EVERY_SOURCE, ids=name_of)
def test_nothing_can_run_code_from_a_file(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(tree)} & UNSAFE_MODULES
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & UNSAFE_CALLS


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_slow_libraries_are_imported_where_they_are_used(path: Path) -> None:
    """transformers and diffusers take several times as long to import as torch."""
    assert not {"transformers", "diffusers"} & imports_of_the_module(ast.parse(path.read_text()))


# Each costs a start of the command more than a picture does.
SLOW = {"transformers", "diffusers", "accelerate", "torch._dynamo", "sympy", "huggingface_hub"}
HELP = "import sys; from pipelines.__main__ import main; sys.argv = ['gaze', {args}]; main()"


@pytest.mark.parametrize(
    "code",
    [
        "import pipelines",
        HELP.format(args="'--help'"),
        HELP.format(args="'generate', '--help'"),
        HELP.format(args="'attend', '--help'"),
        HELP.format(args="'convert', '--help'"),
        HELP.format(args="'evaluate', 'clip', '--help'"),
        HELP.format(args="'inspect', '--help'"),
        HELP.format(args="'--version'"),
    ],
)
def test_the_light_parts_do_not_import_torch(code: str) -> None:
    script = f"""
import sys
try:
    exec({code!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "numpy", "PIL", "diffusers", "transformers", "rich"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_an_installed_wheel_has_all_recipes() -> None:
    patterns = re.findall(r'"(configs/[^"]*[*][^"]*)"', (ROOT / "pyproject.toml").read_text())
    packed = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert {*(ROOT / "configs").rglob("*.yaml")} <= packed


def test_judges_need_no_command_line() -> None:
    """A run that is judged while it trains imports them."""
    code = "import sys, pipelines.judges.frame; print('typer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_a_picture_is_made_without_slow_libraries(tmp_path: Path) -> None:
    from tests.small_pipeline import small_pipeline

    small_pipeline().save_pretrained(tmp_path / "model")
    script = """
import sys
from pipelines.__main__ import app
sys.argv = ["gaze", "generate", "a red cat", "--model", "model", "--steps", "2", "-o", "cat.png"]
app(standalone_mode=False)
print("slow:", sorted(SLOW & set(sys.modules)))
""".replace("SLOW", repr(SLOW))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "slow: []"
    assert (tmp_path / "cat.png").is_file()
