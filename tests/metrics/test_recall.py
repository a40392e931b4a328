"""Entity-token recall on layouts small enough to count by hand."""

import pytest
import torch
from torch import Tensor

from experiments.metrics import entity_recall
from experiments.metrics.recall import target_tokens


def grid(side: int) -> Tensor:
    """Boxes [side*side, 4] of a grid over the whole picture, row by row."""
    cells = [(c / side, r / side, (c + 1) / side, (r + 1) / side) for r in range(side) for c in range(side)]
    return torch.tensor(cells)


TOKENS = torch.cat([grid(2), grid(4)])
"""A global view of 4 tokens, then a canvas of 16."""
TILES = torch.arange(20) >= 4


def recall(boxes: list[tuple[float, ...]], kept: list[int], eligible: Tensor = TILES) -> float | None:
    return entity_recall(boxes=boxes, token_box_N4=TOKENS, eligible_N=eligible, kept_T=torch.tensor(kept))


def test_the_share_of_target_tokens_kept() -> None:
    left_half_of_the_top = [(0.0, 0.0, 0.5, 0.5)]  # tokens 4, 5, 8, 9
    assert recall(left_half_of_the_top, [4, 5, 8, 9]) == 1
    assert recall(left_half_of_the_top, [5, 6, 7]) == 0.25
    assert recall(left_half_of_the_top, [6, 19]) == 0


def test_global_and_synthesised_tokens_keep_nothing() -> None:
    box = [(0.0, 0.0, 0.25, 0.25)]
    assert recall(box, [0, -1, -1]) == 0
    assert recall(box, [-1, 4]) == 1


def test_the_global_view_counts_when_it_is_all_there_is() -> None:
    assert recall([(0.0, 0.0, 0.5, 0.5)], [0], eligible=~TILES) == 1


def test_a_token_belongs_by_its_centre() -> None:
    centre_of_the_second = 0.375
    up_to_it = target_tokens([(0.0, 0.0, centre_of_the_second, 0.25)], TOKENS, TILES)
    beyond_it = target_tokens([(0.0, 0.0, centre_of_the_second + 0.01, 0.25)], TOKENS, TILES)
    assert up_to_it.nonzero().flatten().tolist() == [4]
    assert beyond_it.nonzero().flatten().tolist() == [4, 5]


def test_overlapping_boxes_count_a_token_once() -> None:
    boxes = [(0.0, 0.0, 0.5, 0.25), (0.25, 0.0, 0.75, 0.25)]  # tokens 4, 5 and 5, 6
    assert recall(boxes, [5]) == pytest.approx(1 / 3)


def test_a_box_between_the_centres_belongs_to_the_nearest_token() -> None:
    assert target_tokens([(0.76, 0.76, 0.80, 0.80)], TOKENS, TILES).nonzero().flatten().tolist() == [19]
    in_the_very_middle = target_tokens([(0.49, 0.49, 0.51, 0.51)], TOKENS, TILES)
    assert in_the_very_middle.nonzero().flatten().tolist() == [9]


def test_padding_is_no_target() -> None:
    unpadded = TILES.clone()
    unpadded[5] = False
    assert recall([(0.0, 0.0, 0.5, 0.25)], [4], eligible=unpadded) == 1


def test_a_sample_without_boxes_has_no_recall() -> None:
    assert recall([], [4]) is None
