"""An adapter as a file: the trained tensors alone, how they were made, and the base that they belong to.

docs/method.md, "Recipes".
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.lora import LoraConfig, add_lora, full_name, trained_parameters, trained_whole, tree_of
from lavida_adapter.targets import part_of
from shirg import Selector

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida

ADAPTER, META = "adapter.safetensors", "adapter.json"


def save_adapter(model: "Lavida", config: LoraConfig, folder: str | Path, selector: Selector | None = None) -> None:
    """Writes the trained tensors alone, with their configuration and the fingerprint of the base."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().cpu().contiguous() for n, p in trained_parameters(model, selector).items()}
    meta = {"lora": asdict(config), "base": base_fingerprint(model, config, selector)}
    for name, write in (
        (ADAPTER, lambda p: save_file(tensors, p)),
        (META, lambda p: p.write_text(json.dumps(meta, indent=2))),
    ):
        temporary = folder / f".{name}"
        write(temporary)
        temporary.replace(folder / name)


def load_adapter(model: "Lavida", folder: str | Path, selector: Selector | None = None) -> LoraConfig:
    """Puts a saved adapter on its base, and what it trained of a selector on a selector of the same kind.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter belongs to another base or selector, or its tensors do not fit.
    """
    folder = Path(folder)
    if not (folder / META).is_file() or not (folder / ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter ({META} and {ADAPTER}): give the folder that train.py named"
        )
    try:
        meta = json.loads((folder / META).read_text())
        config, base = LoraConfig.from_dict(meta["lora"]), meta["base"]
        tensors = load_file(folder / ADAPTER)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} cannot be read ({error}): train it again") from error
    if own := sorted(name for name in tensors if part_of(name) == "selector"):
        if selector is None or not any(True for _ in selector.parameters()):
            raise ValueError(
                f"the adapter in {folder} holds {own[0]}, a layer of a selector that this one does not have: give the "
                "selector's knobs as train.py printed them"
            )
    if base != base_fingerprint(model, config, selector):
        raise ValueError(f"the adapter in {folder} was trained on another base checkpoint: load that one (model.path=)")
    add_lora(model, config, selector)
    wanted = trained_parameters(model, selector)
    if tensors.keys() != wanted.keys() or any(tensors[n].shape != p.shape for n, p in wanted.items()):
        raise ValueError(f"the tensors in {folder / ADAPTER} are not those that its {META} describes")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return config


def base_fingerprint(model: "Lavida", config: LoraConfig, selector: Selector | None = None) -> str:
    """Fingerprint of what the adapter leaves as it is; the parameters trained whole are not part of it."""
    return fingerprint(model, skip=tuple(full_name(name) for name in trained_whole(tree_of(model, selector), config)))
