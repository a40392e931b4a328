"""The rows of a study: one flat, versioned row for each evaluation job, read from its result.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.study.record import LOCK, RESULT, SAMPLES, read_result
from experiments.study.samples import read_scores
from experiments.study.stats import paired_delta

ROW_VERSION = 1
_SHOWN_ELSEWHERE = frozenset({"selector", "budget", "data", "limit", "study", "threads", "logger", "shots"})
_GROUPS = ("model", "selector", "relevance", "data", "decode", "cache")
BASELINE = "pooled"
_FIRST = {BASELINE: 0, "full": 1}

Row = dict[str, Any]


def collect(study: Path) -> list[Row]:
    """One flat row for each evaluation job: the baselines first, then by name."""
    results = {path.parent: result for path in study.glob(f"*/{RESULT}") if (result := read_result(path.parent))}
    results = {folder: result for folder, result in results.items() if result["verb"] == "eval"}
    rows = []
    for folder, result in results.items():
        row = flatten(result)
        if row["status"] == "running" and not _is_alive(folder):
            row["status"] = "stopped"
        baseline = _baseline(folder, results)
        if baseline is not None:
            row |= _deltas(folder, baseline, result["quality"]["metric"])
        rows.append(row)
    return sorted(rows, key=lambda row: (row["data"], _FIRST.get(row["selector"], 2), row["job"]))


def flatten(result: Mapping[str, Any]) -> Row:
    """identity | quality | cost | environment of a result, in one flat row."""
    quality, tokens, times = result.get("quality", {}), result.get("tokens", {}), result.get("times", {})
    row: Row = {
        "version": ROW_VERSION,
        "study": result["study"],
        "job": result["job"],
        "status": result["status"],
        "reason": result["reason"],
        "note": _note(result),
        **{group: result["choices"].get(group) for group in _GROUPS},
        "budget": _budget(result),
        "changes": _changes(result),
        "seed": result["config"].get("seed"),
        "config_hash": result["config_hash"],
        "command": result["command"],
        "n": result.get("data", {}).get("n"),
        "dataset": result.get("data", {}).get("name"),
        "metric": quality.get("metric"),
        "metrics": " ".join(quality.get("metrics", {})),
    }
    for kind, group in (("", quality.get("metrics", {})), ("subset ", quality.get("subsets", {}))):
        for name, value in group.items():
            for key in ("mean", "low", "high", "n") if value else ():
                row[f"{kind}{name} {key}"] = value[key]
    if quality.get("recall"):
        row |= {f"recall {key}": quality["recall"][key] for key in ("mean", "low", "high", "n")}
    for name, spread in tokens.items():
        if spread is None:
            continue
        row |= {f"{name} tokens {key}" if name != "by_source" else f"{key} tokens": v for key, v in spread.items()}
    row |= {f"{stage} ms": ms for stage, ms in times.get("ms_per_sample", {}).items()}
    row["peak memory MiB"] = times.get("peak_memory_mib")
    row["trainable parameters"] = result.get("model", {}).get("trainable_parameters")
    return row | {f"env {key}": value for key, value in result.get("environment", {}).items()}


def _is_alive(folder: Path) -> bool:
    """Whether a process holds the job's lock."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _baseline(folder: Path, results: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    """The pooled job that answered the same questions with the same model and decoding; one without adapter first."""
    result = results[folder]
    if result["status"] != "ok":
        return None
    candidates = [
        (other["config"]["adapter"] is not None, other["job"], path)
        for path, other in results.items()
        if other["status"] == "ok"
        and other["choices"]["selector"] == BASELINE
        and other["choices"].get("cache", "none") == "none"
        and all(other["config"][key] == result["config"][key] for key in ("model", "decode", "data"))
        and other["data"]["ids"] == result["data"]["ids"]
    ]
    best = min(candidates)[2] if candidates else None
    return None if best == folder else best


def _deltas(folder: Path, baseline: Path, metric: str) -> Row:
    """Paired differences to the baseline, over all samples and within each group of questions."""
    ours, theirs = (read_scores(path / SAMPLES, metric) for path in (folder, baseline))
    row: Row = {}
    for group in ("", *dict.fromkeys(score.group for score in ours.values() if score.group)):
        mine = {i: score.value for i, score in ours.items() if group in ("", score.group)}
        pictures = {i: ours[i].picture for i in mine}
        delta = paired_delta(mine, {i: score.value for i, score in theirs.items()}, pictures)
        if delta is not None:
            name = f"{group} vs {BASELINE}".strip()
            row |= {f"delta {name} {key}": getattr(delta, key) for key in ("mean", "low", "high")}
    return row


def _note(result: Mapping[str, Any]) -> str:
    notes = []
    if result.get("model", {}).get("trained") is False:
        notes.append("untrained model")
    for limit in (result["config"]["limit"], result["config"]["data"].get("limit")):
        if limit is not None:
            notes.append(f"limited to {limit} samples")
    return "; ".join(notes)


def _budget(result: Mapping[str, Any]) -> str:
    """The number behind the budget's name, the selector's first, then the cache's; empty where neither has one."""
    shown = []
    for group in ("selector", "cache"):
        asked, given = result["config"].get(group, {}).get("budget"), (result.get(group) or {}).get("budget")
        if asked is not None:
            shown.append(f"{asked} ({given})" if given not in (None, asked) else str(asked))
    return ", cache ".join(dict.fromkeys(shown))


def _changes(result: Mapping[str, Any]) -> str:
    """Overrides that have no column of their own."""
    return " ".join(o for o in result["overrides"] if o.lstrip("+~").partition("=")[0] not in _SHOWN_ELSEWHERE)
