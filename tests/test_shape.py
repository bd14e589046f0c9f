"""The shape of the source, read from its syntax trees: who may import whom, what the three engines
have in common, and what lies where. None of it is seen by running the program once.
"""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The core decides and does nothing: whatever waits, reads a clock or touches a descriptor is an engine's.
INPUT_AND_OUTPUT = {
    "asyncio",
    "concurrent",
    "multiprocessing",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "twisted",
}

# In the order of a session's life; DESIGN: "lay the three files next to each other".
VOCABULARY = [
    "run",
    "stop",
    "post",
    "_accept",
    "_dial",
    "_perform",
    "_read_preface",
    "_pump",
    "_deliver",
    "_half_close",
    "_expire",
    "_close",
    "_drain",
    "_answer",
    "_send_on",
    "_return",
    "_release",
    "_reply",
]


def modules(*packages: str) -> list[object]:
    """The modules below these folders, as parameters called by their path."""
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """The dotted names of all that a module imports, at its top or anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, where all others are absolute"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded_by(*imported: str) -> set[str]:
    """The top-level names of all modules that are loaded once these are imported, in a new process."""
    script = f"import sys, {', '.join(imported)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("path", modules("services/core"))
def test_the_core_imports_no_input_or_output_and_nothing_of_the_daemon(path: Path) -> None:
    found = set(imports(path))
    assert not {name.partition(".")[0] for name in found} & INPUT_AND_OUTPUT
    ours = {name for name in found if name.startswith("services")}
    assert all(name.startswith(("services.core.", "services.vocabulary")) for name in ours), ours


@pytest.mark.parametrize("path", modules("services"))
def test_services_do_not_import_comparisons(path: Path) -> None:
    assert not [name for name in imports(path) if name.partition(".")[0] == "comparisons"]


@pytest.mark.parametrize("path", modules("services"))
def test_services_name_comparisons_only_in_the_command(path: Path) -> None:
    named = [
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "comparisons." in node.value
    ]
    assert not named or path == ROOT / "services/cli.py"


@pytest.mark.parametrize("path", modules("services", "comparisons"))
def test_what_is_imported_is_declared(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"]
    if path.is_relative_to(ROOT / "comparisons"):
        extras = project["optional-dependencies"]
        declared = declared + extras["compare"] + extras["spark"]
    names = {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in declared}
    distributions = packages_distributions()
    for name in imports(path):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {"services", "comparisons"}:
            continue
        provided_by = {normal(distribution) for distribution in distributions[top]}
        assert provided_by & names, f"{top} comes with {provided_by}, which pyproject.toml does not name"


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("engine", ["blocking", "nonblocking", "twisted"])
def test_an_engine_is_one_class_with_the_common_vocabulary_in_its_order(engine: str) -> None:
    body = tree(ROOT / "services/engines" / f"{engine}.py").body
    [found] = [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Engine"]
    methods = [node.name for node in found.body if isinstance(node, ast.FunctionDef)]
    assert [name for name in methods if name in VOCABULARY] == VOCABULARY


@pytest.mark.parametrize("path", modules("services", "comparisons", "tests"))
def test_a_module_opens_with_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


def test_the_top_level_holds_only_what_the_layout_names() -> None:
    fixed = {"services", "comparisons", "tests", "deploy", "pyproject.toml", "README.md", "LICENSE"}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    found = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and not any(fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert found == fixed


def test_the_command_loads_no_engine_and_no_comparison() -> None:
    assert not loaded_by("services.cli") & {"comparisons", "duckdb", "plotly", "rich", "twisted"}


@pytest.mark.parametrize("engine", ["blocking", "nonblocking"])
def test_an_engine_without_twisted_does_not_load_it(engine: str) -> None:
    loaded = loaded_by("services.daemon", f"services.engines.{engine}")
    assert not loaded & {"comparisons", "rich", "twisted", "zope"}
