"""The figures of a study: quality against cost and budget, differences, time, memory, overlap, tokens, training."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from experiments.analysis.columns import cost_cell, differences, doubts, headlines, mark_of, p_value
from experiments.analysis.memo import Memo, stamp
from experiments.analysis.paired import BASELINE, UNABLATED, other_name
from experiments.analysis.rows import MOST_DRAWN, Row, leading, unequal
from experiments.analysis.stats import ALPHA
from experiments.analysis.system_names import labels, short
from experiments.analysis.systems import Result
from experiments.analysis.table import StudyTable, parts, records
from experiments.jobs.results import SHOTS
from experiments.report.figure_style import (
    ACCENT,
    GRID,
    INK,
    MOST_PANELS,
    PALE,
    SOFT,
    STYLE,
    ReportFigure,
    legend_columns,
    log_axis,
    panels,
    round_log_ticks,
    top_legend,
    with_tip,
)
from experiments.report.overlap_matrix import overlap_matrix
from experiments.report.pareto import pareto
from experiments.report.score_bars import score_bars
from experiments.report.system_styles import SystemStyles
from experiments.training.callbacks import METRICS, read_points
from experiments.viz.examples import load_examples, printable
from experiments.viz.token_map import MAP, TokenMap, load_map, plane

MOST_MAPS = 4
MOST_MAPPED = 4
"""Pictures of token maps."""
MAP_WIDTH = 1.35
"""Inches, of the panel of one token map."""
TRAINED = "adapter=own"
LINES = ("-", "--", ":", "-.")
STAGES = {
    "views": GRID,
    "tower": PALE,
    "relevance": "#8d97a3",
    "select": ACCENT,
    "project": "#8fa9e4",
    "prefill": SOFT,
    "cache": "#738496",
    "denoise": INK,
}
"""Stages in the order in which they run, each with its colour."""
CURVES = ("loss", "accuracy")
"""What is drawn of a training."""
LOGARITHMIC = ("loss",)
"""Curves whose last part would be flat on a linear axis."""
MOST_NAMED = 12
"""Trainings that a legend names at most."""


def draw(table: StudyTable) -> list[ReportFigure]:
    """All figures that the study's table allows; rows over a part of the samples only where there are no others.

    Of a large study the leading systems are drawn: with all of them no figure could be read.
    """
    finished = [row for row in records(table.frame) if row["status"] == "ok"]
    whole = parts(finished)[0][1] if finished else []
    done = leading(whole, MOST_DRAWN)
    trained = [result["choices"]["selector"] for result in table.results.values() if result["verb"] == "train"]
    styles = SystemStyles(done, trained)
    with matplotlib.rc_context(STYLE):
        found = [
            score_bars(done, styles),
            pareto(done, styles, "total ms", "milliseconds per sample", "pareto_latency"),
            pareto(done, styles, "visual tokens mean", "vision tokens in the prefix", "pareto_tokens"),
            forest(done, styles, BASELINE),
            forest(done, styles, UNABLATED),
            budget_curve(done, styles),
            stages(done),
            memory(done),
            overlap_matrix(whole),
            token_maps(table.study, done, table.memo),
            training(table.results, styles),
        ]
    return [drawn for drawn in found if drawn is not None]


def budget_curve(rows: Sequence[Row], styles: SystemStyles) -> ReportFigure | None:
    """Quality over the number of tokens, one line for each selector that was evaluated at several budgets."""
    scores = [(title, key, part, curves) for title, key, part in headlines(rows) if (curves := _curves(part, key))]
    scores = scores[:MOST_PANELS]
    if not scores:
        return None
    figure, axes = panels(len(scores), 2, 1.9)
    entries: dict[str, Any] = {}
    names = dict.fromkeys(name for *_, curves in scores for name in curves)
    variants = list(dict.fromkeys(name.partition(" ")[2] for name in names))
    for panel, (title, key, part, curves) in zip(axes, scores, strict=True):
        base = next((row for row in part if row["selector"] == BASELINE and row.get(f"{key} mean") is not None), None)
        if base is not None:
            low, mean, high = (100 * base[f"{key} {edge}"] for edge in ("low", "mean", "high"))
            panel.axhline(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            panel.axhspan(low, high, color=GRID, alpha=0.5, linewidth=0)
        for name, line in curves.items():
            x = [row["visual tokens mean"] for row in line]
            lows, means, highs = ([100 * row[f"{key} {edge}"] for row in line] for edge in ("low", "mean", "high"))
            dashes = LINES[variants.index(name.partition(" ")[2]) % len(LINES)]
            tone, marker = styles.colour(line[0]["selector"]), styles.of(line[0]).marker
            (entries[name],) = panel.plot(
                x, means, color=tone, linestyle=dashes, marker=marker, markersize=3, linewidth=1.2
            )
            with_tip(entries[name], name)
            panel.vlines(x, lows, highs, color=tone, linewidth=0.9, alpha=0.5)
        panel.set_title(title, loc="left")
        log_axis(panel, [row["visual tokens mean"] for line in curves.values() for row in line])
    figure.supylabel("score, %", fontsize=7.5)
    figure.supxlabel("vision tokens in the prefix", fontsize=7.5)
    top_legend(figure, list(entries.values()), list(entries))
    caption = (
        f"Score over the token budget with 95 % intervals; a colour for each selector, a line style for each adapter "
        f"or other change; dashed: {BASELINE}, with its interval."
    )
    return ReportFigure("budget_curve", "Quality over the token budget", caption, figure)


def _curves(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Rows that differ in nothing but the budget, and in the adapter trained for it, from few tokens to many."""
    lines: dict[str, list[Row]] = {}
    shared = set.intersection(*(set(row["changes"].split()) for row in rows))
    for row in rows:
        changes = (change for change in row["changes"].split() if change not in shared)
        changes = (TRAINED if re.match(r"adapter=.*/", change) else change for change in changes)
        if row.get(f"{key} mean") is not None:
            lines.setdefault(" ".join((row["selector"], *map(short, changes))), []).append(row)
    return {
        name: sorted(line, key=lambda row: row["visual tokens mean"])
        for name, line in lines.items()
        if len({row["visual tokens mean"] for row in line}) > 1
    }


