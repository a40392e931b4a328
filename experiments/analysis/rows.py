"""A study's row: one flat, versioned record for each evaluated system, read from the result.json of its jobs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.analysis.systems import POSITION, RunGroup, seed_columns, without_seed
from experiments.jobs.results import LOCK
from experiments.jobs.sample_rows import SPREADS

ROW_VERSION = 2
_SHOWN_ELSEWHERE = frozenset(
    {"selector", "budget", "selector.budget", "data", "limit", "study", "seed", "threads", "workers", "logger", "shots"}
)
_NOTHING = frozenset({"experiment=none", "ablation=none", "context=none", "adapter=null"})
_READ = ("selector", "data", "dataset", "budget", "changes", "n", "note")
"""By what people tell the rows of a table apart."""
_GROUPS = ("model", "selector", "context", "relevance", "data", "decode", "cache", "experiment", "ablation")

MOST_DRAWN = 40
"""Systems that a figure shows."""

Row = dict[str, Any]
"""identity | quality | cost | environment of one system: the columns of table.csv by name. A column that a system has
no value for is absent or None."""


def group_row(group: RunGroup) -> Row:
    """The row of one job, or of the jobs of one config with several seeds."""
    row = flatten(group.result) | seed_columns(group)
    row["seeds"] = " ".join(group.all_seeds)
    row["seeds equal"] = group.seeds_equal
    row["jobs"] = " ".join(result["job"] for result in group.results)
    row["config_hash"] = " ".join(result["config_hash"] for result in group.results)
    row["command"] = "\n".join(result["command"] for result in group.results)
    row["flags"] = _flags_text(group.results)
    if len(group.results) > 1:
        row["changes"] = without_seed(row["changes"])
    if row["status"] == "running" and not _is_alive(group.folders[0]):
        row["status"] = "stopped"
    return row


def name_seeds(groups: Sequence[RunGroup], rows: Sequence[Row]) -> None:
    """Adds the seeds to the changes of rows that would read the same: of jobs whose samples were drawn with them."""
    alike: dict[tuple[object, ...], list[tuple[str, Row]]] = defaultdict(list)
    for group, row in zip(groups, rows, strict=True):
        seeds = ",".join(dict.fromkeys(str(result["config"].get("seed")) for result in group.results))
        alike[tuple(row[name] for name in _READ)].append((seeds, row))
    for named in alike.values():
        if len({seeds for seeds, _ in named}) > 1:
            for seeds, row in named:
                row["changes"] = f"{row['changes']} seed={seeds}".strip()


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
        **{name: result["choices"].get(name) for name in _GROUPS},
        "budget": _budget(result),
        "changes": _changes(result),
        "n": result.get("data", {}).get("n"),
        "of": result.get("data", {}).get("of"),
        "limited": bool(_limits(result)) or result["config"].get("shards", 1) > 1,
        "ids": result.get("data", {}).get("ids"),
        "prompt": result.get("data", {}).get("prompt"),
        "dataset": result.get("data", {}).get("name"),
        "metric": quality.get("metric"),
        "metrics": " ".join(quality.get("metrics", {})),
    }
    for kind, section in (("", "metrics"), ("group ", "groups"), ("subset ", "subsets"), ("subtask ", "subtasks")):
        for name, value in quality.get(section, {}).items():
            for key in ("mean", "low", "high", "n") if value else ():
                row[f"{kind}{name} {key}"] = value[key]
    for name, facts in quality.get("corpora", {}).items():
        row |= {f"{name} {key}": facts[key] for key in ("ceiling", "normalised", "reference_tokens", "tokeniser")}
    for name, value in (quality.get("probe") or {}).items():
        if name.startswith("disc") and value["all"]:
            row |= {f"{name} {key}": value["all"][key] for key in ("mean", "low", "high", "relative")}
    if quality.get("recall"):
        row |= {f"recall {key}": quality["recall"][key] for key in ("mean", "low", "high", "n")}
    row |= _kept(result)
    for name, spread in tokens.items():
        if spread is None:
            continue
        row |= {f"{name} tokens {key}" if name != "by_source" else f"{key} tokens": v for key, v in spread.items()}
    decoding = result.get("decoding", {})
    row |= {f"steps {key}": value for key, value in decoding.get("steps", {}).items()}
    row |= {key.replace("_", " "): decoding.get(key) for key in ("cache_bytes", "drift", "same_top1")}
    row |= _times(times)
    row["flags"] = _flags_text([result])
    row["peak memory MiB"] = times.get("peak_memory_mib")
    row["weights MiB"] = _weights_mib(result)
    row["lora rank"] = result.get("model", {}).get("lora_rank")
    row["trainable parameters"] = result.get("model", {}).get("trainable_parameters")
    return row | {f"env {key}": value for key, value in result.get("environment", {}).items()}


def _times(times: Mapping[str, Any]) -> Row:
    """Milliseconds of each stage; older results have no quartiles."""
    row = {f"{stage} ms": ms for stage, ms in times.get("ms_per_sample", {}).items()}
    for stage, (low, high) in times.get("ms_quartiles", {}).items():
        row |= {f"{stage} ms q1": low, f"{stage} ms q3": high}
    return row | {"waited": times.get("waited")}


def _kept(result: Mapping[str, Any]) -> Row:
    """How what is kept is spread over the pictures; nothing for results from before this was measured."""
    selection = result.get("selection", {})
    row: Row = {}
    for name in SPREADS:
        if found := selection.get(name):
            row |= {f"{name} {key}": found[key] for key in ("mean", "low", "high", "n")}
    return row | {POSITION: selection.get("position_gini")}


def _flags_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The column "flags" of the jobs of a row: which of its figures are suspicious, and why."""
    found: dict[str, str] = {}
    for result in results:
        found |= result.get("times", {}).get("flags", {})
    if any(column.endswith(" ms") for column in found):
        found["total ms"] = "one of its stages is below its floor"
    return "; ".join(f"{column}: {why}" for column, why in found.items())


