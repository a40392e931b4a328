"""Figures of what a system costs: time by stage, memory."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from experiments.report.plot import ACCENT, GRID, INK, PALE, SOFT, ReportFigure, panels
from experiments.study.cells import flags
from experiments.study.layout import labels
from experiments.study.rows import Row

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
"""Stages in the order in which they happen: the encoder pale, the choice in the accent, the language model strong."""


def stages(rows: Sequence[Row]) -> ReportFigure | None:
    """Where the time of a sample goes."""
    names = [s for s in STAGES if any(row.get(f"{s} ms") for row in rows)]
    shown = [row for row in rows if row.get("total ms") is not None and not flags(row)]
    if not names or not shown:
        return None
    figure, (panel,) = panels(1, 1, 0.75 + 0.2 * len(shown))
    left = [0.0] * len(shown)
    for name in names:
        width = [row.get(f"{name} ms") or 0.0 for row in shown]
        panel.barh(range(len(shown)), width, left=left, height=0.66, color=STAGES[name], label=name)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for i, total in enumerate(left):
        panel.text(total, i, f" {total:.3g}", va="center", color=SOFT, fontsize=7)
    name_bars(panel, shown)
    panel.set_xlabel("milliseconds per sample (medians of the stages, one on the other)")
    figure.legend(loc="outside upper left", ncols=len(names), columnspacing=1.0, handlelength=1.0)
    caption = "Where a sample's time goes, stage by stage: medians over batches after warm-up."
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
        panel.text(row["peak memory MiB"], i, f" {row['peak memory MiB']:.4g}", va="center", color=SOFT, fontsize=7)
    name_bars(panel, shown)
    panel.set_xlabel("peak memory, MiB")
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1.0, handlelength=1.0)
    caption = "Peak memory allocated on the accelerator while answering, batch by batch."
    return ReportFigure("memory", "Memory", caption, figure)


def name_bars(panel: Axes, rows: Sequence[Row]) -> None:
    """Systems down the y axis, the first on top."""
    panel.set_yticks(range(len(rows)), labels(rows))
    panel.tick_params(axis="y", labelcolor=INK)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
