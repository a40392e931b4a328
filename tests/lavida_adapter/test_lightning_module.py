"""Training with Lightning: schedule, rates of parts, the selector of a step, checkpoints, a stop before a NaN."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lavida_adapter.loss
from baselines import Pooled, Random
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch
from lavida_adapter.lightning_module import LavidaModule, OptimConfig, SelectorSchedule, Trainable
from lavida_adapter.loss import draw_loss
from lavida_adapter.relevance import LmEmbed
from shirg import ShirgSelector
from tests.lavida_adapter.tiny import tiny_model
from tests.lavida_adapter.training_runs import OBJECTIVE, OPTIM, QUIET, copied, draw, fit, learned, poisoned, stage

pytestmark = QUIET
COORDS = LoraConfig(
    rank=3,
    targets=("mm_projector.0", "transformer.blocks.*.q_proj", "selector.coords.linear"),
    ranks={"selector": 2},
    train_whole=("image_newline",),
)
RATES = OptimConfig(
    steps=4, lr=0.005, warmup=2, weight_decay=0.1, betas=(0.8, 0.95), rates={"selector": 0.01, "image_newline": 0.002}
)
ONE_LAYER = LoraConfig(rank=2, targets=("mm_projector.0",))
ONE_RATE = OptimConfig(steps=5, lr=0.02, warmup=2)


def with_coords() -> LavidaModule:
    """LoRA on projector, language model and selector, the newline in full, rates of their own."""
    options: dict[str, Any] = {"scaffold": {"size": 2}, "newline": "row"}
    selector = ShirgSelector(budget=10, coord_embed="sincos_linear", coord_width=16, **options)
    return stage(COORDS, selector, RATES, relevance=LmEmbed())


def one_layer(budget: int = 6, **options: Any) -> LavidaModule:
    """LoRA on one layer behind random tokens."""
    return stage(ONE_LAYER, Random(budget=budget), ONE_RATE, **options)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    optim = OptimConfig(steps=110, lr=1.0, warmup=10, lr_floor=0.1)
    assert [optim.scale(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert optim.scale(10) == 1.0
    assert optim.scale(60) == pytest.approx(0.55)
    assert optim.scale(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert optim.scale(110) == pytest.approx(0.1) == optim.scale(500)
    assert OptimConfig(steps=5, lr=1.0, lr_floor=1.0).scale(3) == 1.0
    assert OptimConfig(steps=5, lr=1.0, warmup=5).scale(5) == 1.0


@pytest.mark.parametrize("prefix_mask", [False, True])
def test_steps_by_hand(prefix_mask: bool) -> None:
    """Three steps written out: the same draws, clipping, AdamW, warm-up and rates of parts."""
    by_lightning, by_hand = with_coords(), with_coords()
    objective = ObjectiveConfig(extra_padding=4, prefix_mask=prefix_mask)
    by_lightning.objective = objective
    losses = fit(by_lightning, 3)
    parameters, start = learned(by_hand), copied(by_hand)
    mean = {n: torch.zeros_like(p) for n, p in parameters.items()}
    square = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for step in range(3):
        draws = torch.Generator().manual_seed(7 * 1_000_003 + step)
        loss = by_hand.model.loss(draw(step), by_hand.selector, objective, draws, relevance=LmEmbed())
        assert loss.item() == pytest.approx(losses[step], abs=1e-6)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        for name, parameter in parameters.items():
            top = 0.01 if "selector" in name else 0.002 if "newline" in name else 0.005
            rate = top * RATES.scale(step)
            g = gradients[name] * min(1.0, 0.5 / (norm + 1e-6))
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.95 * square[name] + 0.05 * g * g
            m, v = mean[name] / (1 - 0.8 ** (step + 1)), square[name] / (1 - 0.95 ** (step + 1))
            with torch.no_grad():
                parameter.copy_(parameter * (1 - rate * 0.1) - rate * m / (v.sqrt() + 1e-8))
    assert len(parameters) == 9
    for name, parameter in learned(by_lightning).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=1e-5)
        # A rate of another part, or none at all, would be far off.
        assert (parameter - start[name]).abs().max() > 1e-3, name


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Its checkpoint holds the trained tensors and nothing of the base."""
    whole, first, second = stage(), stage(), stage()
    fit(whole, 4)
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2)
    fit(first, 2, enable_checkpointing=True, callbacks=[keeper])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert stored.keys() == learned(first).keys() and not first.strict_loading
    fit(second, 4, resume=tmp_path / "last.ckpt")
    for name, tensor in learned(whole).items():
        torch.testing.assert_close(learned(second)[name], tensor, rtol=0, atol=1e-6)


def test_draws_depend_on_seed_and_step() -> None:
    seven, eight = fit(stage(), 2), fit(stage(seed=8), 2)
    assert seven[0] != pytest.approx(eight[0], abs=1e-4)
    assert fit(stage(), 2) == seven


