"""The parts of LaViDa as one module tree: language model, vision tower, projector, newline vector.

The names of the tree are those of the published checkpoint, so that weights, LoRA targets and adapters need no map.
Encoding, decoding and training live above this file and take its `LavidaModules`.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from lavida_adapter.config import LavidaConfig
from lavida_adapter.families import FAMILIES
from lavida_adapter.language_model import LanguageModel, draw_normal
from lavida_adapter.vision import VisionTower, build_projector

P = ParamSpec("P")
T = TypeVar("T")


class _Parts(nn.Module):
    """The four parts, under the names of the published checkpoint."""

    def __init__(self, config: LavidaConfig) -> None:
        super().__init__()
        self.transformer = FAMILIES[config.lm.family].language_model(config.lm)
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = build_projector(config.vision.hidden_size, config.lm.d_model)
        self.image_newline = nn.Parameter(torch.empty(config.lm.d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the newline vector, as torch's own modules draw theirs."""
        self.image_newline.normal_().mul_(len(self.image_newline) ** -0.5)


class LavidaModules(nn.Module):
    """Config, tokenizer and parameters of a LaViDa model, without what is done with them."""

    def __init__(self, config: LavidaConfig, tokenizer: Any) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.base: str | None = None
        """The fingerprint of the weights before an adapter was added, once one was."""
        self.model = _Parts(config)
        # In a tuple: it is none of the model's parts, has no name in a checkpoint and no fingerprint.
        self._base_projector: tuple[nn.Module, ...] = ()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random embeddings with the standard deviations of the config; all other layers have drawn their own."""
        config = self.config
        draw_normal(self.lm.embedding.weight, config.lm.emb_std)
        positions = self.model.vision_tower.vision_tower.vision_model.embeddings.position_embedding
        nn.init.normal_(positions.weight, std=config.vision.hidden_size**-0.5)

    @property
    def lm(self) -> LanguageModel:
        """The language model."""
        return self.model.transformer

    @property
    def base_projector(self) -> nn.Module:
        """The projector as it was before an adapter changed it; the projector itself, where none did."""
        return self._base_projector[0] if self._base_projector else self.model.mm_projector

    def keep_base(self, changed: Collection[str], fingerprint: Callable[[nn.Module], str]) -> None:
        """Keeps what an adapter will change, the first time: the fingerprint, and a frozen copy of the projector.

        Args:
            changed: names of layers and parameters, as `lora.targets` has them. The projector is copied if it is one.
            fingerprint: identifies weights.
        """
        if self.base is None and self.device.type != "meta":
            self.base = fingerprint(self)
        if not self._base_projector and any(name.startswith("mm_projector") for name in changed):
            self._base_projector = (copy.deepcopy(self.model.mm_projector).requires_grad_(False),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the copy with the model."""
        for kept in self._base_projector:
            kept._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return self.model.image_newline.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weights; trained parameters may be float32 beside a bfloat16 base."""
        return self.lm.embedding.weight.dtype

    def enter(self, compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `compute` returns, a function that calls parts of the model.

        A model that is split over processes must be entered as a whole before its parts are (sharding.py).
        """
        return compute(*args, **kwargs)

    def checkpoint_gradients(self, on: bool) -> None:
        """Gradient checkpointing: blocks of tower and language model run again in the backward pass.

        This takes less memory and about a third more time.
        """
        self.lm.recompute = self.model.vision_tower.recompute = on

    def visual(self, visual_BL: Tensor) -> Tensor | None:
        """The mask of picture tokens for `prefix_attention=image_first`; None for a fully bidirectional prefix."""
        return visual_BL if self.config.prefix_attention == "image_first" else None
