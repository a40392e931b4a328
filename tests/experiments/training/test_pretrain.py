"""The tiny base's stages: what they teach is what the pictures show."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.data.synthetic.board import generator
from experiments.data.synthetic.doc import SynthDoc
from experiments.data.synthetic.glyphs import draw_lookups, draw_patchwork, labels
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS
from experiments.data.synthetic.tokenizer import glyph_tokens
from experiments.training.pretrain import Align, TextPretraining, VisionPretraining
from experiments.training.pretrain.text_stage import Bags, Curriculum, questions, random_codes
from experiments.training.pretrain.vision_stage import CLASS, draw_regions
from lavida_adapter import Lavida, ObjectiveConfig
from lavida_adapter.families import FAMILIES
from lavida_adapter.lightning_module import OptimConfig
from shirg import UserError
from tests.lavida_adapter.tiny import tiny_model

N_CHARS = 30
"""Digits and letters are the first classes."""
FIRST_CODES = [0.760373, 1.125800, 0.062810]
"""Weights were trained with this table: another one makes them useless."""
OPTIM = OptimConfig(steps=10, lr=1e-3)


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> Lavida:
    return Lavida.from_pretrained(tiny_weights)


def test_curriculum_fades_from_words_to_codes() -> None:
    fading = Curriculum(words=0.2, fade=0.5)
    assert [fading.coded(x) for x in (0, 0.2, 0.45, 0.7, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [Curriculum(words=0.2).coded(x) for x in (0.1, 0.2)] == [0, 1]
    assert Curriculum().coded(0) == 1


def test_curriculum_holds_then_climbs_then_stays() -> None:
    curriculum = Curriculum(first=6, last=64, hold=0.4, ramp=0.2, settle=0.1)
    assert [curriculum.cells(x) for x in (0, 0.4, 0.5, 0.6, 1.0)] == [6, 6, 35, 64, 64]
    with pytest.raises(ValueError, match="at most 1"):
        Curriculum(hold=0.6, ramp=0.3, settle=0.2)
    with pytest.raises(UserError, match="first=8 and last=8: contexts grow"):
        Curriculum(first=8, last=8)


def test_a_tile_token_shows_its_cell_and_a_global_token_the_mean_of_four(model: Lavida) -> None:
    regions = draw_regions(model, seed=3, step=0, pictures={"glyphs": 1})
    label = labels(draw_patchwork(3, 0))
    share = regions.share_BNC[0]
    assert share.shape == (320, len(CLASS))
    for row, col in ((0, 0), (3, 11), (9, 2), (15, 15)):
        tile = 1 + 2 * (row // 8) + col // 8
        token = tile * 64 + (row % 8) * 8 + col % 8
        char = int(label.char_RC[row, col])
        named = CHARS[char] in CLASS  # foils have no name
        assert share[token, :N_CHARS].sum() == named
        assert not named or share[token, CLASS[CHARS[char]]] == 1
        coarse = share[(row // 2) * 8 + col // 2, :N_CHARS].sum()
        block = label.char_RC[row // 2 * 2 : row // 2 * 2 + 2, col // 2 * 2 : col // 2 * 2 + 2]
        assert coarse == pytest.approx((block > 0).mean())


def test_align_wants_the_sum_of_the_words(model: Lavida) -> None:
    stage = Align(model, OPTIM, seed=0, pictures={"glyphs": 1})
    words, wte = glyph_tokens(model.tokenizer), model.lm.embedding.weight
    share = torch.zeros(1, 2, len(CLASS))
    share[0, 0, CLASS["7"]] = share[0, 0, CLASS["red"]] = 1
    target = stage.target(share, torch.tensor([[1.0, 0.0]]))[0]
    torch.testing.assert_close(target[0], wte[words.char[CHARS.index("7")]] + wte[words.colour[COLOURS.index("red")]])
    torch.testing.assert_close(target[1], wte[words.blank])


def test_both_stages_write_a_word_as_the_same_random_code(model: Lavida) -> None:
    """The entry of a red 7, of a blank, and of the projector's targets for them; nothing of it is in the embeddings."""
    words, wte = glyph_tokens(model.tokenizer), model.lm.embedding.weight
    codes = random_codes(model)
    seven, red = words.char[CHARS.index("7")], words.colour[COLOURS.index("red")]
    text = TextPretraining(model, OPTIM, 0, ObjectiveConfig(), Curriculum(), "full", 0.0, codes="random")
    align = Align(model, OPTIM, 5, {"glyphs": 1}, codes="random")
    context = text.context(torch.tensor([[[seven, red], [words.blank, -1]]]))[0]
    share = torch.zeros(1, 2, len(CLASS))
    share[0, 0, [CLASS["7"], CLASS["red"]]] = 1
    torch.testing.assert_close(context, torch.stack([codes[seven] + codes[red], codes[words.blank]]))
    torch.testing.assert_close(align.target(share, torch.tensor([[1.0, 0.0]]))[0], context)
    assert not codes.requires_grad
    assert codes.std().item() == pytest.approx(model.config.lm.emb_std, rel=0.02)
    assert F.cosine_similarity(codes, wte.detach()).mean().abs() < 0.1
    assert (codes[0, :3] / model.config.lm.emb_std).tolist() == pytest.approx(FIRST_CODES, abs=1e-5)


