"""Words of a command line that Hydra cannot read, values that it can, and commands that a shell and Hydra read back."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from experiments.build import compose_eval
from experiments.errors import ConfigError
from experiments.job_names import study_folder
from experiments.override_grammar import check_words, command_in, command_line, quote
from experiments.train import how_to_evaluate
from tests.experiments.conftest import result_of

NAMES = [
    "run (1)",
    "a=b",
    "é",
    "图",
    "it's",
    'say "hi"',
    "a,b",
    "[x]",
    "{y}",
    "#1",
    "null",
    "1e3",
    "50%",
    "$HOME",
    "~",
    "a;b",
]


def read_back(command: str) -> dict[str, object]:
    """The overrides of a printed command, as a shell and Hydra read them."""
    _, _, *words = shlex.split(command)
    check_words(words)
    parsed = OverridesParser.create().parse_overrides(words)
    assert not any(override.is_sweep_override() for override in parsed)
    return {override.key_or_group: override.value() for override in parsed}


@pytest.mark.parametrize("name", NAMES)
def test_printed_commands_can_be_pasted(name: str) -> None:
    assert read_back(command_in(name)) == {"study": name}
    artifact = Path(study_folder(name)) / "train_defaults" / "adapter"
    overrides = ["selector=random", "selector.seed=1", f"study={quote(name)}", "optim.steps=2"]
    printed = how_to_evaluate("adapt", overrides, artifact).removeprefix("evaluate ")
    assert read_back(printed) == {"selector": "random", "selector.seed": 1, "adapter": str(artifact)}
    printed = how_to_evaluate("base", overrides, artifact).removeprefix("evaluate ")
    assert read_back(printed) == {"selector": "pooled", "model.path": str(artifact)}


def test_the_command_of_a_record_can_be_pasted(eval_here: Callable[..., Path]) -> None:
    """It is what tables and pages show."""
    name, suffix = "run (1) = é, it's", ' "really"?\n'
    job = eval_here(f"study={quote(name)}", "limit=2", f"data.suffix={quote(suffix)}", "selector=random")
    shown = read_back(result_of(job)["command"])
    assert (shown["study"], shown["data.suffix"], job.parent.name) == (name, suffix, name)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20))
def test_any_text_comes_back(text: str) -> None:
    assert read_back(command_line("eval", [f"data.root={quote(text)}"])) == {"data.root": text}


@pytest.mark.parametrize("sign", list("(){}[=#!&;<'\"`") + ["é", "图"])
def test_a_sign_without_quotes_is_answered_by_the_word_with_quotes(sign: str) -> None:
    word = f"data.root=/a{sign}b"
    with pytest.raises(ConfigError, match="Hydra cannot read this value; if it is a text, write ") as caught:
        check_words(["-m", word])
    (advised,) = shlex.split(str(caught.value).partition("write ")[2])
    assert OverridesParser.create().parse_override(advised).value() == f"/a{sign}b"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a b=1"], "a b=1: this is no override of the form KEY=VALUE"),
        (["x=" + "[" * 9_000], r"this value; if it is a text, write it in quotes inside quotes"),
        (["x=" + "[" * 100_000], r"an override has at most 10,000 characters"),
        (["x=" + "9" * 5000], r"this value"),
        (["x=\udcff"], r"x=\\xdcff: Hydra cannot read this value"),
        (["data=null"], "data=null: give the name of an option; choose one of chartqa, docvqa"),
        (["selector=3"], "selector=3: give the name of an option"),
        (["model=[7]"], r"model=\[7\]: give the name of an option"),
        (["~cache=0"], "~cache=0: give the name of an option"),
        (["~decode=[1]"], r"~decode=\[1\]: give the name of an option"),
        (["-m", "seed=range(0,10000000000)"], "this sweep has 10,000,000,000 jobs: give fewer values"),
        (["-m", *(f"k{i}={','.join('abcdefghij')}" for i in range(6))], "this sweep has 1,000,000 jobs"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_words_that_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_words(words)
    assert len(str(caught.value)) < 600


def test_words_that_are_read() -> None:
    check_words(["-m", "selector=full,random", "seed=range(0,3)", "+a=1", "~data.limit", "--cfg", "job", "x={a: [1]}"])
    check_words(["hydra/launcher=local", "data.suffix=", "adapter=null"])
    assert compose_eval("adapter=null").adapter is None
