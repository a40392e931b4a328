"""The model of a bench, from `conf/model`, with what its stages cost."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from experiments import build
from experiments.cli import explain
from experiments.roofline import Limits, Work, measure_limits
from experiments.schema import CONF, VERSION_BASE

if TYPE_CHECKING:
    from lavida_adapter import Lavida


def config_of(*overrides: str) -> DictConfig:
    """What eval would be given."""
    try:
        with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            return compose("eval", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, "eval", overrides)) from None


def load_model(name: str, device: torch.device, attention: str = "sdpa") -> "Lavida":
    """Weights of a checkpoint, or random ones made on the device itself."""
    return build.build_model(config_of(f"model={name}", f"attention={attention}"), device)


def prompt_embeds(model: "Lavida", batch: int, n: int) -> Tensor:
    """Noise of the size of the model's own word embeddings [B, P, D]: every row different."""
    weight = model.lm.wte.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(batch, n, weight.shape[1], generator=generator, device=weight.device)
    return (noise * weight.float().std()).to(weight.dtype)


@dataclass(frozen=True)
class Floor:
    """What the device cannot beat, and how far from it a time is."""

    limits: Limits

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Floor":
        return cls(measure_limits(device, dtype))

    def row(self, ms: float, work: Work) -> dict[str, Any]:
        floor = self.limits.floor_ms(work)
        return {"gflop": work.flops / 1e9, "mb": work.bytes / 1e6, "floor_ms": floor, "times_floor": ms / floor}
