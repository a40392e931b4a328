"""What the baselines refuse: UserError in one sentence, with these words in it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from baselines import (
    CDPruner,
    DivPrune,
    Full,
    HiPrune,
    HoloV,
    LlavaScissor,
    NormTopK,
    Oracle,
    OTPrune,
    Saint,
    SaintVote,
    ToMe,
    TopV,
    UniformGrid,
    VisionZip,
    VisPruner,
)
from baselines.pooled import pool
from shirg import Pooling
from tests.features import make_features
from tests.refusals import assert_says, message_of

FEATURES = make_features()

CASES: list[tuple[Callable[[], object], str]] = [
    (lambda: Full(newline="col"), "newline='col': choose one of none, row"),
    (lambda: NormTopK(budget=3, sign=0), "sign=0: choose one of -1, 1"),
    (lambda: CDPruner(budget=3, sign=2), "sign=2: choose one of -1, 1"),
    (lambda: CDPruner(budget=3, space="clip"), "space='clip': choose one of projected, encoder"),
    (lambda: DivPrune(budget=3, space="pre"), "space='pre': choose one of projected, encoder"),
    (lambda: UniformGrid(budget=3, scope="tile"), "scope='tile': choose one of per_view, global"),
    (lambda: Saint(budget=3, rho=0.0), "rho=0.0: give the share ... between 0 and 1"),
    (lambda: Saint(budget=3, schedule="fast"), "schedule='fast': choose one of alternating, constant"),
    (lambda: ToMe(budget=3, rho=1.0), "rho=1.0: give the share ... between 0 and 1"),
    (lambda: SaintVote(budget=3, tau=1.5), "tau=1.5, tau_step=0.05: give a cosine"),
    (lambda: SaintVote(budget=3, tau_step=0.0), "tau_step=0.0: ... a positive step of at most 2"),
    (lambda: LlavaScissor(budget=3, tau=1.5), "tau=1.5: give a cosine between -1 and 1, or null"),
    (lambda: LlavaScissor(budget=3, space="pixels"), "space='pixels': choose one of projected, encoder"),
    (lambda: SaintVote(budget=3, votes=0), "votes=0: give at least 1"),
    (lambda: ToMe(budget=3, order="raster"), "order='raster': choose one of official, reading"),
    (lambda: VisPruner(budget=3, important=1.2), "important=1.2: ... 0 to 1"),
    (lambda: VisPruner(budget=3, order="raster"), "order='raster': choose one of official, reading"),
    (lambda: VisionZip(budget=3, contextual=-0.1), "contextual=-0.1: ... 0 to 1"),
    (lambda: VisionZip(budget=3, targets="middle"), "targets='middle': choose one of official, centres"),
    (
        lambda: TopV(budget=3, marginals="free"),
        "marginals='free': choose one of norm, norm_cols_last, uniform, ",
    ),
    (lambda: TopV(budget=3, target="input"), "target='input': choose one of output, post_norm"),
    (lambda: TopV(budget=3, eps=0.5), "no effect with marginals=norm and importance=total, ... rank sources by their"),
    (lambda: TopV(budget=3, target="post_norm"), "target, alpha, ... have no effect ... choose another marginals"),
    (lambda: VisionZip(budget=3, contextual=0, targets="centres"), "targets has no effect with contextual=0"),
    (lambda: VisPruner(budget=3, important=1.0, rho=0.1), "rho and order have no effect with important=1"),
    (lambda: VisPruner(budget=3, important=1, order="reading"), "rho and order have no effect with important=1"),
    (lambda: VisPruner(budget=3, important=0, order="reading", layer=-2), "layer has no effect with important=0"),
    (lambda: TopV(budget=3, marginals="uniform", beta=0, sigma=1.0), "sigma has no effect with beta=0"),
    (lambda: HiPrune(budget=3, alpha=0.0, object_layer=-2), "object_layer has no effect with alpha=0"),
    (lambda: HiPrune(budget=3, alpha=1.1), "alpha=1.1: give the share ... 0 to 1"),
    (lambda: HoloV(budget=3, crops=0), "crops=0: give at least 1"),
    (lambda: HoloV(budget=3, rank_by="variance"), "rank_by='variance': choose one of attention, score"),
    (lambda: HoloV(budget=3, space="pixels"), "space='pixels': choose one of projected, encoder"),
    (lambda: OTPrune(budget=3, gamma=0.0), "gamma=0.0: give a number above 0"),
    (lambda: OTPrune(budget=3, space="pixels"), "space='pixels': choose one of projected, encoder"),
    (lambda: HoloV(budget=3, scope="tile"), "scope='tile': choose one of per_view, global"),
    (lambda: TopV(budget=3, importance="mine"), "importance='mine': choose one of total, own"),
    (lambda: TopV(budget=3, alpha=0, beta=0, gamma=0), "alpha=0, beta=0, gamma=0: give numbers >= 0"),
    (lambda: TopV(budget=3, eps=0.0), "eps=0.0, ... eps > 0"),
    (lambda: TopV(budget=3, recover=1.0), "recover=1.0: ... 0 <= recover < 1"),
    (
        lambda: pool(torch.zeros(1, 7, 7, 1), Pooling(side=4, mode="average")),
        "average pooling of 7 x 7 tokens with stride 1 gives 7 per side, not 4; set the pooled side to 7",
    ),
    (
        lambda: Oracle(budget=20)(replace(FEATURES, boxes=None)),
        "sample 'picture-0' has no boxes: pass boxes=",
    ),
    (
        lambda: Oracle(budget=20)(replace(FEATURES, boxes=(((0.1, 0.1, 0.2, 0.2),), ()))),
        "sample 'picture-1' has no boxes: pass boxes=",
    ),
]


@pytest.mark.parametrize(("call", "words"), CASES, ids=[words for _, words in CASES])
def test_it_is_refused(call: Callable[[], object], words: str) -> None:
    assert_says(message_of(call), words)
