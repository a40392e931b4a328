"""The six steps of CONTRIBUTING.md, followed to the letter: its class, its YAML and its line make a selector."""

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

import baselines
from tests import test_contract as contract
from tests.cases import Case
from tests.experiments.conftest import ROOT, result_of
from tests.features import GRIDS, PADDED

Eval = Callable[..., Path]


def block(language: str, nth: int = 0) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    return dedent(found[nth])


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The toy selector as a module of `baselines`, and its line of the contract."""
    (tmp_path / "contrast.py").write_text(block("python"))
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    module = importlib.import_module("baselines.contrast")
    line = eval(f"{{{block('python', 1)}}}", {"Case": Case, "Contrast": module.Contrast})
    return line["contrast"]


def test_the_toy_selector_holds_the_contract(case: Case) -> None:
    selector = case.build(**case.options)
    for grid in (*GRIDS, PADDED):
        contract.test_a_selection_is_well_formed(selector, grid)
    for grid, budget in (((2, 2), 60), ((2, 2), "matched"), (PADDED, 50), (PADDED, "matched")):
        contract.test_budgets_are_exact(case, grid, budget)
    contract.test_every_option_changes_something_or_is_refused(case)
    contract.test_repeats_bit_for_bit(case, selector)
    contract.test_a_picture_does_not_depend_on_its_batch_mates(selector, (2, 2))
    contract.test_gradient_reaches_kept_tokens_alone(selector)
    contract.test_scale_changes_no_choice(selector)


def test_the_toy_selector_is_evaluated(case: Case, eval_here: Eval, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "selector").mkdir(parents=True)
    (conf / "selector" / "contrast.yaml").write_text(block("yaml"))
    knobs = yaml.safe_load(block("yaml"))
    assert knobs.keys() - {"_target_"} == inspect.signature(case.build).parameters.keys()
    here = ("limit=6", f"hydra.searchpath=[file://{conf}]", "selector=contrast")
    result = result_of(eval_here(*here))
    assert result["status"] == "ok" and result["tokens"]["visual"] == {"mean": 80, "min": 80, "max": 80}
    assert result["selector"] == {"class": "Contrast", "stage": "pre", "budget": 80, "geometry": "lavida_tiles"}
    assert result_of(eval_here(*here, "budget=matched"))["tokens"]["visual"]["mean"] == 88
    eval_here(*here, "selector.sign=2", ok=False)
