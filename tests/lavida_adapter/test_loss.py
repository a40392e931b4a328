"""The loss of the whole model and its auxiliary losses, against the same numbers computed another way."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import Pooled
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, Prefix, TrainBatch, add_lora
from lavida_adapter.loss import TEMPERATURE, adaptive_k_loss, alignment_loss, draw_loss, row_losses
from lavida_adapter.objective import Tally, mask_probability, masked_targets
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import IGNORE, IMAGE
from lavida_adapter.relevance import LmEmbed
from shirg import Selection, Selector, ShirgSelector, Source
from tests.lavida_adapter.dense import dense, may_see
from tests.lavida_adapter.tiny import noise, picture, tiny_model

D, EOS = 32, 257
ROWS = [[1, IMAGE, 2, 3, 10, 11, 12], [1, IMAGE, 4, 10, 13], [5, 6, IMAGE, 7, 14, 15, 16, 17]]
BEGIN = [4, 3, 4]  # first answer token of each row, before the picture goes in
LABELS = [[IGNORE] * b + row[b:] for row, b in zip(ROWS, BEGIN, strict=True)]
BLOCKS = [noise(3, D, seed=1), noise(6, D, seed=2), noise(1, D, seed=3)]
TIMES = torch.tensor([0.3, 0.8, 0.5])
OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"prefix_mask": True},
    {"weighting": "inverse_time"},
    {"weighting": "inverse_time", "complementary": False},
    {"complementary": False},
    {"prefix_mask": True, "weighting": "inverse_time", "complementary": False},
]


def spliced(model: Lavida, rows: list[int]) -> tuple[Prefix, Tensor]:
    return splice(
        [ROWS[i] for i in rows],
        [BLOCKS[i] for i in rows],
        model.lm.embedding,
        max_length=100,
        labels=[LABELS[i] for i in rows],
    )


def draws(rows: list[int], length: int) -> Tensor:
    """The same draws for a row whatever it is batched with."""
    return torch.stack([torch.rand(20, generator=torch.Generator().manual_seed(i))[:length] for i in rows])


def loss(model: Lavida, rows: list[int], **objective: Any) -> Tensor:
    whole, labels = spliced(model, rows)
    return draw_loss(model, whole, labels, TIMES[rows], draws(rows, labels.shape[1]), ObjectiveConfig(**objective))


@torch.no_grad()
def by_hand(model: Lavida, row: int, *, prefix_mask: bool, image_first: bool) -> tuple[Tensor, Tensor]:
    """Cross entropy of every target of a row, and whether it is the first copy that masks it."""
    whole, labels = spliced(model, [row])
    target = labels[0] != IGNORE
    n_prompt, n = int(target.to(torch.int64).argmax()), len(target)
    first, second = masked_targets(target[None], TIMES[[row]], draws([row], n))
    allowed = may_see(
        n_prompt, n - n_prompt, whole.visual_BP[0] if image_first else None, prompt_sees_answer=not prefix_mask
    )
    found = torch.zeros(n)
    for copy in (first[0], second[0]):
        x = torch.where(copy[:, None], model.lm.embedding.weight[model.config.lm.mask_token_id], whole.embeds_BPD[0])
        logits = model.lm.logits(dense(model.lm, x, allowed, torch.arange(n)))
        found = torch.where(copy, F.cross_entropy(logits, labels[0].clamp_min(0), reduction="none"), found)
    return found[target], first[0][target]


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(map(str, o)) or "lavida")
def test_against_dense_masks_and_a_sum_by_hand(objective: dict[str, Any], image_first: bool) -> None:
    """Rows of three lengths in one batch. The plain loss is a mean over targets, the weighted one a sum over all."""
    model = tiny_model(prefix_attention="image_first" if image_first else "full")
    prefix_mask = objective.get("prefix_mask", False)
    copies = 2 if objective.get("complementary", True) else 1
    total, n_masked, n_targets = 0.0, 0, 0
    for row in range(3):
        entropy, in_first = by_hand(model, row, prefix_mask=prefix_mask, image_first=image_first)
        p = mask_probability(TIMES[row]).item()
        weight = torch.where(in_first, 1 / p, 1 / (1 - p)) / copies
        counted = torch.ones_like(in_first) if copies == 2 else in_first
        total += (entropy * (weight if "weighting" in objective else 1.0))[counted].sum().item()
        n_masked, n_targets = n_masked + int(counted.sum()), n_targets + len(counted)
    expected = total / (n_targets if "weighting" in objective else n_masked)
    assert loss(model, [0, 1, 2], **objective).item() == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_objectives_differ() -> None:
    model = tiny_model()
    found = [loss(model, [0, 1, 2], **objective).item() for objective in OBJECTIVES]
    assert len({round(value, 4) for value in found}) == len(OBJECTIVES)


@torch.no_grad()
@pytest.mark.parametrize("objective", [{}, {"prefix_mask": True}, {"weighting": "inverse_time"}], ids=str)
def test_a_batch_is_the_mean_over_its_rows_weighted_by_targets(objective: dict[str, Any]) -> None:
    model = tiny_model()
    targets = [sum(token != IGNORE for token in label) for label in LABELS]
    alone = [loss(model, [i], **objective).item() * n for i, n in enumerate(targets)]
    together = loss(model, [0, 1, 2], **objective).item()
    assert together == pytest.approx(sum(alone) / sum(targets), abs=1e-5)
    assert loss(model, [2, 0, 1], **objective).item() == pytest.approx(together, abs=1e-5)


@torch.no_grad()
def test_single_copies_are_unbiased() -> None:
    """LLaDA's estimate: over many draws, weighted single copies and weighted pairs agree."""
    model = tiny_model()
    whole, labels = spliced(model, [0] * 400)
    u = torch.rand(*labels.shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((400,), 0.5)
    found = [
        draw_loss(model, whole, labels, t, u, ObjectiveConfig(weighting="inverse_time", complementary=pair)).item()
        for pair in (True, False)
    ]
    assert found[1] == pytest.approx(found[0], rel=0.08)


def test_gradients_of_the_prefix_mask_equal_those_of_a_dense_one() -> None:
    """Prefill and decode are differentiable: the picture's gradient is that of the dense computation."""
    model = tiny_model()
    gradients = []
    for way in ("cache", "dense"):
        block = BLOCKS[0].clone().requires_grad_()
        whole, labels = splice([ROWS[0]], [block], model.lm.embedding, max_length=100, labels=[LABELS[0]])
        if way == "cache":
            value = draw_loss(model, whole, labels, TIMES[:1], draws([0], 9), ObjectiveConfig(prefix_mask=True))
        else:
            target = labels[0] != IGNORE
            n_prompt = int(target.to(torch.int64).argmax())
            allowed = may_see(n_prompt, 9 - n_prompt, None, prompt_sees_answer=False)
            entropies = []
            for copy in masked_targets(target[None], TIMES[:1], draws([0], 9)):
                mask_D = model.lm.embedding.weight[model.config.lm.mask_token_id]
                x = torch.where(copy[0, :, None], mask_D, whole.embeds_BPD[0])
                states = dense.__wrapped__(model.lm, x, allowed, torch.arange(9))  # type: ignore[attr-defined]
                entropies.append(F.cross_entropy(model.lm.logits(states)[copy[0]], labels[copy], reduction="none"))
            value = torch.cat(entropies).mean()
        value.backward()
        assert block.grad is not None
        gradients.append(block.grad)
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


def test_a_single_copy_that_masks_nothing_does_not_stop_training() -> None:
    """At t = 0 one position of the row is drawn, here a prompt token: no loss, no NaN, no gradient."""
    model = tiny_model()
    whole, labels = spliced(model, [0])
    u = torch.ones(1, labels.shape[1])
    u[0, 0] = 0.0
    for weighting in ("none", "inverse_time"):
        objective = ObjectiveConfig(complementary=False, weighting=weighting)  # type: ignore[arg-type]  # both exist
        value = draw_loss(model, whole, labels, torch.zeros(1), u, objective)
        value.backward(retain_graph=True)
        assert value.item() == 0
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def batch(n: int = 2) -> TrainBatch:
    return TrainBatch(
        images=[picture((40, 40)), picture((100, 26))][:n],
        questions=["digit red", "what is written there?"][:n],
        answers=["7", "a whole sentence"][:n],
        ids=["a", "b"][:n],
    )


def run(model: Lavida, seed: int = 0, data: TrainBatch | None = None, **objective: Any) -> float:
    settings = ObjectiveConfig(**({"extra_padding": 0} | objective))
    with torch.no_grad():
        return model.loss(data or batch(), Pooled(), settings, torch.Generator().manual_seed(seed)).item()


def test_every_knob_changes_the_loss() -> None:
    model = tiny_model()
    plain = run(model)
    assert run(model) == plain
    for knobs in (
        {"time": "logit_normal"},
        {"time": "mode"},
        {"complementary": False},
        {"weighting": "inverse_time"},
        {"prefix_mask": True},
        {"answer_tokens": 40},
        {"extra_padding": 64},
    ):
        assert run(model, **knobs) != pytest.approx(plain, abs=1e-4), knobs
    assert run(model, seed=1) != pytest.approx(plain, abs=1e-4)


def test_the_picture_and_the_suffix_are_part_of_the_example() -> None:
    model, data = tiny_model(), batch(1)
    other = TrainBatch([picture((40, 40), seed=9)], data.questions, data.answers, data.ids)
    suffixed = TrainBatch(data.images, data.questions, data.answers, data.ids, prompts=["digit red, please"])
    values = [run(model, data=d) for d in (data, other, suffixed)]
    assert len({round(v, 5) for v in values}) == 3


def test_everything_that_is_used_gets_a_gradient() -> None:
    """One step trains every parameter but the norm that is stored and never applied."""
    model = tiny_model()
    model.loss(batch(), Pooled(), ObjectiveConfig(extra_padding=0), torch.Generator().manual_seed(0)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    prefix = "model.vision_tower.vision_tower.vision_model."
    # A key bias moves all scores of a query alike: softmax does not see it, up to rounding.
    assert [n for n in silent if "k_proj.bias" not in n] == [
        prefix + "post_layernorm.weight",
        prefix + "post_layernorm.bias",
    ]


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=["lavida", "prefix mask"])
@pytest.mark.parametrize("mixed", [True, False])
def test_half_precision(mixed: bool, objective: dict[str, Any]) -> None:
    """bfloat16, whole or mixed: the same loss up to rounding, in float32, with finite gradients."""
    settings = ObjectiveConfig(extra_padding=0, **objective)
    exact = run(tiny_model(), **objective)
    model = tiny_model() if mixed else tiny_model().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        value = model.loss(batch(), Pooled(), settings, torch.Generator().manual_seed(0))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=0.03)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


