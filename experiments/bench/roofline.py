"""`python -m experiments.bench.roofline FILE ...`: the tables of the GPU bench, with each time over its floor.

The floor of a stage is its least work divided by the device's limits: bytes by the rate of a large copy, operations by
that of a large matrix product. Limits were measured before and after the rows; the better of both counts. A time below
its floor is shown with an exclamation mark: the limits or the time are wrong then. "gate %" is relevance and selection
over the tower. Ratios are medians over the turns.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.profiling import NOISE, Limits, Work, suspicion

STAGES = ("tower", "relevance", "select", "project", "prefill", "step", "denoise", "wall")
Row = Mapping[str, Any]


def better(first: Row, second: Row | None) -> Limits:
    """The higher of two measurements of each limit."""
    limits = Limits.of(first)
    return limits if second is None else limits.better(Limits.of(second))


def times_floor(row: Row, stage: str, limits: Limits) -> float | None:
    """The stage's time over its floor, the median over the turns; None where its work is not known."""
    times = row.get("ms_all", {}).get(stage, ())
    works = [turn.get("work", {}).get(stage) for turn in row.get("turns") or [row] * len(times)]
    found = [ms / limits.floor_ms(Work(*least)) for ms, least in zip(times, works, strict=True) if least is not None]
    return statistics.median(found) if found else None


def over_base(row: Row, base: Row | None) -> float | None:
    """The whole time over that of the base, turn by turn on the same picture: the median."""
    if base is None:
        return None
    return statistics.median(a / b for a, b in zip(row["ms_all"]["wall"], base["ms_all"]["wall"], strict=False))


def gate_percent(row: Row) -> float:
    """Relevance and selection in % of the tower, the median over the turns."""
    stages = (row["ms_all"].get(stage, [0.0] * row["n"]) for stage in ("relevance", "select", "tower"))
    return statistics.median(100 * (r + s) / tower for r, s, tower in zip(*stages, strict=True))


def visual_tokens(row: Row) -> str:
    counts = [turn["visual_tokens"] for turn in row.get("turns") or [row]]
    return f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else str(counts[0])


def show(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def ratio(value: float | None) -> str:
    return show(value) + ("!" if value is not None and suspicion(value, 1.0) else "")


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]


def systems_table(rows: Sequence[Row], limits: Limits) -> list[str]:
    """Milliseconds of a batch by stage, and the whole over B0's with the same engine and batch."""
    base = {(r["engine"], r["batch"]): r for r in rows if r["name"] == "B0"}
    floors = ("tower", "prefill", "step")
    table = [["engine", "B", "system", "tokens", "n", *STAGES, *(f"{s} x" for s in floors), "gate %", "wall/B0", "GiB"]]
    for row in rows:
        peak = row.get("peak_mib")
        table.append(
            [
                row["engine"],
                str(row["batch"]),
                row["name"],
                visual_tokens(row),
                str(row["n"]),
                *(show(row["ms"].get(stage)) for stage in STAGES),
                *(ratio(times_floor(row, stage, limits)) for stage in floors),
                show(gate_percent(row)),
                show(over_base(row, base.get((row["engine"], row["batch"]))), ".3f"),
                show(None if peak is None else peak / 1024, ".1f"),
            ]
        )
    return aligned(table)


def parts_table(rows: Sequence[Row], limits: Limits) -> list[str]:
    """One line for each time of the other parts."""
    table = [["part", "engine", "B", "name", "what", "n", "ms", "x floor", "more"]]
    for row in rows:
        more = {k: v for k, v in row.items() if k in ("same", "largest_difference", "from_twin", "prefix", "kept")}
        more |= {k: v for k, v in row.items() if k in ("relative_error", "same_token", "first_call_s", "peak_mib")}
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        for stage, ms in (row.get("ms") or {"": None}).items():
            name = [row["part"], row.get("engine", "-"), str(row.get("batch", "-")), row.get("name", "-"), stage]
            times = times_floor(row, stage, limits)
            table.append([*name, str(row.get("n", "-")), show(ms, ".4f"), ratio(times), shown])
    return aligned(table)


def lines(found: Row) -> list[str]:
    """The tables of one file, and what failed."""
    machine, rows = found["machine"], found["rows"]
    limits = better(found["limits_before"], found.get("limits_after"))
    done = [r for r in rows if "error" not in r and "skipped" not in r]
    systems = [r for r in done if r["part"] == "systems"]
    others = [r for r in done if r["part"] != "systems"]
    out = [
        f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}, "
        + ", ".join(f"{k} {v}" for k, v in found["sizes"].items()),
        f"copy {limits.fastest_copy / 1e12:.2f} TB/s, products {limits.matmul / 1e12:.0f} TFLOP/s; ms of a batch",
    ]
    out += systems_table(systems, limits) if systems else []
    out += parts_table(others, limits) if others else []
    if any("!" in line for line in out[2:]):
        out.append(f"!: below its floor by more than {NOISE:.0%}, which is noise: the time or the limits are wrong")
    for row in others:
        out += [f"{row['name']}: {ms:.3f} ms, {n} x {kernel}" for kernel, ms, n in row.get("kernels", ())]
    for row in rows:
        if "error" in row or "skipped" in row:
            name = " ".join(str(row[k]) for k in ("part", "engine", "batch", "name") if k in row)
            out.append(f"NOT MEASURED {name}: {row.get('error') or row.get('skipped')}")
    return out


def main(paths: Sequence[str]) -> None:
    for path in paths:
        print(f"\n{path}")
        print("\n".join(lines(json.loads(Path(path).read_text()))))


if __name__ == "__main__":
    main(sys.argv[1:])
