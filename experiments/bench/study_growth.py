"""What a study costs besides its jobs, by the number of jobs: a job's end, the table, the page, a whole sweep.

A few tiny jobs are really evaluated. The studies are copies of them: every copy has a config, answers and scores of its
own. A sweep is played by adding the copies one after the other; the clock of the study is put forward by what a job
takes, so that table and page are written as often as in a sweep of that length.
"""

import html
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from experiments.analysis import memo
from experiments.analysis.stats import estimate
from experiments.analysis.turns import LAST_REFRESH
from experiments.atomic_files import write_json
from experiments.bench.common import BenchResult, Columns, mib, table_of
from experiments.jobs.results import RESULT, SAMPLES, SHOTS, config_hash, read_result
from experiments.jobs.sample_rows import subset_name
from experiments.report.page import NAME
from experiments.report.publish import publish, refresh_report
from experiments.schema import CONF

SELECTORS = ("pooled", "random", "shirg", "norm_topk", "uniform_grid")
"""The first one is what the others are compared to; copies are made of the others."""
JOB_S = 2.0
"""Seconds that a job of the played sweep takes, as a tiny one does."""
AT_ONCE = 8
"""Processes that end at the same moment."""
MOST_PLAYED = 200
"""Jobs of the largest sweep that is played, and in which they do that."""
SEEDS = 3
"""Every such number of copies of `random` differ in the seed alone."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_TIMED = """<script>addEventListener("load", () => {
  document.body.getBoundingClientRect();
  document.title = `loaded ${performance.now()}`;
});</script>"""

COLUMNS: Columns = {
    "jobs": ("jobs", ""),
    "job end ms": ("job_end_ms", ".2f"),
    "refresh s": ("refresh_s", ".2f"),
    "publish, nothing known s": ("publish_new_s", ".1f"),
    "publish, one job more s": ("publish_s", ".1f"),
    "page MiB": ("page_bytes", mib),
    "browser s": ("browser_s", ".2f"),
    "8 at once s": ("at_once_s", ".1f"),
    "sweep s": ("sweep.all_s", ".1f"),
    "peak MiB": ("peak_mib", ".0f"),
}


def run(*, device: torch.device, jobs: list[int], samples: int) -> BenchResult:
    with tempfile.TemporaryDirectory() as home:
        templates = evaluate(Path(home), device, samples)
        rows = [measure(templates, Path(home) / f"study_{n}", n) for n in jobs]
    report = {"samples": samples, "job_s": JOB_S, "at_once": AT_ONCE, "selectors": list(SELECTORS), "rows": rows}
    notes = (
        f"CPU seconds of one process; sweep: every job's end and the last publishing, jobs of {JOB_S:g} s; 8 at once: "
        "wall seconds until the last of 8 commands that end at the same moment is done, start of Python included.",
    )
    return BenchResult(f"studies of tiny jobs on {samples} samples", report, table_of(rows, COLUMNS), notes)


def evaluate(home: Path, device: torch.device, samples: int) -> list[Path]:
    """Real jobs, one for each of `SELECTORS`; returns their folders in that order."""
    command = [sys.executable, str(CONF.parent / "eval.py"), "-m", f"selector={','.join(SELECTORS)}"]
    command += [f"limit={samples}", "study=real", f"device={device}", "threads=1"]
    subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)
    folders = {result["choices"]["selector"]: path for path, result in _records(home / "outputs" / "real")}
    return [folders[name] for name in SELECTORS]


def _records(study: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = [(path.parent, read_result(path.parent)) for path in study.glob(f"*/{RESULT}")]
    return [(folder, result) for folder, result in found if result is not None]


def plant(templates: Sequence[Path], study: Path, number: int) -> None:
    """Adds job `number` to a study; number 0 is the baseline as it was evaluated."""
    template = templates[0] if number == 0 else templates[1 + number % (len(templates) - 1)]
    result = read_result(template)
    assert result is not None
    config, words = json.loads(json.dumps(result["config"])), list(result["overrides"])
    if number:
        seeded = config["selector"].get("seed") is not None
        trial, seed = (number // SEEDS, number % SEEDS) if seeded else (number, 0)
        config["selector"]["trial"], config["seed"] = trial, seed
        words += [f"selector.trial={trial}", f"seed={seed}"]
    job = study / f"{template.name}_number-{number}"
    job.mkdir(parents=True)
    table, random = pq.read_table(template / SAMPLES), np.random.default_rng(number)
    score = f"score_{result['quality']['metric']}"
    right = random.random(table.num_rows) < random.uniform(0.3, 0.9)
    answers = np.where(right, [a[0] for a in table["answers"].to_pylist()], random.choice(list("abcdefgh"), len(right)))
    changed = {score: pa.array(right.astype(float)), "prediction": pa.array(answers)} if number else {}
    for name, values in changed.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, job / SAMPLES, compression="zstd")
    shutil.copytree(template / SHOTS, job / SHOTS, copy_function=os.link)
    record = {"study": study.name, "job": job.name, "config": config, "config_hash": config_hash(config)}
    quality = _quality(result["quality"], table, score) if number else result["quality"]
    write_json(job / RESULT, {**result, **record, "overrides": words, "quality": quality})


def _quality(quality: Mapping[str, Any], table: pa.Table, score: str) -> dict[str, Any]:
    """The section of a record with the means of these scores, in all and by subset."""
    values = table[score].to_pylist()
    names = [subset_name(*pair) for pair in zip(table["group"].to_pylist(), table["density"].to_pylist(), strict=True)]

    def mean(name: str | None) -> dict[str, float]:
        return asdict(estimate([v for v, other in zip(values, names, strict=True) if name in (None, other)]))

    metrics = {**quality["metrics"], quality["metric"]: mean(None)}
    return {**quality, "metrics": metrics, "subsets": {name: mean(name) for name in quality["subsets"]}}


def measure(templates: Sequence[Path], study: Path, n: int) -> dict[str, Any]:
    """One study: a small one first as a sweep of n jobs, then what single events cost in it."""
    played = n <= MOST_PLAYED
    sweep = _play(templates, study, n) if played else None
    for number in () if played else range(n):
        plant(templates, study, number)
    (study / memo.NAME).unlink(missing_ok=True)
    publish_new_s = _cpu_s(lambda: publish(study))
    job_end_ms = 1000 * min(_cpu_s(lambda: refresh_report(study)) for _ in range(20))
    plant(templates, study, n)
    (study / LAST_REFRESH).unlink()
    refresh_s = _cpu_s(lambda: refresh_report(study))
    publish_s = _cpu_s(lambda: publish(study))
    page = study / NAME
    return {
        "jobs": n,
        "sweep": sweep,
        "job_end_ms": job_end_ms,
        "refresh_s": refresh_s,
        "publish_s": publish_s,
        "publish_new_s": publish_new_s,
        "page_bytes": page.stat().st_size,
        "cache_bytes": (study / memo.NAME).stat().st_size,
        "browser_s": None if CHROMIUM is None else browser_s(page, study.parent / "browser"),
        "at_once_s": _at_once_s(study) if played else None,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _play(templates: Sequence[Path], study: Path, n: int) -> dict[str, float]:
    """CPU seconds of a sweep of n jobs, without the jobs themselves."""
    ends, refreshes = 0.0, 0
    for number in range(n):
        plant(templates, study, number)
        last = study / LAST_REFRESH
        if last.exists():
            earlier = last.stat().st_mtime - JOB_S
            os.utime(last, (earlier, earlier))
        before = last.stat().st_mtime if last.exists() else 0.0
        ends += _cpu_s(lambda: refresh_report(study))
        refreshes += last.stat().st_mtime != before
    publish_s = _cpu_s(lambda: publish(study))
    return {"ends_s": ends, "refreshes": refreshes, "publish_s": publish_s, "all_s": ends + publish_s}


def _cpu_s(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _at_once_s(study: Path) -> float:
    """Seconds until the last of several processes that end in the study at the same moment is done."""
    code = "import sys, pathlib; from experiments.report.publish import publish; publish(pathlib.Path(sys.argv[1]))"
    start = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(study)], cwd=CONF.parent, stdout=subprocess.DEVNULL)
        for _ in range(AT_ONCE)
    ]
    if any([process.wait() for process in processes]):
        raise RuntimeError("a process that published the study ended with an error")
    return time.monotonic() - start


def browser_s(page: Path, profile: Path) -> float:
    """Seconds of headless Chromium from opening the page until it is laid out, by the page's own clock.

    The copy that is opened has a script for that, which the page's policy would not run.
    """
    assert CHROMIUM is not None
    timed = page.with_name("timed.html")
    text = re.sub(r"<meta http-equiv=[^>]+>", "", page.read_text(), count=1)
    timed.write_text(text.replace("<head>", f"<head>{_TIMED}", 1))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --timeout=60000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", timed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    timed.unlink()
    found = re.search(r"<title>loaded ([\d.]+)</title>", html.unescape(done.stdout))
    assert found is not None, "the page was not loaded"
    return float(found[1]) / 1000
