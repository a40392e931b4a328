"""A model of given sizes with random weights: `model.config` in place of `model.path`."""

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter import Lavida


def random_model(
    sizes: dict[str, Any],
    seed: int,
    dtype: str,
    device: torch.device,
    prepare: "Callable[[Lavida], None] | None",
) -> "Lavida":
    """A model of the given sizes whose tokenizer is the built-in one; its config says that it is untrained."""
    from experiments.data.synthetic.tokenizer import build_tokenizer
    from lavida_adapter import Lavida, LavidaConfig, VisionConfig
    from lavida_adapter.published_config import LAYOUTS
    from lavida_adapter.sharding import draw

    for name in ("lm", "vision"):
        if not isinstance(sizes.setdefault(name, {}), dict):
            raise UserError(f"model.config.{name}={sizes[name]}: give sizes by name")
    lm_sizes = sizes.pop("lm")
    family = lm_sizes.get("family", "llada")
    layout = next((layout for name, layout in LAYOUTS.items() if name == family), None)
    if layout is None:
        raise UserError(f"model.config.lm.family={family}: choose one of {', '.join(LAYOUTS)}")
    tokenizer = build_tokenizer(family)
    special = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        vision = VisionConfig(**sizes.pop("vision"))
        lm = layout.config(**{**special, **lm_sizes})
        if "image_grid_pinpoints" in sizes:
            sizes["image_grid_pinpoints"] = tuple((w, h) for w, h in sizes["image_grid_pinpoints"])
        config = LavidaConfig(vision=vision, lm=lm, trained=False, **sizes)
    except TypeError as error:
        raise UserError(
            f"model.config: {re.sub(r'.*got an unexpected keyword argument', 'no model has a field', str(error))}"
        ) from None
    if lm.vocab_size < len(tokenizer):
        raise UserError(f"model.config.lm.vocab_size={lm.vocab_size}: the tokenizer has {len(tokenizer)} entries")
    with torch.device("meta"):
        model = Lavida(config, tokenizer).to(getattr(torch, dtype))
    if prepare is not None:
        prepare(model)
    if device.type != "meta":
        check_memory(model, device)
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            draw(model, device)
        finally:
            torch.set_rng_state(generator_state)
    return model


def check_memory(model: "Lavida", device: torch.device) -> None:
    """Refuses a model whose weights, or what this process holds of them, are larger than the memory of the device."""
    from lavida_adapter.sharding import held

    need = sum(held(p).nbytes for p in model.parameters())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        n = sum(p.numel() for p in model.parameters())
        raise UserError(
            f"model.config: {n:,} parameters need {need / 2**30:,.0f} GiB, and {device} has {there / 2**30:,.0f} GiB: "
            "choose smaller sizes"
        )