def flags(row: Row) -> dict[str, str]:
    """Columns of a row whose value is suspicious, and why (experiments.profiling)."""
    return dict(flag.split(": ", 1) for flag in row["flags"].split("; ") if flag)


def unequal(row: Row) -> bool:
    """Whether a row has another token budget than the row it is compared to."""
    return row.get("budget ratio") not in (None, 1.0)


def our_row(rows: Sequence[Row]) -> Row | None:
    """The whole method with the highest score, at an equal budget where there is one."""
    family = [row for row in rows if row["status"] == "ok" and row["selector"].startswith("shirg")]
    whole = [row for row in family if row.get("ablation") in (None, "none")]
    return max(whole, key=lambda row: (not unequal(row), row.get(f"{row['metric']} mean") or 0.0), default=None)


def leading(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of the rows, in their order: those that others are compared to, then the highest scores."""
    bases = {job for row in rows for key, job in row.items() if key.startswith("compared to ")}

    def place(row: Row) -> tuple[bool, float]:
        return row["job"] not in bases, -(row.get(f"{row['metric']} mean") or 0.0)

    chosen = {row["job"] for row in sorted(rows, key=place)[:most]}
    return [row for row in rows if row["job"] in chosen]


def _weights_mib(result: Mapping[str, Any]) -> float | None:
    if "model" not in result:
        return None
    return result["model"]["parameters"] * (4 if result["config"]["dtype"] == "float32" else 2) / 2**20


def _is_alive(folder: Path) -> bool:
    """Whether a process holds the job's lock."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _note(result: Mapping[str, Any]) -> str:
    notes = []
    if result.get("model", {}).get("trained") is False:
        notes.append("untrained model")
    if result["config"].get("shards", 1) > 1:
        notes.append(f"shard {result['config']['shard']} of {result['config']['shards']}")
    notes += [f"limited to {limit} samples" for limit in _limits(result)]
    if stamp := result.get("times", {}).get("rescored"):
        notes.append(f"rescored {stamp.partition('T')[0]}")
    return "; ".join(notes)


def _limits(result: Mapping[str, Any]) -> list[int]:
    """The limits of a job; scores over a part of the samples are shown apart from scores over all."""
    data, limits = result.get("data", {}), [result["config"]["data"].get("limit")]
    if not data or data["n"] < data["of"]:
        limits.append(result["config"].get("limit"))
    return [limit for limit in limits if limit is not None]


def _budget(result: Mapping[str, Any]) -> str:
    """The budget's name and number, the selector's first, then the cache's; empty where neither has one."""
    shown = []
    for kind in ("selector", "cache"):
        asked, given = result["config"].get(kind, {}).get("budget"), (result.get(kind) or {}).get("budget")
        if asked is not None:
            shown.append(f"{asked} ({given})" if given not in (None, asked) else str(asked))
    return ", cache ".join(dict.fromkeys(shown))


def _changes(result: Mapping[str, Any]) -> str:
    """Overrides that have no column of their own."""
    shown = [o for o in result["overrides"] if o.lstrip("+~").partition("=")[0] not in _SHOWN_ELSEWHERE]
    return " ".join(o for o in shown if o not in _NOTHING)
