"""What the official code of rivals kept or merged, and what ours does (docs/method.md, "Selectors")."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baselines import VisPruner
from tests.golden_data import golden_dir, parity_folder
from tests.parity.rivals.agreement import RivalCase, check_case, read_cases
from tests.parity.rivals.caches import CACHES
from tests.parity.rivals.selectors import SELECTORS, features_of, kept

CHECKS = (SELECTORS, CACHES)


def test_it_agrees_with_the_official_code(rival_case: RivalCase) -> None:
    check_case(rival_case, CHECKS)


def test_the_folder_has_rivals(request: pytest.FixtureRequest) -> None:
    folder = parity_folder(request.config.getoption("--golden"), "rivals")
    assert read_cases(folder), f"{folder} has no pair NAME.json, NAME.safetensors"


def test_the_copy_has_every_rival_that_a_check_knows() -> None:
    kinds = {path.stem for path in golden_dir("rivals").glob("*.json")}
    assert kinds == {kind for group in CHECKS for kind in group} and len(kinds) == 10


def written(folder: Path, name: str, cases: dict[str, dict[str, object]], tensors: dict[str, torch.Tensor]) -> Path:
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "cases": cases}))
    save_file(tensors, folder / f"{name}.safetensors")
    return folder


ONE = {"a.tokens": torch.eye(7), "a.attention": torch.arange(7.0), "a.kept": torch.tensor([5, 6])}
GIVEN = {"budget": 2, "important": 1.0, "drop_per_round": 1}


def test_any_number_of_tokens_and_any_name_of_a_case(tmp_path: Path) -> None:
    tensors = {name.replace("a.", "a long name.", 1): value for name, value in ONE.items()}
    (case,) = read_cases(written(tmp_path, "vispruner", {"a long name": GIVEN}, tensors))
    check_case(case, CHECKS)
    assert "1 comparisons   kept exact" in case.agreement.line("vispruner")


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("unknown", ONE, "no check knows 'unknown'"),
        ("vispruner", {**ONE, "a.two_rounds.kept": torch.tensor([6])}, "no check reads the tensors two_rounds.kept"),
        ("vispruner", {**ONE, "a.kept": torch.tensor([4, 6])}, r"case a, kept: \[5, 6\] is not \[4, 6\]"),
    ],
)
def test_what_fails(name: str, tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    (case,) = read_cases(written(tmp_path, name, {"a": GIVEN}, tensors))
    with pytest.raises(AssertionError, match=words):
        check_case(case, CHECKS)


def test_a_file_that_is_not_whole_fails(tmp_path: Path) -> None:
    written(tmp_path, "vispruner", {"b": GIVEN}, ONE)
    with pytest.raises(AssertionError, match=r"tensors of no case: a\.attention, a\.kept, a\.tokens"):
        read_cases(tmp_path)
    written(tmp_path, "vispruner", {}, ONE)
    with pytest.raises(AssertionError, match="has no cases"):
        read_cases(tmp_path)
    (tmp_path / "vispruner.json").unlink()
    with pytest.raises(AssertionError, match="give both NAME.json and NAME.safetensors of vispruner"):
        read_cases(tmp_path)


def test_a_folder_belongs_to_one_family(tmp_path: Path) -> None:
    assert parity_folder(None, "rivals") == golden_dir("rivals")
    assert parity_folder(tmp_path, "rivals") == tmp_path and parity_folder(tmp_path, "lavida") == golden_dir("lavida")
    for family, raw in (("lavida", {"lm": {}}), ("lavida_dream", {"lm": {"model_type": "llava_dream"}})):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        for other in ("lavida", "lavida_dream", "rivals"):
            assert parity_folder(tmp_path, other) == (tmp_path if other == family else golden_dir(other))


@pytest.mark.parametrize("extra", [1, 3])
def test_padding_around_a_case_changes_nothing(extra: int) -> None:
    """Why a case of any number of tokens may be squared up."""
    found = [case for case in read_cases(golden_dir("rivals")) if case.kind == "vispruner"]
    for case in found:
        tokens, given = case["tokens"], case.given
        side = int(len(tokens) ** 0.5) + extra
        options = {"budget": given["budget"], "important": given["important"], "rho": given["drop_per_round"] / side**2}
        chosen = VisPruner(**options, scope="global")(features_of(tokens, side=side, attention=case["attention"]))
        assert kept(chosen) == case["kept"].tolist()
