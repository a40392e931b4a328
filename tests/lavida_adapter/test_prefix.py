"""Splicing: the picture's tokens in the placeholder's place, padding, labels."""

import pytest
import torch
from torch import nn

from lavida_adapter.prefix import Prefix, splice
from lavida_adapter.prompt import IGNORE, IMAGE
from tests.lavida_adapter.tiny import noise

D = 4
ROWS = [[1, IMAGE, 2, 3], [IMAGE, 4]]
BLOCKS = [noise(2, D, seed=1), noise(1, D, seed=2)]


@pytest.fixture
def wte() -> nn.Embedding:
    return nn.Embedding.from_pretrained(noise(6, D, seed=3))


def test_places_padding_and_masks(wte: nn.Embedding) -> None:
    prefix, labels = splice(ROWS, BLOCKS, wte, max_length=5)
    e = wte.weight
    assert torch.equal(prefix.embeds_BPD[0], torch.stack([e[1], *BLOCKS[0], e[2], e[3]]))
    assert torch.equal(prefix.embeds_BPD[1], torch.stack([*BLOCKS[1], e[4], *torch.zeros(3, D)]))
    assert prefix.visual_BP.int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert prefix.mask_BP.int().tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert (prefix.n_visual, prefix.n_tokens) == ((2, 1), (5, 2))
    assert (labels == IGNORE).all()
    assert prefix.padding is prefix.mask_BP
    assert splice(ROWS[:1], BLOCKS[:1], wte, max_length=5)[0].padding is None
    counted = Prefix(prefix.embeds_BPD, prefix.mask_BP, prefix.visual_BP)  # without the numbers that splice knows
    assert (counted.n_visual, counted.n_tokens) == ((2, 1), (5, 2)) and counted.padding is counted.mask_BP


def test_labels_move_with_their_tokens(wte: nn.Embedding) -> None:
    given = [[IGNORE, IGNORE, 2, 3], [IGNORE, 4]]
    _, labels = splice(ROWS, BLOCKS, wte, max_length=5, labels=given)
    assert labels.tolist() == [[IGNORE, IGNORE, IGNORE, 2, 3], [IGNORE, 4, IGNORE, IGNORE, IGNORE]]


def test_an_empty_picture_leaves_the_text(wte: nn.Embedding) -> None:
    prefix, _ = splice([[1, IMAGE, 2]], [torch.zeros(0, D)], wte, max_length=5)
    assert torch.equal(prefix.embeds_BPD[0], wte.weight[1:3])
    assert prefix.n_visual == (0,)