IMAGES = [picture((40, 40)), picture((38, 16)), picture((12, 70))]
QUESTIONS = ["digit red", "letter K", "shape kind"]
NOTHING = torch.zeros(3, 3, dtype=torch.bool)


def three(images: list[Any] = IMAGES, questions: list[str] = QUESTIONS) -> TrainBatch:
    n = range(len(images))
    return TrainBatch(images, questions, ["7", "blue green", "square"][: len(images)], [str(i) for i in n])


def shirg(**knobs: Any) -> ShirgSelector:
    return ShirgSelector(**{"budget": 10, "scaffold": {"size": 2}, "newline": "row"} | knobs)


def run_with(model: Lavida, selector: Selector, data: TrainBatch, **objective: Any) -> tuple[torch.Tensor, Tally]:
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
    with torch.autocast("cpu", torch.bfloat16):  # in float32 there, too: a training with a bfloat16 base runs under it
        found = alignment_loss(pictures, questions, same, TEMPERATURE).item()
    assert found == pytest.approx(contrast(pictures.tolist(), questions.tolist(), every - {(0, 1), (1, 0)}), abs=1e-5)


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
    model, selector = tiny_model(), shirg()
    plain, _ = run_with(model, selector, three())
    both, tally = run_with(model, selector, three(), alignment=0.25)
    pictures, questions = [], []
    prefix = model.encode(IMAGES, QUESTIONS, selector, relevance=LmEmbed())
    for row, visual, chosen, question in zip(
        prefix.embeds_BPD, prefix.visual_BP, prefix.selections, QUESTIONS, strict=True
    ):
        real = chosen.source_BT[0][chosen.mask_BT[0]] != int(Source.NEWLINE)
        assert not bool(real.all())
        pictures.append(row[visual][real].mean(0))
        ids = model.tokenizer(question, add_special_tokens=False)["input_ids"]
        questions.append(model.lm.embedding.weight[ids].mean(0))
    every = {(i, j) for i in range(3) for j in range(3) if i != j}
    expected = contrast([p.tolist() for p in pictures], [q.tolist() for q in questions], every)
    assert tally.terms["alignment"].item() == pytest.approx(expected, abs=1e-4)
    assert both.item() == pytest.approx(plain.item() + 0.25 * expected, abs=1e-4)


