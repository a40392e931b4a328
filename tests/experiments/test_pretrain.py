"""The tiny base's stages: what they teach is what the pictures show."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data.synthetic.glyphs import draw_lookups, draw_patchwork, labels
from experiments.data.synthetic.glyphs.vocabulary import CHARS, COLOURS
from experiments.data.tokenizer import glyph_tokens
from experiments.pretrain import Align, TextPretraining, VisionPretraining
from experiments.pretrain.regions import N_CHARS, N_CLASSES, draw_regions
from experiments.pretrain.text import Curriculum, questions
from lavida_adapter import Lavida, ObjectiveConfig
from lavida_adapter.module import OptimConfig

OPTIM = OptimConfig(steps=10, lr=1e-3)


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> Lavida:
    return Lavida.from_pretrained(tiny_weights)


def test_curriculum_holds_then_climbs_then_stays() -> None:
    curriculum = Curriculum(first=6, last=64, hold=0.4, ramp=0.2, settle=0.1)
    assert [curriculum.cells(x) for x in (0, 0.4, 0.5, 0.6, 1.0)] == [6, 6, 35, 64, 64]
    with pytest.raises(ValueError, match="at most 1"):
        Curriculum(hold=0.6, ramp=0.3, settle=0.2)


def test_a_tile_token_shows_its_cell_and_a_global_token_the_mean_of_four(model: Lavida) -> None:
    regions = draw_regions(model, seed=3, step=0, batch=1)
    label = labels(draw_patchwork(3, 0))
    share = regions.share_BNC[0]
    assert share.shape == (320, N_CLASSES)
    for row, col in ((0, 0), (3, 11), (9, 2), (15, 15)):
        tile = 1 + 2 * (row // 8) + col // 8
        token = tile * 64 + (row % 8) * 8 + col % 8
        char = int(label.char_RC[row, col])
        assert share[token, :N_CHARS].sum() == (char > 0)
        assert char == 0 or share[token, char] == 1
        coarse = share[(row // 2) * 8 + col // 2, :N_CHARS].sum()
        block = label.char_RC[row // 2 * 2 : row // 2 * 2 + 2, col // 2 * 2 : col // 2 * 2 + 2]
        assert coarse == pytest.approx((block > 0).mean())


def test_align_wants_the_sum_of_the_words(model: Lavida) -> None:
    stage = Align(model, OPTIM, seed=0)
    words, wte = glyph_tokens(model.tokenizer), model.lm.wte.weight
    share = torch.zeros(1, 2, N_CLASSES)
    share[0, 0, CHARS.index("7")] = share[0, 0, N_CHARS + COLOURS.index("red")] = 1
    target = stage.target(share)[0]
    torch.testing.assert_close(target[0], wte[words.char[CHARS.index("7")]] + wte[words.colour[COLOURS.index("red")]])
    torch.testing.assert_close(target[1], wte[words.blank])


def test_text_stage_asks_what_the_context_holds(model: Lavida) -> None:
    stage = TextPretraining(model, OPTIM, 0, ObjectiveConfig(extra_padding=0), Curriculum(), "image_first", 0.1)
    lookups = draw_lookups(np.random.default_rng(0), batch=16, cells=12)
    words, wte = glyph_tokens(model.tokenizer), model.lm.wte.weight
    context = stage.context(lookups)
    for row, (question, answer) in enumerate(questions(lookups)):
        task, argument = question.split()
        char, colour = (answer, argument) if task == "digit" else (argument, answer)
        word = wte[words.char[CHARS.index(char)]] + wte[words.colour[COLOURS.index(colour)]]
        assert ((context[row] - word).abs().amax(-1) < 1e-6).sum() == 1


def test_text_stage_teaches_image_first_and_settles_on_the_shipped_attention(
    model: Lavida, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a single layer nothing reads the prefix states, so the mask would not show.
    deeper = Lavida(replace(model.config, lm=replace(model.config.lm, n_layers=2)), model.tokenizer)
    curriculum = Curriculum(tokens=200, settle=0.5, hold=0.2, ramp=0.2)
    objective = ObjectiveConfig(prefix_mask=True, extra_padding=0)
    losses = {}
    for step in (0, 9):
        monkeypatch.setattr(TextPretraining, "global_step", step)
        for attention in ("image_first", "full"):
            stage = TextPretraining(deeper, OPTIM, 0, objective, curriculum, attention, 0.0)
            losses[attention, step] = stage.loss(stage.draw(step), torch.Generator().manual_seed(0)).item()
    assert losses["image_first", 0] != losses["full", 0]
    assert losses["image_first", 9] == losses["full", 9]
    assert deeper.config.prefix_attention == "full"


def test_vision_stage_trains_the_tower_and_what_reads_it(model: Lavida) -> None:
    stage = VisionPretraining(model, OPTIM, seed=0)
    stage.loss(draw_regions(model, 0, 0, 2), torch.Generator()).backward()
    trained = {name for name, p in stage.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for name, p in stage.named_parameters() if name in trained)
    assert not any("post_layernorm" in name or "transformer" in name for name in trained)
    assert 0 <= stage.gate(pictures=4)["tile_chars"] <= 1


def test_regions_refuse_a_canvas_of_another_size(model: Lavida) -> None:
    config = replace(model.config, image_grid_pinpoints=((192, 192),))
    other = Lavida(config, model.tokenizer)
    with pytest.raises(ValueError, match="rows of"):
        draw_regions(other, 0, 0, 1)