def forest(rows: Sequence[Row], styles: SystemStyles, against: str) -> ReportFigure | None:
    """Paired differences with their intervals, one line for each system."""
    deltas = [name for name in differences(rows) if other_name(name) == against]
    shown = [row for row in rows if any(row.get(f"delta {name} mean") is not None for name in deltas)]
    if not shown:
        return None
    figure, axes = panels(len(deltas), 3, 0.65 + 0.2 * len(shown), share_y=True)
    names = labels(shown)
    for panel, name in zip(axes, deltas, strict=True):
        panel.axvline(0, color=SOFT, linewidth=0.9)
        for i, row in enumerate(shown):
            if row.get(f"delta {name} mean") is None:
                continue
            low, mean, high = (100 * row[f"delta {name} {key}"] for key in ("low", "mean", "high"))
            p = row[f"delta {name} p holm"]
            style = replace(styles.of(row), hollow=p >= ALPHA)
            panel.plot([low, high], [i, i], color=style.colour, linewidth=1.3, marker="|", markersize=6)
            (point,) = panel.plot([mean], [i], markersize=4.5, **style.point)
            with_tip(point, f"{names[i]}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}], {p_value(p)} after Holm")
        panel.set_title(name, loc="left")
        panel.set_xlabel("points")
    name_bars(axes[0], shown)
    caption = (
        f"Differences to {'the whole method' if against == UNABLATED else against} on the same "
        "samples, in points, with 95 % intervals. Filled: p < 0.05 after Holm's correction over the systems."
    )
    title = "Ablations" if against == UNABLATED else f"Differences to {against}"
    return ReportFigure("ablations" if against == UNABLATED else "differences", title, caption, figure)


