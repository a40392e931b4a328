"""The loss of the whole model, against the same numbers computed another way."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import Pooled
from lavida_adapter import Lavida, ObjectiveConfig, Prefix, TrainBatch
from lavida_adapter.loss import draw_loss, rows_loss
from lavida_adapter.objective import mask_probability, masked_targets
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import IGNORE, IMAGE
from tests.lavida_adapter.test_llada import dense, may_see
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
        model.lm.wte,
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
        x = torch.where(copy[:, None], model.lm.wte.weight[model.config.lm.mask_token_id], whole.embeds_BPD[0])
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
        whole, labels = splice([ROWS[0]], [block], model.lm.wte, max_length=100, labels=[LABELS[0]])
        if way == "cache":
            value = draw_loss(model, whole, labels, TIMES[:1], draws([0], 9), ObjectiveConfig(prefix_mask=True))
        else:
            target = labels[0] != IGNORE
            n_prompt = int(target.to(torch.int64).argmax())
            allowed = may_see(n_prompt, 9 - n_prompt, None, prompt_sees_answer=False)
            entropies = []
            for copy in masked_targets(target[None], TIMES[:1], draws([0], 9)):
                mask_D = model.lm.wte.weight[model.config.lm.mask_token_id]
                x = torch.where(copy[0, :, None], mask_D, whole.embeds_BPD[0])
                states = dense.__wrapped__(model.lm, x, allowed, torch.arange(9))  # type: ignore[attr-defined]
                entropies.append(F.cross_entropy(model.lm.logits(states)[copy[0]], labels[copy], reduction="none"))
            value = torch.cat(entropies).mean()
        value.backward()
        assert block.grad is not None
        gradients.append(block.grad)
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


def test_a_row_without_a_target() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="training row 1 has no target token: its answer was empty or cut away"):
        rows_loss(
            model, ROWS[:2], [LABELS[0], [IGNORE] * 5], BLOCKS[:2], ObjectiveConfig(), torch.Generator().manual_seed(0)
        )


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
