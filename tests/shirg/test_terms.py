"""Several rows about one picture: its grids are looked at once, and nothing else changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from shirg import ShirgSelector, VisionFeatures, scoring
from tests.features import features_for

ROWS = (0, 1, 0, 0, 1)
"""The picture of each row; what is asked about it differs."""
KNOBS: list[dict[str, Any]] = [
    {"weights": {"neighbor": 0.25}},
    {"weights": {"neighbor": 0.25}, "views": "all"},
    {"weights": {"neighbor": 0.0, "variance": 0.5}, "variance_of": "neighbourhood"},
    {"weights": {"neighbor": 0.25}, "geometry": "seed_canvas48", "scaffold": {"size": 0}},
    {"weights": {"neighbor": 0.25}, "geometry": "seed_canvas48", "scaffold": {"size": 0}, "dedup": "border"},
]


def asked(selector: ShirgSelector) -> VisionFeatures:
    """Two pictures, one of them with padding, and five questions about them."""
    pictures = features_for(selector, sizes=((640, 480), (2480, 3508)))
    rows = torch.tensor(ROWS)
    picked = {name: getattr(pictures, name)[rows] for name in ("tokens_BND", "valid_BN", "picture_B4", "size_B2")}
    base = pictures.base_count_B
    return replace(
        pictures,
        **picked,
        ids=tuple(f"question-{i}" for i in range(len(ROWS))),
        n_valid=tuple(pictures.n_valid[i] for i in ROWS),
        relevance_BN=torch.randn(len(ROWS), pictures.layout.n_tokens, generator=torch.Generator().manual_seed(5)),
        base_count_B=None if base is None else base[rows],
        taps={name: tap[rows] for name, tap in pictures.taps.items()},
        boxes=None,
    )


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_a_picture_is_looked_at_once_and_nothing_changes(
    knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = ShirgSelector(budget=60, **knobs)
    features, looks = asked(selector), []
    real = scoring._on_grids_of_one
    monkeypatch.setattr(scoring, "_on_grids_of_one", lambda *args: (looks.append(1), real(*args))[1])
    expected = selector(features)
    assert len(looks) == len(ROWS)
    found = selector(replace(features, picture_at=ROWS))
    for name in ("tokens_BTD", "index_BT", "source_BT", "mask_BT", "scores_BN"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    by_question = "geometry" in knobs  # who sits in a shared cell may depend on the question
    assert len(looks) == len(ROWS) + (len(ROWS) if by_question else 2)
    assert not torch.equal(found.index_BT[0], found.index_BT[2]), "the question still decides"
