"""`--help GROUP=OPTION`: every key with its default, what it takes and what it means, each said in one place."""

from dataclasses import fields

import pytest

from experiments.option_help import comments, entries
from experiments.schema import CONF
from shirg.options import ShirgOptions
from tests.experiments.conftest import Command

GROUPS = ("selector", "context", "relevance", "data", "decode", "cache", "logger", "experiment", "ablation", "model")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def test_the_keys_of_a_selector(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = command("eval", "--help", "selector=shirg")
    lines = ended.out.splitlines()
    assert ended.code == 0 and max(map(len, lines)) <= 80
    keys = {line.split("=")[0].removeprefix("  selector.") for line in lines if line.startswith("  selector.")}
    assert {key.partition(".")[0] for key in keys} == {entry.name for entry in fields(ShirgOptions)} | {"budget"}
    text = " ".join(ended.out.split())
    assert "selector.norm=zscore # zscore | minmax | rank | none how the terms are made comparable;" in text
    assert "selector.neighbour.sign=-1 # -1 as published | 1 prefers tokens unlike their surroundings" in text
    assert "selector.weights.variance=0.0" in text and "selector.budget=base # base | wide | full" in text


def test_typed_groups_and_groups_of_other_keys() -> None:
    found = {key: (value, remark) for key, value, remark, _ in entries("eval", "decode", "shift_third")}
    assert found["decode.step_ratio"] == ("0.5", "") and found["decode.prefix_cache"] == ("true", "true | false")
    assert found["decode.engine"][1].startswith("eager | compile | graph")
    assert {key: value for key, value, *_ in entries("eval", "ablation", "norm_rank")} == {"selector.norm": "rank"}
    assert comments("selector", "shirg")["neighbour.metric"] == "feature_l2 | feature_cos | local_var | position"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_has_help(group: str, option: str) -> None:
    found = list(entries("eval", group, option))
    keys = [key for key, *_ in found]
    assert len(set(keys)) == len(keys) and all("\n" not in "".join(entry) for entry in found)


def test_groups_and_what_is_unknown(command: Command) -> None:
    ended = command("eval", "--help", "relevance")
    assert ended.code == 0 and "  lm_embed           Cosine between projected tokens" in ended.out
    for word, sentence in (
        ("selctor=shirg", "there is no such group of options; did you mean selector?"),
        ("selector=shrig", "selector=shrig: there is no such option; did you mean shirg?"),
    ):
        ended = command("eval", "--help", word)
        assert ended.code == 1 and sentence in ended.err[0]
