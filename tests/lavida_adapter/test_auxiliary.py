"""Losses beside the answer's: their values and gradients against a computation by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from baselines import Pooled
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.loss import TEMPERATURE, adaptive_k_loss, alignment_loss, row_losses
from lavida_adapter.objective import Tally
from lavida_adapter.relevance import LmEmbed
from shirg import Selection, Selector, ShirgSelector, Source
from tests.lavida_adapter.tiny import noise, picture, tiny_model

IMAGES = [picture((40, 40)), picture((38, 16)), picture((12, 70))]
QUESTIONS = ["digit red", "letter K", "shape kind"]
NOTHING = torch.zeros(3, 3, dtype=torch.bool)


def batch(images: list[Any] = IMAGES, questions: list[str] = QUESTIONS) -> TrainBatch:
    n = range(len(images))
    return TrainBatch(images, questions, ["7", "blue green", "square"][: len(images)], [str(i) for i in n])


def gate(**knobs: Any) -> ShirgSelector:
    return ShirgSelector(**{"budget": 10, "scaffold": {"size": 2}, "newline": "row"} | knobs)


def run(model: Lavida, selector: Selector, data: TrainBatch, **objective: Any) -> tuple[torch.Tensor, Tally]:
    tally = Tally()
    settings = ObjectiveConfig(extra_padding=0, **objective)
    draws = torch.Generator().manual_seed(0)
    return model.loss(data, selector, settings, draws, relevance=LmEmbed(), tally=tally), tally


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def contrast(pictures: list[list[float]], questions: list[list[float]], apart: set[tuple[int, int]]) -> float:
    """InfoNCE in plain Python; `apart` holds the pairs (i, j) that count against the pair (i, i)."""
    total, n = 0.0, len(pictures)
    for rows, columns in ((pictures, questions), (questions, pictures)):
        for i in range(n):
            z = [cosine(rows[i], columns[j]) / TEMPERATURE for j in range(n) if i == j or (i, j) in apart]
            own = cosine(rows[i], columns[i]) / TEMPERATURE
            total += math.log(sum(math.exp(x) for x in z)) - own
    return total / (2 * n)


def test_alignment_against_plain_python() -> None:
    pictures, questions = noise(3, 5, seed=1), noise(3, 5, seed=2)
    every = {(i, j) for i in range(3) for j in range(3) if i != j}
    found = alignment_loss(pictures, questions, NOTHING, TEMPERATURE).item()
    assert found == pytest.approx(contrast(pictures.tolist(), questions.tolist(), every), abs=1e-5)
    same = NOTHING.clone()
    same[0, 1] = same[1, 0] = True
    found = alignment_loss(pictures, questions, same, TEMPERATURE).item()
    left = every - {(0, 1), (1, 0)}
    assert found == pytest.approx(contrast(pictures.tolist(), questions.tolist(), left), abs=1e-5)


def test_the_gradient_of_alignment_against_differences() -> None:
    pictures = noise(3, 5, seed=1).double().requires_grad_()
    questions = noise(3, 5, seed=2).double()
    alignment_loss(pictures, questions, NOTHING, 1.0).backward()
    assert pictures.grad is not None
    for i in range(3):
        for d in range(5):
            ends = []
            for sign in (1, -1):
                moved = pictures.detach().clone()
                moved[i, d] += sign * 1e-2
                ends.append(alignment_loss(moved, questions, NOTHING, 1.0).double())
            assert pictures.grad[i, d].item() == pytest.approx(((ends[0] - ends[1]) / 2e-2).item(), abs=1e-4)


def test_alignment_is_added_to_the_loss_of_the_model() -> None:
    """Means of the projected tokens of each prefix, without newlines, against means of the question's embeddings."""
    model, selector = tiny_model(), gate()
    plain, _ = run(model, selector, batch())
    both, tally = run(model, selector, batch(), alignment=0.25)
    pictures, questions = [], []
    prefix = model.encode(IMAGES, QUESTIONS, selector, relevance=LmEmbed())
    for row, visual, chosen, question in zip(
        prefix.embeds_BPD, prefix.visual_BP, prefix.selections, QUESTIONS, strict=True
    ):
        real = chosen.source_BT[0][chosen.mask_BT[0]] != int(Source.NEWLINE)
        assert not bool(real.all())
        pictures.append(row[visual][real].mean(0))
        ids = model.tokenizer(question, add_special_tokens=False)["input_ids"]
        questions.append(model.lm.wte.weight[ids].mean(0))
    every = {(i, j) for i in range(3) for j in range(3) if i != j}
    expected = contrast([p.tolist() for p in pictures], [q.tolist() for q in questions], every)
    assert tally.terms["alignment"].item() == pytest.approx(expected, abs=1e-4)
    assert both.item() == pytest.approx(plain.item() + 0.25 * expected, abs=1e-4)