def test_text_stage_asks_what_the_context_holds(model: Lavida) -> None:
    stage = TextPretraining(model, OPTIM, 0, ObjectiveConfig(extra_padding=0), Curriculum(), "image_first", 0.1)
    lookups = draw_lookups(np.random.default_rng(0), batch=16, cells=12)
    words, wte = glyph_tokens(model.tokenizer), model.lm.embedding.weight
    context = stage.context(stage.glyph_bags(lookups).word_BNW)
    for row, (question, answer) in enumerate(questions(lookups)):
        task, argument = question.split()
        char, colour = (answer, argument) if task == "digit" else (argument, answer)
        word = wte[words.char[CHARS.index(char)]] + wte[words.colour[COLOURS.index(colour)]]
        assert ((context[row] - word).abs().amax(-1) < 1e-6).sum() == 1


def test_text_stage_holds_the_words_of_every_family(model: Lavida) -> None:
    """A stamp's bag is the sum of its words; each family has its share of the contexts."""
    curriculum = Curriculum(tokens=400, alone=0.0, glyphs=0.5, families={"chart": 1, "doc": 3})
    stage = TextPretraining(model, OPTIM, 0, ObjectiveConfig(extra_padding=0), curriculum, "image_first", 0.1)
    bags = stage.draw(0)
    tasks = [question.split()[0] for question, _ in bags.asked]
    assert tasks.count("value") == 4 and tasks.count("field") == 13 and len(tasks) == 35
    context, wte = stage.context(bags.word_BNW), model.lm.embedding.weight
    for row, (question, answer) in enumerate(bags.asked):
        task, argument = question.split()
        if task == "field":
            words = [stage.ids[word] for word in (argument, "tens", answer[0])]
            assert ((context[row] - wte[words].sum(0)).abs().amax(-1) < 1e-6).sum() == 1
    assert curriculum.counts(1.0)["doc"] < curriculum.counts(0.0)["doc"]
    assert Curriculum(alone=0.2).counts(0.1)["chart"] == 0 < Curriculum(alone=0.2).counts(0.2)["chart"]


def test_boards_name_their_cells(model: Lavida) -> None:
    regions = draw_regions(model, seed=3, step=0, pictures={"doc": 1})
    board = SynthDoc.patchwork(generator("doc", "patchwork", 3, 0))
    for stamp in board.stamps:
        token = 64 * (1 + 2 * (stamp.row // 8) + stamp.col // 8) + stamp.row % 8 * 8 + stamp.col % 8
        shown = {word for word, i in CLASS.items() if regions.share_BNC[0, token, i] > 0}
        assert shown == set(stamp.words)
        assert regions.filled_BN[0, token] == bool(stamp.words)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_stage_teaches_image_first_and_settles_on_the_shipped_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a single layer nothing reads the prefix states, so the mask would not show.
    deeper = tiny_model(lm={"family": family, "n_layers": 2})
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


def test_text_stage_begins_with_words_and_goes_on_with_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    losses = {}
    for step in (0, 4, 5):
        monkeypatch.setattr(TextPretraining, "global_step", step)
        for codes in ("words", "random"):
            curriculum, objective = Curriculum(tokens=200, words=0.5), ObjectiveConfig(prefix_mask=True)
            stage = TextPretraining(model, OPTIM, 0, objective, curriculum, "full", 0.0, codes)
            losses[codes, step] = stage.loss(stage.draw(step), torch.Generator().manual_seed(0)).item()
    assert [losses["words", step] == losses["random", step] for step in (0, 4, 5)] == [True, True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_stage_learns_the_token_that_the_gate_reads(family: str) -> None:
    """A model that is trained to give one answer gives it at the gate: loss and decoding mean the same place."""
    model = tiny_model(lm={"family": family}, drop_token_after_image=False)  # the prompt of training
    objective = ObjectiveConfig(prefix_mask=True, extra_padding=0)
    stage = TextPretraining(model, OPTIM, 0, objective, Curriculum(), "full", 0.0)
    asked = [("digit red", "57")] * 8
    bags = Bags(torch.full((8, 4, 1), 32), asked)
    assert stage._right(bags) == 0
    optimizer = torch.optim.Adam(model.lm.parameters(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        stage.loss(bags, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert stage._right(bags) == 1


def test_vision_stage_trains_the_tower_and_what_reads_it(model: Lavida) -> None:
    stage = VisionPretraining(model, OPTIM, 0, {"glyphs": 1, "chart": 1, "doc": 1})
    stage.loss(stage.draw(0), torch.Generator()).backward()
    trained = {name for name, p in stage.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for name, p in stage.named_parameters() if name in trained)
    assert not any("post_layernorm" in name or "transformer" in name for name in trained)
    reached = stage.gate(pictures=2)
    assert reached.keys() == {"glyphs", "glyphs_global", "chart", "doc"} and all(0 <= x <= 1 for x in reached.values())


def test_regions_refuse_a_canvas_of_another_size(model: Lavida) -> None:
    config = replace(model.config, image_grid_pinpoints=((192, 192),))
    other = Lavida(config, model.tokenizer)
    with pytest.raises(ValueError, match="rows of"):
        draw_regions(other, 0, 0, {"glyphs": 1})
