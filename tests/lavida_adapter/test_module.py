"""Training with Lightning: schedule, checkpoints, and a step that equals plain torch."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from baselines import Pooled
from experiments.data.loader import TrainData
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.lightning_module import LavidaModule, OptimConfig, Trainable
from tests.lavida_adapter.tiny import picture, tiny_model

# Lightning's own: a deprecated call to torch, and a reminder about callbacks that a resumed run does without.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Be aware that when using `ckpt_path`")
LORA = LoraConfig(rank=2, targets=("mm_projector.{0,2}", "transformer.blocks.*.q_proj"), train_whole=("image_newline",))
OPTIM = OptimConfig(steps=6, lr=0.05, warmup=2, weight_decay=0.1)
OBJECTIVE = ObjectiveConfig(extra_padding=4, prefix_mask=True)


def draw(step: int) -> TrainBatch:
    words = ("red", "green", "blue")
    return TrainBatch(
        images=[picture((40, 40), seed=step), picture((38, 16), seed=step)],
        questions=[f"digit {words[step % 3]}", "letter K"],
        answers=[str(step), "blue"],
        ids=[f"{step}a", f"{step}b"],
    )


def stage(seed: int = 7) -> LavidaModule:
    model = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for the A matrices
        add_lora(model, LORA)
    return LavidaModule(model.train(), Pooled(), None, OBJECTIVE, OPTIM, seed)


def fit(module: L.LightningModule, steps: int, *, resume: Path | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False} | options),
    )
    trainer.fit(module, datamodule=TrainData(draw, steps), ckpt_path=resume)
    return trainer


def trained(model: Lavida) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    optim = OptimConfig(steps=110, lr=1.0, warmup=10, lr_floor=0.1)
    assert [optim.scale(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert optim.scale(10) == 1.0
    assert optim.scale(60) == pytest.approx(0.55)
    assert optim.scale(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert optim.scale(110) == pytest.approx(0.1) == optim.scale(500)
    assert OptimConfig(steps=5, lr=1.0, lr_floor=1.0).scale(3) == 1.0
    assert OptimConfig(steps=5, lr=1.0, warmup=5).scale(5) == 1.0


@pytest.mark.parametrize(
    "knobs", [{"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"warmup": 11}, {"warmup": -1}, {"lr_floor": 1.1}]
)
def test_impossible_schedules(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="training needs steps >= 1, lr > 0, 0 <= warmup <= steps and 0 <= lr_floor"):
        OptimConfig(**({"steps": 10, "lr": 1.0} | knobs))


def test_steps_equal_plain_torch() -> None:
    """Three steps by hand: the same draws, clipping, AdamW and schedule."""
    module, model = stage(), stage().model
    start = trained(model)
    losses = []
    fit(module, 3, callbacks=[_Losses(losses)])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, betas=(0.9, 0.98), weight_decay=0.1
    )
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * OPTIM.scale(step)
        draws = torch.Generator().manual_seed(7 * 1_000_003 + step)
        loss = model.loss(draw(step), Pooled(), OBJECTIVE, draws)
        assert loss.item() == pytest.approx(losses[step], abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
    by_hand, by_lightning = trained(model), trained(module.model)
    assert by_hand.keys() == by_lightning.keys()
    for name, tensor in by_hand.items():
        torch.testing.assert_close(by_lightning[name], tensor, rtol=0, atol=1e-6)
        assert (tensor - start[name]).abs().max() > 1e-3, name


class _Losses(L.Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Its checkpoint holds the trained tensors and nothing of the base."""
    whole = stage()
    fit(whole, 4)
    first = stage()
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2)
    fit(first, 2, enable_checkpointing=True, callbacks=[keeper])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.removeprefix("model.") for name in stored} == trained(first.model).keys()
    second = stage()
    fit(second, 4, resume=tmp_path / "last.ckpt")
    for name, tensor in trained(whole.model).items():
        torch.testing.assert_close(trained(second.model)[name], tensor, rtol=0, atol=1e-6)


def test_checkpoints_keep_what_is_trained() -> None:
    module = stage()
    checkpoint = {"state_dict": module.state_dict()}
    assert len(checkpoint["state_dict"]) > 60
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not module.strict_loading


def test_draws_depend_on_seed_and_step() -> None:
    losses: dict[int, list[float]] = {seed: [] for seed in (7, 8)}
    for seed, found in losses.items():
        fit(stage(seed), 2, callbacks=[_Losses(found)])
    assert losses[7][0] != pytest.approx(losses[8][0], abs=1e-4)
    again: list[float] = []
    fit(stage(7), 2, callbacks=[_Losses(again)])
    assert again == losses[7]


def test_what_does_not_learn_is_not_given_to_the_optimizer() -> None:
    module = stage()
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index]  # a dict here
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in module.parameters() if p.requires_grad}
    module.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing requires a gradient: there is nothing to train"):
        module.configure_optimizers()


def test_a_stage_must_have_a_loss() -> None:
    with pytest.raises(NotImplementedError, match="Trainable must say what the loss of a batch is"):
        Trainable(tiny_model(), OPTIM, 0).loss(None, torch.Generator())
