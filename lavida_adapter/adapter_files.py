"""The files of a trained adapter, in peft's own layout.

    adapter_config.json         peft's LoraConfig: which layers have which rank. Missing when nothing has LoRA.
    adapter_model.safetensors   the trained tensors, named as peft names them
    adapter.json                "lora": our LoraConfig, with its patterns; "base": the fingerprint of the base weights;
                                "family": the language model

`peft.PeftModel.from_pretrained(model, folder)` loads the first two on a model whose modules have the published names,
and gives the same weights. A `Lavida` on LLaDA is one; Dream's names differ from those of our modules. Parameters that
are trained in full are stored beside LoRA's, under their own names, as peft stores embedding layers that it saves
whole; peft's `modules_to_save` is for modules and cannot hold the newline vector, which is a bare parameter. A trained
layer of a selector has a name that begins with "selector."; peft ignores those, and the selector has to be given to
`load_adapter`.

Until adapters had this layout, the tensors were in `adapter.safetensors`, under the names of the model's tree. Such
folders are still read.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import peft
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.checkpoint_files import read_json, saving, share_like
from lavida_adapter.families import FAMILIES
from lavida_adapter.lora import (
    LoraConfig,
    add_lora,
    full_name,
    lora_targets,
    part_of,
    peft_config,
    trained_parameters,
    trained_whole,
    tree_of,
)
from lavida_adapter.modules import LavidaModules
from shirg import MissingFileError, Selector, UserError

META = "adapter.json"
OLD_WEIGHTS = "adapter.safetensors"
_PREFIX = "base_model.model."
"""What peft writes before every name in the file."""


def save_adapter(
    model: LavidaModules,
    config: LoraConfig,
    folder: str | Path,
    selector: Selector | None = None,
    *,
    base: str | None = None,
) -> None:
    """Writes the trained tensors, their config and the base's fingerprint; an adapter in the folder is replaced.

    `base`: the fingerprint, if it is known. That of a base that is split over processes is computed by all of them.
    """
    folder = Path(folder)
    family = model.config.lm.family
    published = FAMILIES[family].published_name
    trained = _trained_tensors(model, selector)
    tensors = {_PREFIX + published(n): p.detach().cpu().contiguous() for n, p in trained.items()}
    base = base_fingerprint(model, config, selector) if base is None else base
    meta = {"lora": asdict(config), "base": base, "family": family}
    with saving(folder) as temporary:
        save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if targets := lora_targets(tree_of(model, selector), config):
            loaded = peft_config(config, targets, published)
            loaded.inference_mode = True
            loaded.save_pretrained(str(temporary))
        (temporary / META).write_text(json.dumps(meta, indent=2))
        share_like(temporary / META, temporary / SAFETENSORS_WEIGHTS_NAME)
        # Without META a folder holds no adapter: a kill from here on leaves none, never files of two adapters.
        for name in (META, CONFIG_NAME, OLD_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, META):
            if (temporary / name).exists():
                (temporary / name).replace(folder / name)


def load_adapter(model: LavidaModules, folder: str | Path, selector: Selector | None = None) -> LoraConfig:
    """Adds a saved adapter to its base model, and the trained layers of a selector to a selector of the same kind.

    Raises:
        MissingFileError: the folder holds no adapter.
        UserError: the adapter belongs to another base or selector, or its tensors do not fit.
    """
    folder = Path(folder)
    path = weights_file(folder)
    try:
        meta = read_json(folder / META)
        config, base, family = LoraConfig.from_dict(meta["lora"]), meta["base"], meta.get("family", "llada")
        tensors = load_file(path)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read ({error}): train it again") from error
    if broken := [n for n, t in tensors.items() if not (t.is_floating_point() and t.float().isfinite().all())]:
        raise UserError(f"{path} has NaN, infinity or whole numbers in {broken[0]}: train it again")
    if path.name == OLD_WEIGHTS:
        tensors = {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    own = sorted(name for name in tensors if part_of(name) == "selector")
    if own and (selector is None or not any(True for _ in selector.parameters())):
        raise UserError(
            f"the adapter in {folder} holds {own[0]}, a layer of a selector that this one does not have: give the "
            "selector's options as train.py printed them"
        )
    if family != model.config.lm.family:
        raise UserError(
            f"the adapter in {folder} was trained on another language model, {family}, and this one is "
            f"{model.config.lm.family}: load a model of that kind (model=)"
        )
    if base != base_fingerprint(model, config, selector):
        raise UserError(f"the adapter in {folder} was trained on another base checkpoint: load that one (model.path=)")
    add_lora(model, config, selector)
    wanted = _trained_tensors(model, selector)
    stored = {n: FAMILIES[family].published_name(n) for n in wanted}
    if tensors.keys() != set(stored.values()) or any(tensors[stored[n]].shape != p.shape for n, p in wanted.items()):
        raise UserError(f"the tensors in {path} are not those that its {META} describes")
    peft.set_peft_model_state_dict(_peft_tree(model, selector), {n: tensors[stored[n]] for n in wanted})
    return config


def weights_file(folder: Path) -> Path:
    """The file with the tensors of an adapter, in the layout of today or the one before.

    Raises:
        MissingFileError: the folder holds no adapter.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, OLD_WEIGHTS):
        if os.path.isfile(folder / name) and os.path.isfile(folder / META):
            return folder / name
    raise MissingFileError(
        f"{folder!s:.200} holds no adapter ({META} and {SAFETENSORS_WEIGHTS_NAME}): give the folder that train.py named"
    )


def holds_selector(folder: Path) -> bool:
    """Whether an adapter has trained layers of a selector; raises what `weights_file` raises."""
    try:
        with safe_open(weights_file(folder), framework="pt") as file:
            return any(part_of(name.removeprefix(_PREFIX)) == "selector" for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"the adapter in {folder} cannot be read ({error}): train it again") from error


def base_fingerprint(model: LavidaModules, config: LoraConfig, selector: Selector | None = None) -> str:
    """Fingerprint of the frozen weights; parameters that are trained in full are left out."""
    return fingerprint(model, skip=tuple(full_name(name) for name in trained_whole(tree_of(model, selector), config)))


def _trained_tensors(model: LavidaModules, selector: Selector | None) -> dict[str, Tensor]:
    """The trained parameters of model and selector, by peft's names for them, which leave out the adapter's name."""
    trained: dict[str, Tensor] = {**trained_parameters(model, selector)}
    lora = peft.get_peft_model_state_dict(_peft_tree(model, selector), state_dict=trained, save_embedding_layers=False)
    whole = {name: tensor for name, tensor in trained.items() if "lora_" not in name}
    return {**lora, **whole}


def _peft_tree(model: LavidaModules, selector: Selector | None) -> nn.ModuleDict:
    """Model and selector as a tree that peft's functions for state dicts accept."""
    tree = tree_of(model, selector)
    # It says that the method is LoRA; peft finds the layers themselves by their type.
    tree.peft_config = {"default": peft.LoraConfig()}  # type: ignore[assignment]
    return tree
