"""The snippets of docs/any_vlm.md and of its notebook run, with torch alone, and print what is stored there."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import baselines
from shirg import Selector
from tests.test_contract import ALL

ROOT = Path(__file__).resolve().parent.parent
PAGE, NOTEBOOK = ROOT / "docs/any_vlm.md", ROOT / "examples/3_any_vlm.ipynb"
RUN = """
import importlib.abc, io, json, sys
from contextlib import redirect_stdout

blocked, snippets = json.load(sys.stdin)

class TorchAlone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not torch", name=name)

sys.meta_path.insert(0, TorchAlone())
printed = []
for snippet in snippets:
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def snippets() -> list[tuple[str, str]]:
    """Each Python block of the page, and the text block behind it: what it prints."""
    return re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def cells() -> list[str]:
    """Each code cell of the notebook."""
    found = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) + "\n" for cell in found]


def below_torch() -> set[str]:
    """Distributions that torch needs, and numpy."""
    known, todo = {"numpy"}, ["torch"]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in known:
            continue
        known.add(name)
        try:
            todo += [Requirement(r).name for r in requires(name) or [] if "extra ==" not in r]
        except PackageNotFoundError:
            continue  # a requirement of another platform
    return known


def all_but_torch() -> Iterator[str]:
    allowed = below_torch()
    for module, owners in packages_distributions().items():
        is_ours = module in ("shirg", "baselines")
        if not is_ours and not {owner.lower().replace("_", "-") for owner in owners} & allowed:
            yield module
    yield from ("lavida_adapter", "experiments", "tests")


def run(sources: list[str], blocked: list[str]) -> Any:
    """What each snippet prints, in a process that cannot import the blocked modules."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([blocked, sources]), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def needs_transformers(source: str) -> bool:
    return "from transformers import" in source


def test_snippets_run_with_torch_alone() -> None:
    blocked = list(all_but_torch())
    assert {"transformers", "hydra", "lightning", "peft", "PIL", "pandas", "lavida_adapter"} <= set(blocked)
    alone = [pair for pair in snippets() if not needs_transformers(pair[0])]
    assert len(alone) == 3
    assert run([source for source, _ in alone], blocked) == [printed for _, printed in alone]


def test_nothing_else_can_be_imported_there() -> None:
    with pytest.raises(AssertionError, match="transformers is not torch"):
        run(["import transformers"], list(all_but_torch()))


def test_taps_are_recorded_in_a_tower_of_transformers() -> None:
    with_tower = [pair for pair in snippets() if needs_transformers(pair[0])]
    assert len(with_tower) == 1
    assert run([source for source, _ in with_tower], []) == [printed for _, printed in with_tower]


def test_the_notebook_has_the_snippets_of_the_page() -> None:
    assert cells() == [source for source, _ in snippets()]


def test_snippets_are_short() -> None:
    for source, _ in snippets():
        assert len(source.splitlines()) <= 15, source


def test_each_selector_has_a_row_that_says_what_it_needs() -> None:
    section = PAGE.read_text().partition("## What each selector needs")[2].partition("## ")[0]
    rows: dict[str, list[str]] = {}
    for line in section.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", columns[0]) if len(columns) == 5 else ():
            rows[name] = columns
    cases = {case.build.__name__: case.build(**case.options) for case in reversed(ALL.values())}
    selectors: dict[str, Selector] = {name: cases[name] for name in baselines.__all__}
    for name, selector in selectors.items():
        _, attention, keys, relevance, other = rows[name]
        whats = {tap.partition("@")[0] for tap in selector.needs}
        assert (attention == "yes") == ("attention" in whats), name
        assert (keys == "yes") == ("keys" in whats), name
        assert (relevance == "yes") == selector.uses_relevance, name
        assert all(f"`{tap}`" in other for tap in selector.needs if tap.partition("@")[0] not in ("attention", "keys"))
        assert (selector.stage == "post") == ("projected" in other), name