def stages(rows: Sequence[Row]) -> ReportFigure | None:
    """Where the time of a sample goes."""
    names = [s for s in STAGES if any(row.get(f"{s} ms") for row in rows)]
    shown = [row for row in rows if row.get("total ms") is not None]
    if not names or not shown:
        return None
    figure, (panel,) = panels(1, 1, 0.75 + 0.2 * len(shown))
    left = [0.0] * len(shown)
    names_of_rows = labels(shown)
    for name in names:
        width = [row.get(f"{name} ms") or 0.0 for row in shown]
        bars = panel.barh(range(len(shown)), width, left=left, height=0.66, color=STAGES[name], label=name)
        for bar, label, ms in zip(bars, names_of_rows, width, strict=True):
            with_tip(bar, f"{label}: {name} {ms:.3g} ms")
        left = [a + b for a, b in zip(left, width, strict=True)]
    for i, (row, stacked) in enumerate(zip(shown, left, strict=True)):
        total = row["total ms"]
        low, high = (row.get(f"total ms {edge}") or total for edge in ("q1", "q3"))
        between = f", half of the batches between {low:.3g} and {high:.3g}" if low < high else ""
        panel.plot([low, high], [i, i], color=INK, linewidth=0.9)
        (point,) = panel.plot([total], [i], "|", color=INK, markersize=7)
        with_tip(point, f"{names_of_rows[i]}: {total:.3g} ms in all{between}")
        text = f" {cost_cell(row, 'total ms', fine=True).main}"
        panel.text(max(stacked, high), i, text, va="center", color=SOFT, fontsize=7)
    name_bars(panel, shown)
    panel.set_xlabel("milliseconds per sample")
    figure.legend(loc="outside upper left", ncols=len(names), columnspacing=1.0, handlelength=1.0)
    caption = (
        "Where a sample's time goes, stage by stage: medians over batches after warm-up. The tick and the number: the "
        "median of all stages together, as in the table, which is not the sum of their medians; the line through it: "
        "half of the batches, where that is known."
    )
    caption += doubts(shown, "total ms")
    return ReportFigure("latency", "Latency by stage", caption, figure)


def memory(rows: Sequence[Row]) -> ReportFigure | None:
    """Peak memory of the accelerator, split into weights and all that comes on top; nothing on a CPU."""
    shown = [row for row in rows if row.get("peak memory MiB")]
    if not shown:
        return None
    figure, (panel,) = panels(1, 1, 0.75 + 0.2 * len(shown))
    weights = [row.get("weights MiB") or 0.0 for row in shown]
    rest = [row["peak memory MiB"] - w for row, w in zip(shown, weights, strict=True)]
    panel.barh(range(len(shown)), weights, height=0.66, color=STAGES["tower"], label="weights")
    panel.barh(range(len(shown)), rest, left=weights, height=0.66, color=ACCENT, label="prefix cache and activations")
    for i, row in enumerate(shown):
        text = f" {row['peak memory MiB']:.4g}{mark_of(row, 'peak memory MiB')}"
        panel.text(row["peak memory MiB"], i, text, va="center", color=SOFT, fontsize=7)
    name_bars(panel, shown)
    panel.set_xlabel("peak memory, MiB")
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1.0, handlelength=1.0)
    caption = "Peak memory allocated on the accelerator while answering, batch by batch."
    caption += doubts(shown, "peak memory MiB")
    return ReportFigure("memory", "Memory", caption, figure)


def name_bars(panel: Axes, rows: Sequence[Row]) -> None:
    """Systems down the y axis, the first on top."""
    panel.set_yticks(range(len(rows)), labels(rows))
    panel.tick_params(axis="y", labelcolor=INK)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)