def test_alignment_reaches_the_projector_and_not_the_words() -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.2",)))
    _, tally = run(model, gate(), batch(), alignment=1.0)
    tally.terms["alignment"].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, g in gradients.items() if g.abs().max() > 0} == {"model.mm_projector.2.lora_B.default.weight"}


def test_prompts_of_one_picture_or_one_question_are_not_told_apart() -> None:
    model = tiny_model()
    twice = [IMAGES[0], IMAGES[0], IMAGES[1]]
    _, tally = run(model, Pooled(), batch(twice), alignment=1.0)
    prefix = model.encode(twice, QUESTIONS, Pooled())
    pictures = []
    for row, visual, chosen in zip(prefix.embeds_BPD, prefix.visual_BP, prefix.selections, strict=True):
        real = chosen.source_BT[0][chosen.mask_BT[0]] != int(Source.NEWLINE)
        pictures.append(row[visual][real].mean(0).tolist())
    words = [model.tokenizer(q, add_special_tokens=False)["input_ids"] for q in QUESTIONS]
    questions = [model.lm.wte.weight[ids].mean(0).tolist() for ids in words]
    apart = {(0, 2), (2, 0), (1, 2), (2, 1)}
    assert tally.terms["alignment"].item() == pytest.approx(contrast(pictures, questions, apart), abs=1e-4)
    for images, asked in ((IMAGES[:1], QUESTIONS[:1]), (twice[:2], QUESTIONS[:2]), (IMAGES[:2], ["same", "same "])):
        with pytest.raises(
            ValueError,
            match="contrasts the prompts of a batch, and all prompts of this batch have one picture .* batch_size",
        ):
            run(model, Pooled(), batch(images, asked), alignment=1.0)


def test_row_losses() -> None:
    logits, labels = noise(4, 6), torch.tensor([0, 5, 2, 2])
    each = F.cross_entropy(logits, labels, reduction="none")
    found = row_losses(logits, labels, torch.tensor([1, 0, 1, 1]), 3)
    assert found[:2].tolist() == pytest.approx([each[1].item(), (each[0] + each[2] + each[3]).item() / 3], abs=1e-6)
    assert found[2].isnan()


def choice(expected: torch.Tensor | None) -> Selection:
    none = torch.zeros(1, 0)
    return Selection(none[..., None], none.long(), none.long(), none[..., None], none.bool(), expected_B=expected)


def test_adaptive_k_is_a_mean_squared_error() -> None:
    expected = [torch.tensor([x], requires_grad=True) for x in (1.0, 3.0, 9.0)]
    loss = adaptive_k_loss([choice(e) for e in expected], torch.tensor([0.5, 4.0, math.nan]))
    assert loss.item() == pytest.approx((0.5**2 + 1.0**2) / 2)
    loss.backward()
    assert [e.grad.item() for e in expected if e.grad is not None] == pytest.approx([0.5, -1.0, 0.0])
    with pytest.raises(ValueError, match="trains the head of a selector: choose selector.adaptive.mode=head"):
        adaptive_k_loss([choice(expected[0]), choice(None)], torch.tensor([0.5, 0.5]))


def test_the_head_learns_the_loss_of_its_level() -> None:
    model, selector = tiny_model(), gate(adaptive={"mode": "head"}, newline="none").at_level(1)
    assert selector.head is not None
    model.requires_grad_(False)
    plain, _ = run(model, selector, batch())
    both, tally = run(model, selector, batch(), adaptive_k=0.1)
    assert tally.row_loss_B is not None
    error = sum((0.25 - loss) ** 2 for loss in tally.row_loss_B.tolist()) / 3  # an untrained head expects 1 - level
    assert tally.terms["adaptive_k"].item() == pytest.approx(error, rel=1e-5)
    assert both.item() == pytest.approx(plain.item() + 0.1 * error, rel=1e-5)
    both.backward()
    bias = selector.head.linear.bias.grad
    assert bias is not None
    slope = 0.1 * sum(2 * (0.25 - loss) for loss in tally.row_loss_B.tolist()) / 3
    assert bias.tolist() == pytest.approx([0.0, slope, 0.0], rel=1e-5)


def test_the_mean_of_the_rows_is_the_loss() -> None:
    """Questions and answers of equal length: the loss is a mean over targets, and every row has as many."""
    model, selector = tiny_model(), gate(adaptive={"mode": "head"}).at_level(0)
    data = TrainBatch(IMAGES, QUESTIONS, ["7", "8", "9"], ["a", "b", "c"])
    loss, tally = run(model, selector, data, adaptive_k=1e-9)
    assert tally.row_loss_B is not None and tally.row_loss_B.std() > 1e-2
    assert loss.item() == pytest.approx(tally.row_loss_B.mean().item(), abs=1e-5)


@pytest.mark.parametrize("knobs", [{"alignment": -0.1}, {"adaptive_k": math.inf}, {"alignment": math.nan}])
def test_impossible_weights(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a weight >= 0"):
        ObjectiveConfig(**knobs)
