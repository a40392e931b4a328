"""Token maps: what is stored of a picture's tokens, and the figure that is drawn from it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.analysis.memo import Memo
from experiments.analysis.table import collect
from experiments.report.figures import token_maps
from experiments.viz.token_map import MAP, MAPS, load_map

Eval = Callable[..., Path]


def test_tokens_of_a_picture_are_stored_whichever_sample_asked_first(eval_here: Eval) -> None:
    """SAINT selects once for all questions about a picture, SHIRG once for each question."""
    words = ("model=tiny", "device=cpu", "data.n=48", "batch_size=16", "shots=2")
    jobs = [eval_here(*words, f"selector={selector}") for selector in ("saint", "random", "shirg")]
    for number in range(MAPS):
        first, *others = (load_map(job / "shots" / MAP.format(number)) for job in jobs)
        assert all(np.array_equal(first.components_NC, other.components_NC) for other in others)
    (jobs[0] / "shots" / MAP.format(1)).unlink()
    figure = token_maps(jobs[0].parent, collect(jobs[0].parent), Memo())
    assert figure is not None
    axes = figure.figure.axes
    assert len(axes) == 5 and all(axis.collections for axis in axes), "a panel without tokens"
