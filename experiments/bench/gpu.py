"""`python -m experiments.bench.gpu`, or `make gpu`: the GPU tests, then the bench at true size, in under nine minutes.

Each group of measurements is a process of its own, with a time limit: what breaks or hangs in one does not end the run.
The rows go to JSON files, one for each process, and the tables are printed at the end. Without Hydra the tests of
`tests/experiments` are left out, which the output says.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from experiments.bench.recorder import ROOT
from experiments.errors import CommandParser


@dataclass(frozen=True)
class Group:
    """One process."""

    seconds: int
    """How long it measures; a little later it is stopped."""
    options: tuple[str, ...]
    """Of experiments.bench.true_size."""


def _lm(name: str, engines: str, parts: str, batch: str = "1,16", rounds: int = 5) -> tuple[str, ...]:
    return "--lm", name, "--engines", engines, "--parts", parts, "--batch", batch, "--rounds", str(rounds)


GROUPS = {
    "llada": Group(185, _lm("llada", "eager,graph,compile", "steps,attention,systems,reference,unequal,kernels")),
    "dream": Group(165, _lm("dream", "eager,graph,compile", "steps,attention,systems,unequal")),
    "kernels": Group(45, _lm("llada", "eager", "kernel,selectors")),
}
TESTS = "tests"
TEST_SECONDS = 125
GRACE_S = 20


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m experiments.bench.gpu", description=str(__doc__).splitlines()[0])
    known = [TESTS, *GROUPS]
    parser.add_argument("--only", type=lambda text: text.split(","), default=known, help=f"some of {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=520.0, help="when to stop, in all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"), help="folder of the JSON files")
    parser.add_argument("--commit", help="the commit that is measured, where there is no git checkout")
    parser.add_argument("options", nargs="*", help="after --: further options of experiments.bench.true_size")
    return parser.parse_args(arguments)


def test_files() -> list[str]:
    """The files with GPU tests that can be imported here."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if find_spec("hydra") is not None:
        return [str(path.relative_to(ROOT)) for path in marked]
    left_out = [path for path in marked if path.is_relative_to(ROOT / "tests" / "experiments")]
    print("left out, for want of hydra-core:", *(path.relative_to(ROOT) for path in left_out), flush=True)
    return [str(path.relative_to(ROOT)) for path in marked if path not in left_out]


def run(command: Sequence[str], seconds: float, **environment: str) -> int | None:
    """The exit code; None if it had to be stopped, with everything that it started."""
    print(f"\n$ {' '.join(command)}   (at most {seconds:.0f} s)", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, **environment})
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    began, codes, files = time.monotonic(), {}, []
    out = given.out.resolve()
    for name in given.only:
        left = given.seconds - (time.monotonic() - began)
        if left < GRACE_S:
            codes[name] = "not started: no time left"
            continue
        started = time.monotonic()
        if name == TESTS:
            most = min(TEST_SECONDS, left)
            options = (
                "-m",
                "gpu",
                "-n",
                "6",
                "--dist",
                "load",
                "-p",
                "no:cacheprovider",
                f"--timeout={0.7 * most:.0f}",
                "-v",
                "--tb=short",
            )
            command = (sys.executable, "-m", "pytest", *options, *test_files())
            # The kernels of a test are few: pools of compiler processes for each worker take longer to start.
            code = run(command, most, TORCHINDUCTOR_COMPILE_THREADS="1")
        else:
            group, file = GROUPS[name], out / f"{name}.json"
            most = min(group.seconds, left - GRACE_S / 2)
            options = ("--out", str(file), *group.options, "--seconds", f"{most:.0f}", *given.options)
            commit = ("--commit", given.commit) if given.commit else ()
            command = (sys.executable, "-m", "experiments.bench.true_size", *options, *commit)
            code = run(command, min(most + GRACE_S, left))
            files += [str(file)] if file.exists() else []
        codes[name] = f"{'stopped' if code is None else f'exit {code}'} after {time.monotonic() - started:.0f} s"
    if files:
        run((sys.executable, "-m", "experiments.bench.roofline", *files), 60)
    print("\n" + "\n".join(f"{name}: {code}" for name, code in codes.items()))
    return 0 if all(code.startswith("exit 0") for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
