"""Overrides that are drawn: each command line is built up to the model, or refused by an error for users."""

from functools import cache

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from experiments import build
from experiments.errors import is_user_error
from experiments.jobs.results import resolve_config
from experiments.override_grammar import check_words, quote
from experiments.schema import CONF
from lavida_adapter import LavidaConfig

SECTIONS = ("selector", "decode", "data", "cache", "relevance", "model", "logger")
CONFIG = LavidaConfig()
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 100), st.floats(allow_nan=True), st.sampled_from([1e308, -1e308, 0.5])
)
PLAIN = st.one_of(
    NUMBERS.map(str),
    st.sampled_from(
        ["null", "true", "[]", "{}", "[1]", "{a: 1}", "[null]", "''", "a,b", "nan", "[nan]", "[[1]]", "1e999"]
    ),
    st.text(max_size=8),
    st.text(max_size=8).map(quote),
    st.lists(NUMBERS, max_size=3).map(lambda values: f"[{','.join(map(str, values))}]"),
)


@cache
def keys() -> tuple[str, ...]:
    """Every key of the default configuration, groups included."""
    cfg = build.compose_eval("study=s")

    def names(node: DictConfig, prefix: str = "") -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key}")
            if OmegaConf.is_dict(node[key]) if not OmegaConf.is_missing(node, str(key)) else False:
                found += names(node[key], f"{prefix}{key}.")
        return found

    return tuple(names(cfg))


@cache
def options() -> tuple[str, ...]:
    """Every option of the groups that build something without a model."""
    groups = ("selector", "context", "cache", "relevance", "decode", "ablation")
    return tuple(f"{group}={path.stem}" for group in groups for path in sorted((CONF / group).glob("*.yaml")))


def build_all(words: list[str]) -> None:
    """What eval.py does with a command line before it reads a file."""
    check_words(words)
    cfg = build.compose_eval("study=s", *words)
    resolve_config(cfg)
    build.check_numbers(cfg)
    build.build_decode(cfg, 4)
    selector = build.build_selector(cfg, CONFIG.budgets, CONFIG)
    build.build_relevance(cfg, selector)
    build.build_cache(cfg, CONFIG.budgets)


@given(
    st.lists(st.tuples(st.sampled_from(keys()), PLAIN), min_size=1, max_size=2),
    st.one_of(st.none(), st.sampled_from(options())),
    st.sampled_from(["", "+", "++", "~"]),
)
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
def test_any_command_line_is_built_or_refused(given: list[tuple[str, str]], option: str | None, sign: str) -> None:
    words = [f"{sign}{key}={value}" for key, value in given]
    try:
        build_all([*([] if option is None else [option]), *words])
    except Exception as error:
        assert is_user_error(error), words
        assert len(str(error)) < 2000, words
