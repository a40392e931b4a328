"""`python -m experiments.bench PART [options]`: how long one part takes at true size, as a table and as JSON.

A new part is a module of experiments.bench with `run(*, device, <its options>) -> BenchResult`, and an entry in PARTS.
It is imported when it runs, so that `--help` answers at once.
"""

import argparse
import io
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import CommandParser, one_sentence

if TYPE_CHECKING:
    from experiments.bench.common import BenchResult


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def dtype(text: str) -> str:
    if text not in ("float32", "bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"{text!r} is not float32, bfloat16 or float16")
    return text


def dtypes(text: str) -> list[str]:
    return [dtype(part) for part in text.split(",")]


def stage(text: str) -> str:
    if text not in ("adapt", "gate"):
        raise argparse.ArgumentTypeError(f"{text!r} is not adapt or gate")
    return text


def names(text: str) -> list[str]:
    return text.split(",")


@dataclass(frozen=True)
class Option:
    """An option on the command line: its help, and the conversion of its text."""

    help: str
    read: Callable[[str], Any] = str


OPTIONS = {
    "dtype": Option("float32, bfloat16 or float16; the model's own when not given", dtype),
    "batch": Option("batch sizes, separated by commas", positives),
    "only": Option("some of them, separated by commas, options after a space; all when not given", names),
    "repeats": Option("timed calls; the table has their median", positive),
    "model": Option("an option of conf/model"),
    "stage": Option("adapt or gate", stage),
    "workers": Option("processes that prefetch batches", whole),
    "prompt": Option("tokens of the prompt, separated by commas", positives),
    "answer": Option("tokens of the answer", positive),
    "steps": Option("denoising steps; one for each token when not given", positive),
    "engine": Option("eager, compile or graph, separated by commas", names),
    "attention": Option("sdpa, math or flash"),
    "selector": Option("an option of conf/selector"),
    "samples": Option("questions to answer", positive),
    "selectors": Option("how many selectors, the first ones of conf/selector", positive),
    "jobs": Option("sizes of studies, separated by commas", positives),
    "processes": Option("processes that hold the model at the same time", positive),
    "dtypes": Option("float32, bfloat16 or float16, separated by commas", dtypes),
    "n": Option("numbers of samples, separated by commas", positives),
    "kept": Option("kept tokens of a sample", positives),
}
"""Options that a part may have; every part also has --device, --threads and --out."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    module: str
    about: str
    defaults: Mapping[str, str | None]
    """Its options (keys of OPTIONS) with their defaults as one would type them; None for no value."""


PARTS = {
    "selectors": Part(
        "selectors",
        "every selector, beside a naive implementation of SHIRG-980 and the vision tower",
        {"dtype": "float32", "batch": "1,4", "repeats": "15", "only": None},
    ),
    "train": Part(
        "training_step",
        "training steps of an adapter or a relevance head, and the share of data, forward, backward and optimiser",
        {"model": "tiny", "stage": "adapt", "batch": "36", "workers": "0", "repeats": "20"},
    ),
    "decode": Part(
        "decode",
        "prefill and denoising steps, beside a plain implementation of the public reference and the device's floor",
        {
            "model": "bench_small",
            "dtype": None,
            "prompt": "1050",
            "answer": "32",
            "steps": None,
            "batch": "1",
            "engine": "eager,compile",
            "attention": "sdpa",
            "repeats": "7",
        },
    ),
    "kernels": Part(
        "step_kernels",
        "the kernels of a denoising step on a CPU, each beside torch's",
        {"model": "bench_small", "prompt": "1050", "answer": "32", "batch": "1", "repeats": "31"},
    ),
    "prefill": Part(
        "prefill",
        "selection, prefill and step over ever more vision tokens, with fitted exponents",
        {
            "model": "bench_small",
            "prompt": "500,1000,2000,4000,8000",
            "answer": "32",
            "batch": "1",
            "selector": "norm_topk",
            "attention": "sdpa",
            "repeats": "3",
        },
    ),
    "unequal": Part(
        "unequal_prompts",
        "prefill of a batch of unequal prompts: padded and masked, and one behind the other",
        {
            "model": "bench_small",
            "prompt": "490,742,918,1092",
            "answer": "32",
            "engine": "eager",
            "attention": "sdpa",
            "repeats": "7",
        },
    ),
    "encode": Part(
        "encoding",
        "cutting pictures into views, and the tower over one or several pictures",
        {"model": "bench_small", "batch": "1,4", "repeats": "5"},
    ),
    "cache": Part(
        "cache_size",
        "prefix caches in fewer bits: bytes, milliseconds and the change of logits",
        {"model": "bench_small", "prompt": "1050", "answer": "32", "batch": "1", "repeats": "7"},
    ),
    "end2end": Part(
        "end2end",
        "from picture to answer: samples per second by batch size, and whether answers stay the same",
        {"model": "tiny", "batch": "1,16", "only": None, "samples": "96", "repeats": "5"},
    ),
    "jobs": Part(
        "sweep_overhead",
        "jobs of a sweep: seconds of each beside its answers, and how many models the sweep reads",
        {"model": "tiny", "selectors": "20", "samples": "8"},
    ),
    "study": Part(
        "study_growth",
        "studies of many jobs: a job's end, the table, the page and a sweep's overhead in CPU seconds, the page's size",
        {"jobs": "10,200,1000", "samples": "200"},
    ),
    "sharing": Part(
        "sharing",
        "memory of processes that load the same checkpoint of 1 GiB, and the seconds that it takes each",
        {"model": "bench_small", "processes": "2", "dtypes": "bfloat16,float32"},
    ),
    "rows": Part(
        "answer_rows",
        "memory and time of a job's rows by their number: answered, stopped, resumed, summarised; without a model",
        {"n": "1000,20000", "kept": "980", "batch": "16"},
    ),
    "hostile": Part(
        "hostile",
        "inputs that should be refused: how each command ends, its seconds and its memory",
        {"only": None},
    ),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m experiments.bench", description="How long one part takes at true size.")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, part in PARTS.items():
        own = parts.add_parser(name, help=part.about, description=part.about)
        own.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
        own.add_argument("--threads", type=positive, help="threads on the CPU; torch's own choice when not given")
        own.add_argument("--out", type=Path, default=Path(f"outputs/bench/{name}.json"), help="where the JSON goes")
        for key, default in part.defaults.items():
            shown = "" if default is None else f" (default {default})"
            own.add_argument(f"--{key}", type=OPTIONS[key].read, default=default, help=OPTIONS[key].help + shown)
    # `model=tiny`, as other commands write it, is read as `--model tiny`.
    return parser.parse_args([f"--{a}" if re.match(r"[a-z]+=", a) else a for a in arguments])


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    with one_sentence():
        _measure(given, shlex.join(["python", "-m", "experiments.bench", *arguments]))


def _measure(given: argparse.Namespace, command: str) -> None:
    import torch

    from experiments.atomic_files import write_atomic, write_json
    from experiments.bench.recorder import short
    from experiments.jobs.results import environment
    from experiments.profiling import resolve_device

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = resolve_device(given.device)
    part = PARTS[given.part]
    run = import_module(f"experiments.bench.{part.module}").run
    result: BenchResult = run(device=device, **{key: getattr(given, key) for key in part.defaults})
    print("\n".join(result.lines()))
    made_by = environment(device, getattr(given, "dtype", None) or result.report.get("dtype", "float32"))
    write_json(given.out, {"command": short(command), "environment": made_by, **result.report})
    print(f"written: {given.out}")
    if result.figure is not None:
        svg = io.BytesIO()
        result.figure.savefig(svg, format="svg")
        write_atomic(given.out.with_suffix(".svg"), svg.getvalue())


if __name__ == "__main__":
    main(sys.argv[1:])