def test_alignment_reaches_the_projector_and_not_the_words() -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.2",)))
    _, tally = run_with(model, shirg(), three(), alignment=1.0)
    tally.terms["alignment"].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, g in gradients.items() if g.abs().max() > 0} == {"model.mm_projector.2.lora_B.default.weight"}


def test_prompts_of_one_picture_or_one_question_are_no_negatives() -> None:
    model = tiny_model()
    twice = [IMAGES[0], IMAGES[0], IMAGES[1]]
    _, tally = run_with(model, Pooled(), three(twice), alignment=1.0)
    prefix = model.encode(twice, QUESTIONS, Pooled())
    pictures = []
    for row, visual, chosen in zip(prefix.embeds_BPD, prefix.visual_BP, prefix.selections, strict=True):
        real = chosen.source_BT[0][chosen.mask_BT[0]] != int(Source.NEWLINE)
        pictures.append(row[visual][real].mean(0).tolist())
    words = [model.tokenizer(q, add_special_tokens=False)["input_ids"] for q in QUESTIONS]
    questions = [model.lm.embedding.weight[ids].mean(0).tolist() for ids in words]
    apart = {(0, 2), (2, 0), (1, 2), (2, 1)}
    assert tally.terms["alignment"].item() == pytest.approx(contrast(pictures, questions, apart), abs=1e-4)
    copied = run_with(model, Pooled(), three([IMAGES[0], IMAGES[0].copy(), IMAGES[1]]), alignment=1.0)[1]
    assert copied.terms["alignment"].item() == pytest.approx(tally.terms["alignment"].item(), abs=1e-5)
    for images, asked in ((IMAGES[:1], QUESTIONS[:1]), (twice[:2], QUESTIONS[:2]), (IMAGES[:2], ["same", "same "])):
        with pytest.raises(
            ValueError,
            match="contrasts the prompts of a batch, and all prompts of this batch have one picture .* batch_size",
        ):
            run_with(model, Pooled(), three(images, asked), alignment=1.0)


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
    model, selector = tiny_model(), shirg(adaptive={"mode": "head"}, newline="none").at_level(1)
    assert selector.head is not None
    model.requires_grad_(False)
    plain, _ = run_with(model, selector, three())
    both, tally = run_with(model, selector, three(), adaptive_k=0.1)
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
    model, selector = tiny_model(), shirg(adaptive={"mode": "head"}).at_level(0)
    data = TrainBatch(IMAGES, QUESTIONS, ["7", "8", "9"], ["a", "b", "c"])
    loss, tally = run_with(model, selector, data, adaptive_k=1e-9)
    assert tally.row_loss_B is not None and tally.row_loss_B.std() > 1e-2
    assert loss.item() == pytest.approx(tally.row_loss_B.mean().item(), abs=1e-5)
