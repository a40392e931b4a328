"""Hydra's grammar of overrides: words that it cannot read, values written so that it can, commands to paste.

Hydra says where its lexer stopped. Here a word that it cannot read is answered by the word that it could, before any
config is composed.
"""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from experiments.errors import ConfigError, instead, visible
from experiments.schema import CONF, Eval, Train

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

MOST_CHARACTERS = 10_000
"""Longest override: Hydra's parser takes half a millisecond a character."""
MOST_JOBS = 100_000
"""Jobs of one sweep: all of them are composed before the first one starts."""
_PLAIN = re.compile(r"[A-Za-z_/][\w./@%+-]*", re.ASCII)
_VALUES = frozenset({"null", "true", "false", "nan", "inf"})
"""Words that Hydra reads as something else than a text."""


def quote(value: str) -> str:
    """A text as a value of an override: as it is where Hydra's grammar takes it so, in quotes otherwise."""
    if _PLAIN.fullmatch(value) and value.lower() not in _VALUES:
        return value
    # A quote needs a backslash; backslashes count only before a quote, the last one's among them.
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"


def command_line(command: str, words: Sequence[str]) -> str:
    """A command to paste into a shell: `python eval.py ...` for "eval"."""
    return shlex.join(["python", f"{command}.py", *words])


def command_in(study: str, *words: str) -> str:
    """The command that evaluates something in a study."""
    return command_line("eval", [f"study={quote(study)}", *words])


def check_words(argv: Sequence[str]) -> None:
    """Refuses overrides that Hydra cannot read, and sweeps without end.

    Raises:
        ConfigError: says what to write instead, where that is known.
    """
    n_jobs = 1
    for word in argv:
        if word.startswith("-") or not ("=" in word or word.startswith("~")):
            continue  # options of Hydra's own, and their values
        if len(word) > MOST_CHARACTERS:
            raise ConfigError(f"{visible(word)[:80]}...: an override has at most {MOST_CHARACTERS:,} characters")
        override = _parse(word)
        if override is None:
            raise ConfigError(_advice(word))
        name = override.key_or_group
        if _is_group(name) and not override.is_sweep_override():
            value = override.value()
            names = value if isinstance(value, list) and not override.is_delete() else [value]
            if not all(isinstance(each, str) or (each is None and override.is_delete()) for each in names):
                options = ", ".join(sorted(path.stem for path in (CONF / name).glob("*.yaml")))
                raise ConfigError(f"{word}: give the name of an option; choose one of {options}")
        n_jobs *= _n_values(override)
    if n_jobs > MOST_JOBS and {"-m", "--multirun"} & set(argv):
        raise ConfigError(f"this sweep has {n_jobs:,} jobs: give fewer values, at most {MOST_JOBS:,} jobs")


def check_keys(command: str, argv: Sequence[str]) -> None:
    """Refuses a key that is added to the config (`+key=1`) and that no code reads.

    Raises:
        ConfigError: names the key that was meant.
    """
    known = {entry.name for entry in fields({"eval": Eval, "train": Train}[command])}
    known |= {path.name for path in CONF.iterdir() if path.is_dir()}
    for word in argv:
        name = word.partition("=")[0].lstrip("+").partition(".")[0].partition("/")[0].partition("@")[0]
        if word.startswith("+") and name not in known:
            raise ConfigError(f"{word.partition('=')[0]}: there is no such key{instead(name, sorted(known))}")


def below_null(command: str, argv: Sequence[str]) -> str | None:
    """The answer to `lora.grow.start=3` where `lora.grow` is null, for which OmegaConf has no error of its own.

    None where no word concerns a section that may be null.
    """
    schema = get_type_hints({"eval": Eval, "train": Train}[command])
    for group, types in schema.items():
        for name, kind in get_type_hints(types).items() if is_dataclass(types) else ():
            section = f"{group}.{name}"
            words = [w for w in argv if w.lstrip("+").startswith((f"{section}=", f"{section}."))]
            if words and any(is_dataclass(each) for each in get_args(kind)):
                files = sorted((CONF / group).glob("*.yaml"))
                have = [path.stem for path in files if re.search(rf"^{name}:", path.read_text(), re.MULTILINE)]
                return f"{words[0]}: {section} is null here; these have it: {group}={', '.join(have)}"
    return None


def _is_group(name: str) -> bool:
    try:
        return bool(name) and (CONF / name).is_dir()
    except (OSError, ValueError):  # a name that no folder can have
        return False


def _parse(word: str) -> "Override | None":
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, RecursionError, ValueError):  # brackets too deep, whole numbers of thousands of digits
        return None


def _advice(word: str) -> str:
    """The word with its value in quotes, where that is an override."""
    key, sign, value = word.partition("=")
    quoted = f"{key}={quote(value)}"
    if sign and value and _parse(quoted) is not None:
        return (
            f"{visible(word)[:200]}: Hydra cannot read this value; if it is a text, write "
            f"{visible(shlex.quote(quoted)) if len(quoted) < 200 else 'it in quotes inside quotes'}"
        )
    return f"{visible(word)[:200]}: this is no override of the form KEY=VALUE"


def _n_values(override: "Override") -> int:
    """How many jobs a swept override makes; an interval and a pattern count as one."""
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep

    value: Any = override.value()
    if isinstance(value, ChoiceSweep):
        return len(value.list)
    if isinstance(value, RangeSweep) and value.start is not None and value.stop is not None:
        return max(1, math.ceil((value.stop - value.start) / value.step)) if value.step else 1
    return 1
