"""Errors of commands: which ones the user can fix, what is wrong with a command line, and how a command ends with one.

Nothing here loads torch, so a command line with a mistake is answered at once. Hydra is loaded by what explains its
errors alone: the GPU bench runs where there is no Hydra.
"""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


class ConfigError(ValueError):
    """A command line, a config or a stored record that cannot be used; the message says what to do.

    What loads torch raises `shirg.UserError` for the same purpose.
    """


def is_user_error(error: BaseException) -> bool:
    """True for an error that is raised on purpose, with a sentence for the user; False for a bug."""
    if isinstance(error, ConfigError):
        return True
    from omegaconf.errors import OmegaConfBaseException

    from shirg import UserError

    return isinstance(error, OmegaConfBaseException | UserError)


AGAIN = "run the command again"
RESUME = "the same command with resume=true goes on from here"


def sentence_of(error: BaseException, again: str = AGAIN, place: Path | None = None) -> str | None:
    """What to tell the user about an error; None for a bug.

    Args:
        again: how to repeat a command for which there was no place on the disk.
        place: the folder that was written to, for an error that does not name a file.
    """
    sentence = _unwritable(error, again, place) or _unreadable(error)
    return sentence or (str(error) if is_user_error(error) else None)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM)


def _unwritable(error: BaseException, again: str, place: Path | None) -> str | None:
    """The sentence for a file that could not be written; None for other errors, also for one that could not be read."""
    if not isinstance(error, OSError):
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place
    what = f"{path or 'a file'} could not be written ({error.strerror})"
    if error.errno in _FULL:
        return f"{what}: make room there; {again}"
    if error.errno == errno.EROFS or (error.errno in _DENIED and path is not None and _may_only_read(path)):
        return f"{what}: get leave to write there, or start in another folder; {again}"
    return None


def _unreadable(error: BaseException) -> str | None:
    """The sentence for a path that we may not read, or whose name no file system holds; None for other errors."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes):
        return None
    path = os.fsdecode(error.filename)
    if error.errno == errno.ENAMETOOLONG:
        return f"{path[:80]}... ({len(path):,} characters) is too long for the name of a file: give a shorter one"
    if error.errno in _DENIED and not os.access(path, os.R_OK):
        return f"{path} could not be read ({error.strerror}): get leave to read it"
    return None


def _may_only_read(path: Path) -> bool:
    """Whether we may read a file, or look for it, and may not write it."""
    if os.path.lexists(path):
        return os.access(path, os.R_OK) and not os.access(path, os.W_OK)
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return os.access(there, os.X_OK) and not os.access(there, os.W_OK)


def visible(text: str) -> str:
    """The text in one line, control characters as escapes: a terminal or a Markdown reader must not obey them."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def fail(sentence: str, code: int = 1) -> NoReturn:
    """Ends the command with one sentence on standard error."""
    sys.stdout.flush()
    print(f"error: {visible(sentence)}", file=sys.stderr)
    sys.exit(code)


class Terminated(BaseException):
    """Raised by SIGTERM, so that files and runs are closed. Not an Exception: a job that fails is another matter."""


def raise_terminated(*_: object) -> NoReturn:
    """The handler of SIGTERM while a command runs; a second SIGTERM ends the process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


@contextmanager
def one_sentence(again: str = AGAIN) -> Iterator[None]:
    """Ends a command with one sentence when it is interrupted, when the user can fix its error, and when a file cannot
    be written. A bug keeps its traceback.

    Args:
        again: how to repeat the command.
    """
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        fail("; ".join(["interrupted", *map(str, error.args), again]), code=128 + signal.SIGINT)
    except Terminated as error:
        fail("; ".join(["interrupted", *map(str, error.args), again]), code=128 + signal.SIGTERM)
    except BrokenPipeError:
        # The reader of our output is gone, as with `| head`; the interpreter's last flush must not fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if (sentence := sentence_of(error, again)) is None:
            raise
        fail(sentence)
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_out(path: Path, why: object) -> None:
    """Says, once in a process, that a damaged file or folder of a study is left out, and why."""
    line = visible(f"left out  {path}: {' '.join(str(why).split())}")
    if line not in _LEFT_OUT:
        _LEFT_OUT.add(line)
        print(line, file=sys.stderr, flush=True)


_LEFT_OUT: set[str] = set()


NEAR = 70.0
"""Least similarity in %, of a name that was meant: two letters swapped in a name of five."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to an unknown one; None where none is near.

    Of dotted keys the last parts are similar, too. A word without a dot also means a key's last part: `norm` is
    `selector.norm` where no other key ends so.
    """
    from rapidfuzz import fuzz, process  # a command without a mistake does not need it

    last = name.rpartition(".")[2].lower()
    names = [each for each in known if fuzz.ratio(last, each.rpartition(".")[2].lower()) >= NEAR]
    found = process.extractOne(name.lower(), names, scorer=fuzz.ratio, processor=str.lower, score_cutoff=NEAR)
    if found is not None:
        return found[0]
    ends = [each for each in names if each.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else None


def instead(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of the sentence that there is no such name: `; did you mean selector?`.

    Args:
        otherwise: the end where no known name is near, for example a list of all; "choose one of" them when not given.
    """
    names = list(known)
    found = nearest(name, names)
    return f"; did you mean {found}?" if found is not None else f"; {otherwise or 'choose one of ' + ', '.join(names)}"


