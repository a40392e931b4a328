"""Curves of the trainings of a study: loss over steps, and accuracy where it was logged."""

from pathlib import Path

from experiments.report.plot import ACCENT, INK, SOFT, ReportFigure, legend_columns, panels
from experiments.study.compare import BASELINE
from experiments.study.record import RESULT, read_result
from experiments.training.history import METRICS, read_points

SHOWN = ("loss", "accuracy")
STYLES = ("-", "--", ":", "-.")
MOST_NAMED = 12


def training(study: Path) -> ReportFigure | None:
    """One line for each training that left points, unfinished ones among them."""
    runs = {}
    for path in sorted(study.glob(f"*/{RESULT}")):
        result, metrics = read_result(path.parent), path.parent / METRICS
        if result is not None and result["verb"] == "train" and metrics.exists() and (points := read_points(metrics)):
            runs[path.parent.name.removeprefix("train_")] = (result["choices"]["selector"], points)
    names = [name for name in SHOWN if any(name in point for _, points in runs.values() for point in points)]
    if not names:
        return None
    figure, axes = panels(len(names), 2, 2.1)
    for panel, name in zip(axes, names, strict=True):
        used: dict[str, int] = {}
        for run, (selector, points) in runs.items():
            tone = ACCENT if selector.startswith("shirg") else INK if selector == BASELINE else SOFT
            used[tone] = used.get(tone, -1) + 1
            known = [(point["step"], point[name]) for point in points if name in point]
            x, y = ([pair[i] for pair in known] for i in (0, 1))
            panel.plot(x, y, color=tone, linestyle=STYLES[used[tone] % len(STYLES)], linewidth=1.1, label=run)
        panel.set_title(name, loc="left")
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
    handles, told = axes[0].get_legend_handles_labels()
    if len(told) <= MOST_NAMED:
        figure.legend(handles, told, loc="outside upper left", ncols=legend_columns(told))
    caption = "Each point is the mean since the one before. Blue: SHIRG and its variants; black: pooled."
    return ReportFigure("training", "Training", caption, figure)
