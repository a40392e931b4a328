"""Kills commands at random, resumes them, and compares what they leave with an undisturbed run.

    python -m tests.experiments.kill_campaign --n 100 --seed 0 --out docs/results/scale/kills.json

Half of the kills come at a random time. The others come just before or just after one of the calls that put a file on
the disk (`os.replace`, `os.fsync`, `os.unlink`), drawn so that all kinds of files are hit equally often. A third of the
resumed commands are killed once more. Commands are forks of one process that has imported everything.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.atomic_files import write_json
from tests.experiments.conftest import ROOT, lasting, result_of, rows_of, table_without_times

COMMANDS = {
    "eval": ("eval", "selector=shirg", "limit=24", "batch_size=4", "shots=2"),
    "sweep": ("eval", "-m", "selector=pooled,random,shirg", "limit=12", "batch_size=4", "shots=1"),
    "train": (
        "train",
        "selector=shirg",
        "optim.steps=12",
        "optim.warmup=0",
        "batch_size=2",
        "trainer.checkpoint_every=3",
    ),
}
COMMON = ("study=s", "device=cpu", "threads=1")
CALLS = ("replace", "fsync", "unlink")
AGAIN = 1 / 3
"""Share of the resumed commands that are killed, too."""


@dataclass(frozen=True)
class Kill:
    """When a command is killed: after so many seconds, or at a call."""

    seconds: float | None = None
    call: int | None = None
    after: bool = False
    """Whether the call is still made."""


@dataclass(frozen=True)
class Undisturbed:
    """A command that ran to its end: its folder, its seconds, and the kind of file of each call, in their order."""

    home: Path
    seconds: float
    calls: list[str]


@dataclass
class Trial:
    """A command that was killed and resumed."""

    command: str
    kills: list[str]
    """Where each kill came: "time", or the kind of file and the call."""
    blocked: bool
    """Whether the last command failed."""
    differs: list[str]
    """Files whose content is not that of the undisturbed run."""
    garbage: list[str]
    """Files that the undisturbed run does not have."""


def run(words: Sequence[str], home: Path, kill: Kill = Kill(), log: Path | None = None) -> int | None:  # noqa: B008
    """Runs a command in a fork; its exit code, or None when it was killed. `log` gets a line for each call."""
    home.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _become(words, home, kill, log)
    if kill.seconds is not None:
        deadline = time.monotonic() + kill.seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code


def _become(words: Sequence[str], home: Path, kill: Kill, log: Path | None) -> None:
    """The command, in a process group of its own; never returns."""
    os.setsid()
    os.chdir(home)
    out = os.open(home / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if kill.call is not None or log is not None:
        _watch_calls(kill, log)
    code: Any = 0
    sys.argv = [str(ROOT / f"{words[0]}.py"), *words[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _watch_calls(kill: Kill, log: Path | None) -> None:
    """Counts the calls that put files on the disk, notes them, and kills the process at one of them."""
    count = 0

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if log is not None:
                with open(log, "a") as file:
                    file.write(f"{kind_of(_file_of(name, arguments))} {name}\n")
            fatal = count == kill.call
            if fatal and not kill.after:
                os.killpg(0, signal.SIGKILL)
            result = call(*arguments, **options)
            if fatal:
                os.killpg(0, signal.SIGKILL)
            return result

        return watched

    for name in CALLS:
        setattr(os, name, watch(name, getattr(os, name)))


def _file_of(call: str, arguments: Sequence[Any]) -> str:
    if call == "fsync":
        descriptor = arguments[0] if isinstance(arguments[0], int) else arguments[0].fileno()
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return os.fspath(arguments[1 if call == "replace" else 0])


def kind_of(path: str) -> str:
    """The kind of a file: its name without what a temporary adds, and without numbers."""
    name = Path(path).name.removeprefix(".")
    if name.endswith(".tmp"):
        name = name.removesuffix(".tmp").rpartition(".")[0]
    return "shots" if Path(path).parent.name == "shots" else "".join(c for c in name if not c.isdigit()) or "?"


def undisturbed(words: Sequence[str], home: Path) -> Undisturbed:
    log = home.with_suffix(".calls")
    began = time.monotonic()
    if run(words, home, log=log) != 0:
        raise SystemExit(f"the undisturbed command failed: {(home / 'log.txt').read_text()[-2000:]}")
    return Undisturbed(home, time.monotonic() - began, log.read_text().splitlines())


def draw_kill(calm: Undisturbed, draw: random.Random) -> tuple[Kill, str]:
    if draw.random() < 0.5:
        return Kill(seconds=draw.uniform(0.0, calm.seconds)), "time"
    places: dict[str, list[int]] = defaultdict(list)
    for number, place in enumerate(calm.calls, 1):
        places[place].append(number)
    place = draw.choice(sorted(places))
    return Kill(call=draw.choice(places[place]), after=draw.random() < 0.5), place


def trial(name: str, words: Sequence[str], calm: Undisturbed, home: Path, draw: random.Random) -> Trial:
    """Kills a command once or twice, runs it to its end, and compares."""
    kills = []
    kill, place = draw_kill(calm, draw)
    code = run(words, home, kill)
    kills.append(place)
    if draw.random() < AGAIN:
        kill, place = draw_kill(calm, draw)
        code = run([*words, "resume=true"], home, kill)
        kills.append(place)
    if code != 0:
        code = run([*words, "resume=true"], home)
    differs, garbage = compare(home / "outputs/s", calm.home / "outputs/s")
    return Trial(name, kills, code != 0, differs, garbage)


def compare(study: Path, calm: Path) -> tuple[list[str], list[str]]:
    """Files whose lasting content differs or that are missing, and files that an undisturbed run does not leave."""
    ours, theirs = files_of(study), files_of(calm)
    differs = sorted(theirs - ours)
    for path in sorted(theirs & ours):
        if not _equal(study / path, calm / path):
            differs.append(path)
    return differs, sorted(ours - theirs)


def files_of(study: Path) -> set[str]:
    return {str(path.relative_to(study)) for path in study.rglob("*") if path.is_file()}


def _equal(ours: Path, theirs: Path) -> bool:
    """Whether two files are the same but for times."""
    if ours.name == "samples.parquet":
        return rows_of(ours.parent) == rows_of(theirs.parent)
    if ours.name == "result.json":
        return lasting(result_of(ours.parent)) == lasting(result_of(theirs.parent))
    if ours.name == "table.csv":
        return table_without_times(ours.parent) == table_without_times(theirs.parent)
    if ours.name == "metrics.csv" or ours.suffix == ".safetensors" or ours.parent.name == "shots":
        return ours.read_bytes() == theirs.read_bytes()
    return True  # times, commands and commits are in it


def campaign(n: int, seed: int, commands: Mapping[str, Sequence[str]], home: Path) -> list[Trial]:
    draw = random.Random(seed)
    calm = {name: undisturbed([*words, *COMMON], home / f"calm-{name}") for name, words in commands.items()}
    trials = []
    for number in range(n):
        name = list(commands)[number % len(commands)]
        place = home / f"trial-{number}"
        done = trial(name, [*commands[name], *COMMON], calm[name], place, draw)
        trials.append(done)
        bad = done.blocked or done.differs or done.garbage
        print(f"{number + 1:3} {'BAD  ' if bad else 'equal'} {name}: {', '.join(done.kills)}", flush=True)
        if bad:
            print(f"    {asdict(done)}; see {place}", flush=True)
        else:
            shutil.rmtree(place)
    return trials


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    return {
        "trials": len(trials),
        "kills": sum(len(one.kills) for one in trials),
        "killed twice": sum(len(one.kills) == 2 for one in trials),
        "equal": sum(not (one.blocked or one.differs) for one in trials),
        "blocked": sum(one.blocked for one in trials),
        "garbage files": sum(len(one.garbage) for one in trials),
        "by command": dict(Counter(one.command for one in trials)),
        "by place": dict(sorted(Counter(place for one in trials for place in one.kills).items())),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.kill_campaign", description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="commands to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(COMMANDS), help="some of the commands, separated by commas")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("words", nargs="*", help="further words of each command, for example model.path=DIR")
    given = parser.parse_args(arguments)
    import_everything()
    commands = {name: (*COMMANDS[name], *given.words) for name in given.only.split(",")}
    began = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    trials = campaign(given.n, given.seed, commands, home)
    command = f"python -m tests.experiments.kill_campaign --n {given.n} --seed {given.seed}"
    found = {"command": command, "seconds": round(time.monotonic() - began), **summary(trials)}
    print(json.dumps(found, indent=1))
    if given.out is not None:
        write_json(given.out, {**found, "each": [asdict(one) for one in trials]})
    if any(one.blocked or one.differs or one.garbage for one in trials):
        sys.exit(1)
    shutil.rmtree(home)


def import_everything() -> None:
    """What the commands import, once."""
    import experiments.cli
    import experiments.evaluate
    import experiments.jobs.job
    import experiments.report.publish
    import experiments.train  # noqa: F401


if __name__ == "__main__":
    main(sys.argv[1:])