@pytest.mark.parametrize("seed", [2**63 - 1, 20261126120000, 7])
def test_a_seed_may_be_as_large_as_a_config_allows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is folded into what torch can hold, also with the rank of a process; a small one stays as it is."""
    monkeypatch.setattr(LavidaModule, "global_rank", 3)
    (loss,) = fit(stage(seed=seed), 1)
    assert torch.initial_seed() == (seed * 1_000_003 + (3 << 40)) % 2**63
    draws = torch.Generator().manual_seed(seed * 1_000_003 % 2**63)
    by_hand = stage(seed=seed)
    assert by_hand.model.loss(draw(0), by_hand.selector, OBJECTIVE, draws).item() == pytest.approx(loss, abs=1e-6)


def test_what_does_not_learn_is_not_given_to_the_optimizer() -> None:
    module = stage()
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index]  # a dict here
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in module.parameters() if p.requires_grad}


def test_a_stage_must_have_a_loss() -> None:
    with pytest.raises(NotImplementedError, match="Trainable must say what the loss of a batch is"):
        Trainable(tiny_model(), OPTIM, 0).loss(None, torch.Generator())


def test_the_picture_is_encoded_once_for_both_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    module = one_layer(budget=10)
    calls = {"tower": 0, "projector": 0, "selector": 0}
    for name, part in (
        ("tower", module.model.model.vision_tower),
        ("projector", module.model.model.mm_projector),
        ("selector", module.selector),
    ):
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    masked = []

    def spy(model: Lavida, whole: Any, labels_BL: Tensor, *rest: Any, **more: Any) -> Tensor:
        masked.append(len(labels_BL))
        return draw_loss(model, whole, labels_BL, *rest, **more)

    monkeypatch.setattr(lavida_adapter.loss, "draw_loss", spy)
    # Both pictures on one canvas: one group.
    data = TrainBatch([draw(0).images[0]] * 2, ["digit red", "letter K"], ["7", "blue"], ["a", "b"])
    module.model.loss(data, module.selector, OBJECTIVE, torch.Generator())
    assert OBJECTIVE.complementary and masked == [2]
    assert calls == {"tower": 1, "projector": 1, "selector": 1}


def test_the_selector_of_a_step() -> None:
    small, large = Random(budget=4), Random(budget=9)
    schedule = SelectorSchedule(((small, large), (Pooled(),)))
    chosen = [schedule.at(seed=3, step=step) for step in range(60)]
    assert all(isinstance(s, Pooled) for s in chosen[1::2])
    assert chosen == [schedule.at(3, step) for step in range(60)]
    assert 8 <= sum(s is small for s in chosen[::2]) <= 22
    assert chosen != [schedule.at(4, step) for step in range(60)]


def test_a_run_trains_with_the_selector_of_each_step() -> None:
    schedule = SelectorSchedule(((Random(budget=4), Random(budget=9), Pooled()),))
    losses = fit(one_layer(mix=schedule), 4)
    by_hand = one_layer()
    optimizer = by_hand.configure_optimizers()["optimizer"]  # type: ignore[index]  # a dict here
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * ONE_RATE.scale(step)
        draws = torch.Generator().manual_seed(7 * 1_000_003 + step)
        optimizer.zero_grad()
        loss = by_hand.model.loss(draw(step), schedule.at(7, step), OBJECTIVE, draws)
        assert loss.item() == pytest.approx(losses[step], abs=1e-6)
        loss.backward()
        nn.utils.clip_grad_norm_(list(learned(by_hand).values()), 0.5)
        optimizer.step()


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(
    gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = one_layer(), one_layer()
    fit(good, 2)
    poisoned(monkeypatch, 3, gradient=gradient)
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2)
    what = "gradient" if gradient else "loss"
    sentence = rf"the {what} of step 3 is (nan|inf), with the samples 3a, 3b: stopped before it was used; last good "
    with pytest.raises(ValueError, match=sentence + f"checkpoint: {tmp_path / 'last.ckpt'}; lower optim.lr="):
        fit(bad, 5, enable_checkpointing=True, callbacks=[keeper])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    for name, tensor in learned(good).items():
        assert torch.equal(stored["state_dict"][name], tensor)
    assert all(p.isfinite().all() for p in bad.parameters())


def test_before_the_first_checkpoint_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 0, gradient=False)
    with pytest.raises(ValueError, match="the loss of step 0 is nan, .* last good checkpoint: none was written yet"):
        fit(one_layer(), 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_narrow_base_is_trained_in_wide_numbers(precision: str) -> None:
    """LoRA on one layer of the projector, the other whole, the newline whole: all float32 over bfloat16."""
    lora = LoraConfig(rank=2, targets=("mm_projector.0",), train_whole=("mm_projector.2", "image_newline"))
    narrow, wide = (stage(lora, optim=ONE_RATE, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {p.dtype for p in learned(narrow).values()} == {torch.float32}
    assert narrow.model.dtype == torch.bfloat16 == narrow.model.lm.head.weight.dtype
    start = copied(narrow)
    assert fit(narrow, 2, precision=precision) == pytest.approx(fit(wide, 2), rel=0.03)
    assert all((p - start[n]).abs().max() > 0 for n, p in learned(narrow).items() if "lora_A" not in n)