class CommandParser(argparse.ArgumentParser):
    """An argument parser that ends with one sentence and exit code 1, as every command of this project does."""

    def error(self, message: str) -> NoReturn:
        """Ends with the sentence of argparse, and what was meant where a name is unknown."""
        if match := re.match(r"argument .*: invalid choice: '(.*)' \(choose from (.*)\)$", message):
            known = [each.strip("'") for each in match[2].split(", ")]
            message = f"{match[1]}: there is no such choice{instead(match[1], known)}"
        elif match := re.match(r"unrecognized arguments: (\S+)", message):
            word = match[1].partition("=")[0]
            message += instead(word, self._option_string_actions)
        fail(f"{message}; `{self.prog} --help` lists what there is")


def explain(error: BaseException, command: str, argv: Sequence[str]) -> str:
    """One sentence for an error of Hydra or OmegaConf: what is wrong with the command line, and what would be right."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import MissingMandatoryValue

    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if name.startswith("submitit_"):
            return "hydra/launcher: the launchers need submitit; pip install -c constraints.txt -e '.[slurm]'"
        return f"{group}={name}: there is no such option{instead(name, sorted(error.options))}"
    text = str(error)
    cause = error.__cause__ or error
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], command, argv)
    if match := re.match(r"Error merging override (\S.*)", text):
        return f"{match[1].strip()}: {_first_line(str(cause))}"
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key or text.split(":", 1)[-1].split()[0]
        return f"{key} has no value; give {key}=..."
    if match := re.match(r"\w+ raised while resolving interpolation: (.*?)(\n +full_key: .*)?$", text, re.DOTALL):
        return match[1]
    where = getattr(error, "full_key", None)
    return f"{where}: {_first_line(text)}" if where else " ".join(line.strip() for line in text.splitlines() if line)


_WORDS = ("sweep", "run", "rescore", "trust")
"""Words of our own that are no keys of a config."""


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip()


def _unknown_key(key: str, command: str, argv: Sequence[str]) -> str:
    """The options that exist where the mistyped one was looked for."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    from experiments.schema import CONF, VERSION_BASE

    parent, _, name = key.rpartition(".")
    group = parent.split(".")[0]
    choices = _group_choices(group, argv)
    for overrides in choices:
        with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            cfg = compose(command, overrides=overrides, return_hydra_config=True)
        picked = cfg.hydra.runtime.choices.get(group)
        node = (
            OmegaConf.select(cfg, parent)
            if parent
            else OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
        )
        valid = sorted(str(k) for k in node if not str(k).startswith("_")) if isinstance(node, DictConfig) else []
        if name in valid:
            continue
        words = [] if parent else [*_WORDS, *(path.name for path in CONF.iterdir() if path.is_dir())]
        known = [*_dotted(cfg), *words]
        if not parent:
            return f"{key}: there is no such key{instead(key, known, 'the keys are ' + ', '.join(valid))}"
        where = f"{group}={picked}" if picked and parent == group else parent
        there = f"it has {', '.join(valid)}" if valid else "it has none"
        return f"{key}: {where} has no such option{instead(key, known, there)}"
    if len(choices) > 1:
        # Hydra first composes the sweep without what is swept, that is with the group's default.
        return f"{key}: where {group}= is swept, write it with two plus signs: ++{key}=..."
    return f"{key}: there is no such key; `python {command}.py --cfg job` lists them"


def _dotted(cfg: "DictConfig") -> list[str]:
    """All keys of a config, those of its groups with dots."""
    from omegaconf import DictConfig

    found = []
    for name in (str(name) for name in cfg if name != "hydra" and not str(name).startswith("_")):
        node = cfg._get_node(name)
        found += [name, *(f"{name}.{inner}" for inner in (_dotted(node) if isinstance(node, DictConfig) else ()))]
    return found


def _group_choices(group: str, argv: Sequence[str]) -> list[list[str]]:
    """The config choices on the command line: one list for each value that a sweep gives to `group`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from experiments.schema import CONF

    fixed: list[str] = []
    swept: list[str] = []
    for override in OverridesParser.create().parse_overrides([a for a in argv if not a.startswith("-")]):
        name = override.key_or_group
        if (CONF / name).is_dir():
            values = _values(override)
            swept += [f"{name}={value}" for value in values] if name == group else []
            fixed += [f"{name}={values[0]}"] if name != group else []
    return [[*fixed, choice] for choice in swept] or [fixed]


def _values(override: "Override") -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.value())]
