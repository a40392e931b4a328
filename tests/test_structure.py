"""The structure of the packages: no import circle, no name twice, files of a readable size (CONTRIBUTING.md)."""

import ast
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_house import PACKAGES, ROOT

SHORTEST = 60
PLUG_IN_FOLDERS = (
    "baselines",
    "lavida_adapter/cache_compression",
    "experiments/bench",
    "experiments/data/benchmarks",
    "experiments/data/synthetic",
    "experiments/metrics",
    "shirg/kernels",
)
SHORT_BY_NATURE = ("__init__.py", "__main__.py", "errors.py")


@cache
def files() -> tuple[Path, ...]:
    return tuple(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of this project that a file imports anywhere, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (submodules & modules) or {str(node.module)}
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first node again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_an_import_anywhere_counts(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import a.b\nfrom a import c, name\nif TYPE_CHECKING:\n    from a.d import X\ndef f():\n    from e import g\n"
    )
    assert imports(file, {"a", "a.b", "a.c", "a.d", "e", "f"}) == {"a.b", "a.c", "a.d", "e"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_has_an_import_circle(package: str) -> None:
    """A package's own face, `__init__`, only re-exports, so it is no part of the graph."""
    modules = {module_of(path): path for path in files() if path.name != "__init__.py"}
    graph = {name: imports(path, set(modules)) - {name} for name, path in modules.items() if name.startswith(package)}
    assert len(graph) > 5
    assert circle(graph) == []


def test_no_class_name_twice() -> None:
    names = Counter(
        node.name
        for path in files()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_no_module_name_twice() -> None:
    names = Counter(path.stem for path in files() if path.name not in ("__init__.py", "__main__.py"))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_files_have_one_idea_each() -> None:
    """No file is a fragment but plug-ins, errors and commands; test_house.py has the upper limit."""
    sizes = {path: len(path.read_text().splitlines()) for path in files()}
    plug_ins = tuple(ROOT / folder for folder in PLUG_IN_FOLDERS)
    fragments = {
        str(path.relative_to(ROOT)): size
        for path, size in sizes.items()
        if size < SHORTEST and path.name not in SHORT_BY_NATURE and not any(map(path.is_relative_to, plug_ins))
    }
    assert fragments == {}
