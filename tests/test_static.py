"""Level 0: who may import whom, recipes that validate, documentation that builds. Style and types: `make lint`."""

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "semiseg"
FILES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

ARROWS = {
    "__init__": {"api"},
    "__main__": {"cli"},
    "cli": {"api", "demo"},
    "demo": {"api"},
    "testing": {"api"},
    "api": {"experiment", "plan"},
    "experiment": {"config", "engine"},
    "plan": {"experiment"},
    "config": {"methods"},
    "methods": {"ops", "data", "networks"},
    "engine": {"ops", "data"},
    "ops": {"types"},
    "data": {"files", "progress"},
    "networks": {"files", "parallel"},
    "progress": {"parallel"},
    "files": {"types"},
    "parallel": {"watch"},
    "watch": {"types"},
    "types": set(),
}
"""Each layer and those right below it; whatever can be reached along the arrows may be imported."""


def reachable(layer: str) -> set[str]:
    return {layer}.union(*(reachable(below) for below in ARROWS[layer]))


def modules(node: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[list[str]]:
    """The full dotted names that an import statement in `package` brings in; names of a `from` included."""
    if isinstance(node, ast.Import):
        yield from (name.name.split(".") for name in node.names)
    else:
        base = package[: len(package) - node.level + 1] if node.level else []
        base = base + (node.module.split(".") if node.module else [])
        yield from ([*base, name.name] for name in node.names)


def layer_of(dotted: list[str]) -> str:
    """`semiseg.ops.mix` is of ops; `import semiseg` is of its `__init__`."""
    return dotted[1] if len(dotted) > 1 else "__init__"


def wrong_arrows(path: Path, package: Path) -> list[str]:
    parts = path.relative_to(package).with_suffix("").parts
    assert parts[0] in ARROWS, f"{path} is of no layer: give it a place in ARROWS"
    allowed = reachable(parts[0])
    imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
    found = [(n, m) for n in imports for m in modules(n, ["semiseg", *parts[:-1]]) if m[0] == "semiseg"]
    return [f"{path}:{n.lineno}: {parts[0]} -> {layer_of(m)}" for n, m in found if layer_of(m) not in allowed]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    assert wrong_arrows(path, PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ops/mix.py", "from semiseg.data.rows import Rows"),
        ("ops/mix.py", "import semiseg.parallel"),
        ("ops/mix.py", "from .. import parallel"),
        ("data/rows.py", "from ..ops.mix import mix"),
        ("data/rows.py", "def late():\n    from semiseg import networks"),
        ("engine/session.py", "from semiseg.methods.base import Method"),
        ("engine/session.py", "from semiseg import ops, networks"),
        ("networks/net.py", "import semiseg.ops.resize as resize"),
        ("config.py", "from . import plan"),
        ("api.py", "from semiseg import __version__"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert len(wrong_arrows(tmp_path / file, tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cli.py", "from semiseg import api\nfrom .types import InputError"),
        ("api.py", "import semiseg.config\nfrom .engine.session import Session\nfrom .plan import plan"),
        ("plan.py", "from semiseg.data import check"),
        (
            "methods/fixmatch.py",
            "import torch\nfrom . import base\nfrom ..ops import mix\nfrom semiseg import types",
        ),
        ("__init__.py", "from .api import train\nfrom semiseg.types import InputError"),
    ],
)
def test_a_right_arrow_passes(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert wrong_arrows(tmp_path / file, tmp_path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


WAITS = {"item", "cpu", "tolist", "nonzero", "bincount"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.name)
def test_ops_never_wait_for_the_device(path: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert [f"{path}:{node.lineno}: .{node.attr}" for node in nodes if node.attr in WAITS] == []


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipe_validates(path: Path) -> None:
    # Imported here, so that a config that does not import fails these tests and hides no other.
    from semiseg.config import Recipe, load_recipe

    assert isinstance(load_recipe(path), Recipe)


def test_the_page_of_options_is_what_the_classes_say() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = runpy.run_path(str(docs / "options.py"))["page"]()
    assert (docs / "options.md").read_text(encoding="utf-8") == page, "run python docs/options.py"


def test_docs_build(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
