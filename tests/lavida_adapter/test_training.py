"""What a training run is made of: rates by part, budgets by step, one encoding for both copies, a stop before a NaN."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lavida_adapter.loss
from baselines import Pooled, Random
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora, load_adapter, merge_lora
from lavida_adapter import save_adapter as save
from lavida_adapter.lightning_module import LavidaModule, OptimConfig, SelectorSchedule
from lavida_adapter.loss import draw_loss
from lavida_adapter.relevance import LmEmbed
from shirg import Selector, ShirgSelector
from tests.lavida_adapter.test_module import _Losses, draw, fit, trained
from tests.lavida_adapter.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Be aware that when using `ckpt_path`")
OBJECTIVE = ObjectiveConfig(extra_padding=4)
COORDS = LoraConfig(
    rank=3,
    targets=("mm_projector.0", "transformer.blocks.*.q_proj", "selector.coords.linear"),
    ranks={"selector": 2},
    train_whole=("image_newline",),
)
RATES = OptimConfig(
    steps=4, lr=0.005, warmup=2, weight_decay=0.1, betas=(0.8, 0.95), rates={"selector": 0.01, "image_newline": 0.002}
)


PLAIN = LoraConfig(rank=2, targets=("mm_projector.0",))
RATES_PLAIN = OptimConfig(steps=5, lr=0.02, warmup=2)


def gate(**knobs: Any) -> ShirgSelector:
    defaults: dict[str, Any] = {"budget": 10, "scaffold": {"size": 2}, "newline": "row"}
    return ShirgSelector(**defaults | {"coord_embed": "sincos_linear", "coord_width": 16} | knobs)


def module(
    lora: LoraConfig = COORDS, selector: Selector | None = None, optim: OptimConfig = RATES, **knobs: Any
) -> LavidaModule:
    model, selector = tiny_model(), selector or gate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, lora, selector)
    objective = knobs.pop("objective", OBJECTIVE)
    return LavidaModule(model.train(), selector, LmEmbed(), objective, optim, 7, **knobs)


def plain(budget: int = 6, **knobs: Any) -> LavidaModule:
    """LoRA on one layer behind random tokens."""
    return module(PLAIN, Random(budget=budget), RATES_PLAIN, **knobs)


def learned(stage: LavidaModule) -> dict[str, nn.Parameter]:
    return {n: p for n, p in stage.named_parameters() if p.requires_grad}


def test_a_step_by_hand() -> None:
    """Clipping, AdamW, warm-up and rates of parts, written out; the same draws."""
    by_lightning, by_hand = module(), module()
    fit(by_lightning, 3)
    parameters = learned(by_hand)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    mean = {n: torch.zeros_like(p) for n, p in parameters.items()}
    square = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for step in range(3):
        draws = torch.Generator().manual_seed(7 * 1_000_003 + step)
        loss = by_hand.model.loss(draw(step), by_hand.selector, OBJECTIVE, draws, relevance=LmEmbed())
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
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=1e-6)
        # A rate of another part, or none at all, would be far off.
        assert (parameter - start[name]).abs().max() > 1e-3, name


def test_rates_of_parts_that_are_not_trained() -> None:
    for rates, sentence in (
        ({"vision_tower": 1e-3}, "optim.rates.vision_tower: nothing of it is trained; take it out, or train it"),
        ({"projector": 1e-3}, "optim.rates.projector: no such part, the nearest is mm_projector"),
        ({"selector": 0.0}, "give rates above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            module(optim=OptimConfig(steps=4, lr=0.02, rates=rates)).configure_optimizers()


def test_the_selectors_layer_is_kept_with_the_adapter(tmp_path: Path) -> None:
    stage = module()
    fit(stage, 3)
    selector = stage.selector
    save(stage.model, COORDS, tmp_path, selector)
    again, other = tiny_model(), gate()
    assert load_adapter(again, tmp_path, other) == COORDS
    image, question = draw(0).images[:1], draw(0).questions[:1]
    before = stage.model.eval().encode(image, question, selector, relevance=LmEmbed()).embeds_BPD
    assert torch.equal(again.encode(image, question, other, relevance=LmEmbed()).embeds_BPD, before)
    merge_lora(again, other)
    merged = again.encode(image, question, other, relevance=LmEmbed()).embeds_BPD
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)
    silent = tiny_model().encode(image, question, gate(), relevance=LmEmbed()).embeds_BPD
    assert (silent - before).abs().max() > 1e-2
    assert not [n for n, _ in other.named_parameters() if "lora" in n]
    for without in (None, Pooled(), gate(coord_embed="none", coord_width=None)):
        with pytest.raises(
            ValueError, match="selector.coords.linear.lora_A.* a layer of a selector that this one does"
        ):
            load_adapter(tiny_model(), tmp_path, without)


def test_layers_of_a_selector_are_not_forgotten() -> None:
    with pytest.raises(ValueError, match="would stay as it begins, selector.coords.linear: add it to lora.targets"):
        module(PLAIN)
    with pytest.raises(ValueError, match="lora: 'selector.coords.linear' names nothing in this model"):
        module(COORDS, Pooled())
    with pytest.raises(ValueError, match="lora.ranks.vision_tower: lora.targets has no layer of it"):
        module(LoraConfig(rank=3, targets=("mm_projector.0",), ranks={"vision_tower": 2}), Pooled())


def test_the_picture_is_encoded_once_for_both_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = plain(budget=10)
    calls = {"tower": 0, "projector": 0, "selector": 0}
    for name, part in (
        ("tower", stage.model.model.vision_tower),
        ("projector", stage.model.model.mm_projector),
        ("selector", stage.selector),
    ):
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    masked = []

    def spy(model: Lavida, whole: Any, labels_BL: Tensor, *rest: Any, **more: Any) -> Tensor:
        masked.append(len(labels_BL))
        return draw_loss(model, whole, labels_BL, *rest, **more)

    monkeypatch.setattr(lavida_adapter.loss, "draw_loss", spy)
    # Both pictures on one canvas: one group.
    data = TrainBatch([draw(0).images[0]] * 2, ["digit red", "letter K"], ["7", "blue"], ["a", "b"])
    stage.model.loss(data, stage.selector, OBJECTIVE, torch.Generator())
    assert OBJECTIVE.complementary and masked == [2]
    assert calls == {"tower": 1, "projector": 1, "selector": 1}


def test_the_budget_of_a_step() -> None:
    small, large = Random(budget=4), Random(budget=9)
    mix = SelectorSchedule(((small, large), (Pooled(),)))
    chosen = [mix.at(seed=3, step=step) for step in range(60)]
    assert all(isinstance(s, Pooled) for s in chosen[1::2])
    assert chosen == [mix.at(3, step) for step in range(60)]
    assert 8 <= sum(s is small for s in chosen[::2]) <= 22
    assert chosen != [mix.at(4, step) for step in range(60)]


def test_a_run_trains_with_the_selector_of_each_step() -> None:
    mix = SelectorSchedule(((Random(budget=4), Random(budget=9), Pooled()),))
    losses: list[float] = []
    fit(plain(mix=mix), 4, callbacks=[_Losses(losses)])
    by_hand = plain()
    optimizer = by_hand.configure_optimizers()["optimizer"]  # type: ignore[index]  # a dict here
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * RATES_PLAIN.scale(step)
        draws = torch.Generator().manual_seed(7 * 1_000_003 + step)
        optimizer.zero_grad()
        loss = by_hand.model.loss(draw(step), mix.at(7, step), OBJECTIVE, draws)
        assert loss.item() == pytest.approx(losses[step], abs=1e-6)
        loss.backward()
        nn.utils.clip_grad_norm_(list(learned(by_hand).values()), 0.5)
        optimizer.step()


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int, *, gradient: bool) -> None:
    """From step `at` on the loss, or only its gradient, is NaN."""
    original = Lavida.loss

    def loss(self: Lavida, batch: TrainBatch, *rest: Any, **more: Any) -> Tensor:
        value = original(self, batch, *rest, **more)
        if int(batch.ids[0][:-1]) < at:
            return value
        return value + (value - value.detach()).abs().sqrt() if gradient else value * math.nan

    monkeypatch.setattr(Lavida, "loss", loss)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(
    gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = plain()
    fit(good, 2)
    poisoned(monkeypatch, 3, gradient=gradient)
    stage = plain()
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2)
    what = "gradient" if gradient else "loss"
    sentence = rf"the {what} of step 3 is (nan|inf), with the samples 3a, 3b: stopped before it was used; last good "
    with pytest.raises(ValueError, match=sentence + f"checkpoint: {tmp_path / 'last.ckpt'}; lower optim.lr="):
        fit(stage, 5, enable_checkpointing=True, callbacks=[keeper])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    for name, tensor in trained(good.model).items():
        assert torch.equal(stored["state_dict"][f"model.{name}"], tensor)
    assert all(p.isfinite().all() for p in stage.parameters())


def test_before_the_first_checkpoint_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 0, gradient=False)
    with pytest.raises(ValueError, match="the loss of step 0 is nan, .* last good checkpoint: none was written yet"):
        fit(plain(), 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_narrow_base_is_trained_in_wide_numbers(precision: str) -> None:
    """LoRA on one layer of the projector, the other whole, the newline whole: all float32 over bfloat16."""
    lora = LoraConfig(rank=2, targets=("mm_projector.0",), train_whole=("mm_projector.2", "image_newline"))
    model = tiny_model().to(torch.bfloat16)
    add_lora(model, lora)
    stage = LavidaModule(model.train(), Pooled(), None, OBJECTIVE, RATES_PLAIN, 7)
    assert {p.dtype for p in learned(stage).values()} == {torch.float32}
    assert model.dtype == torch.bfloat16 == model.lm.ff_out.weight.dtype
    start, losses = trained(model), []
    fit(stage, 2, precision=precision, callbacks=[_Losses(losses)])
    exact: list[float] = []
    wide = tiny_model()
    add_lora(wide, lora)
    fit(LavidaModule(wide.train(), Pooled(), None, OBJECTIVE, RATES_PLAIN, 7), 2, callbacks=[_Losses(exact)])
    assert losses == pytest.approx(exact, rel=0.03)
    assert all((p - start[n]).abs().max() > 0 for n, p in trained(model).items() if "lora_A" not in n)


def test_half_precision_without_range_is_refused() -> None:
    model = tiny_model().to(torch.float16)
    add_lora(model, PLAIN)
    with pytest.raises(ValueError, match="dtype=float16 loses small gradients in training: choose dtype=bfloat16"):
        LavidaModule(model, Pooled(), None, OBJECTIVE, RATES_PLAIN, 7)