def token_maps(study: Path, rows: Sequence[Row], memo: Memo) -> ReportFigure | None:
    """The tokens of a few pictures in two dimensions: those that each system kept and those that it dropped."""
    maps: dict[tuple[str, int], dict[str, tuple[Path, TokenMap]]] = {}
    questions: dict[tuple[str, int], str] = {}
    # Equal budgets first: a larger budget keeps more tokens whatever it prefers.
    for row, label in sorted(zip(rows, labels(rows), strict=True), key=lambda pair: unequal(pair[0])):
        for example in load_examples(study / row["job"] / SHOTS):
            path = study / row["job"] / SHOTS / MAP.format(example.number)
            if path.exists() and row.get("kept tokens") and row["selector"] != "full":
                tokens = load_map(path)
                # Another geometry makes other tokens of the same picture.
                picture = (example.record["id"], len(tokens.kept_N))
                maps.setdefault(picture, {})[label] = (path, tokens)
                questions[picture] = example.record["question"]
    shown = {picture: list(of_row.items())[:MOST_MAPS] for picture, of_row in maps.items() if len(of_row) > 1}
    shown = dict(list(shown.items())[:MOST_MAPPED])
    if not shown:
        return None
    across = max(map(len, shown.values()))
    figure, axes = panels(across * len(shown), across, MAP_WIDTH)
    method = ""
    for number, views in enumerate(shown.values()):
        # One plane for all: the vision tower is the same, only the selection differs.
        position_N2, method = known_plane(*views[0][1], memo)
        row_axes = axes[number * across : (number + 1) * across]
        row_axes[0].set_ylabel(f"picture {number + 1}", fontsize=7)
        for panel, (label, (_, tokens)) in zip(row_axes, views, strict=False):
            for kept, tone, size in ((False, PALE, 2), (True, ACCENT, 5)):
                part_K2 = position_N2[tokens.kept_N == kept]
                panel.scatter(part_K2[:, 0], part_K2[:, 1], s=size, color=tone, linewidths=0)
            panel.set_title(label, fontsize=7)
            panel.set_xticks([])
            panel.set_yticks([])
        for unused in row_axes[len(views) :]:
            unused.remove()
    asked = "; ".join(f"{n}: {printable(questions[picture])}" for n, picture in enumerate(shown, 1))
    caption = (
        f"Each dot is a vision token of one picture ({method}); blue: kept, grey: dropped. All panels of a row have "
        f"the same positions: those of the first system's tower. Questions: {asked}."
    )
    return ReportFigure("tokens", "Kept and dropped tokens", caption, figure)


def known_plane(path: Path, tokens: TokenMap, memo: Memo) -> tuple[np.ndarray, str]:
    """`plane` of the tokens in a file; t-SNE takes seconds, and is computed once for each file."""

    def compute() -> tuple[list[list[float]], str]:
        position_N2, method = plane(tokens)
        return position_N2.tolist(), method

    positions, method = memo.get("plane", [stamp(path), find_spec("sklearn") is not None], compute)
    return np.asarray(positions), method


def training(results: Mapping[Path, Result], styles: SystemStyles) -> ReportFigure | None:
    """One line for each training with points in metrics.csv, also unfinished ones, up to `MOST_DRAWN`."""
    trained = [(f, result) for f, result in results.items() if result["verb"] == "train" and (f / METRICS).exists()]
    runs = {}
    for folder, result in trained[:MOST_DRAWN]:
        if points := read_points(folder / METRICS):
            runs[folder.name.removeprefix("train_")] = (result["choices"]["selector"], points)
    names = [name for name in CURVES if any(name in point for _, points in runs.values() for point in points)]
    if not names:
        return None
    figure, axes = panels(len(names), 2, 2.1)
    for panel, name in zip(axes, names, strict=True):
        used: dict[str, int] = {}
        for run, (selector, points) in runs.items():
            tone = styles.colour(selector)
            used[tone] = used.get(tone, -1) + 1
            known = [(point["step"], point[name]) for point in points if name in point]
            x, y = ([pair[i] for pair in known] for i in (0, 1))
            (line,) = panel.plot(x, y, color=tone, linestyle=LINES[used[tone] % len(LINES)], linewidth=1.1, label=run)
            with_tip(line, run)
        panel.set_title(name, loc="left")
        panel.set_xlabel("step")
        if (
            name in LOGARITHMIC
            and min(point[name] for _, points in runs.values() for point in points if name in point) > 0
        ):
            panel.set_yscale("log")
            round_log_ticks(panel)
    handles, entries = axes[0].get_legend_handles_labels()
    if len(entries) <= MOST_NAMED:
        figure.legend(handles, entries, loc="outside upper left", ncols=legend_columns(entries))
    caption = "Each point is the mean since the point before; the loss is on a logarithmic axis."
    if len(trained) > MOST_DRAWN:
        caption += f" The first {MOST_DRAWN} of {len(trained)} trainings."
    return ReportFigure("training", "Training", caption, figure)
