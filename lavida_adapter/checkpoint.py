"""Checkpoints in the published layouts: loading, saving, and the comparison of their tensors with the model's.

docs/lavida.md, "Checkpoint layout". The model is built on the meta device and every tensor is read once, straight to
its device and dtype, so that loading never holds a second copy of the weights. huggingface_hub's `load_torch_model`
copies into memory that a meta model does not have, and its `load_state_dict_from_file` holds a whole file before a
change of dtype; neither reports all missing, unexpected and misshaped tensors in one error.

Names in errors are those of the published layout, which for LLaDA are also those of our modules.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from lavida_adapter.checkpoint_files import (
    StoredTensor,
    locate,
    open_tensors,
    read_json,
    saving,
    share_like,
    stored_tensors,
)
from lavida_adapter.config import LavidaConfig
from lavida_adapter.families import FAMILIES
from lavida_adapter.modules import LavidaModules
from lavida_adapter.published_config import unlike_published
from lavida_adapter.sharding import first_bits, in_all, is_split, own_rows, place
from lavida_adapter.tokenizer_files import load_tokenizer, n_rows
from lavida_adapter.tower_files import TOWER, with_tower
from shirg import MissingFileError, UserError

NEWLINE = "model.image_newline"
_LISTED = 20
"""How many names of one kind an error lists."""

M = TypeVar("M", bound=LavidaModules)


def load(
    cls: type[M],
    source: str | Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    revision: str | None = None,
    vision_path: str | Path | None = None,
    prepare: Callable[[M], None] | None = None,
) -> M:
    """Builds the model on the meta device, then reads every tensor once.

    `dtype`: a torch dtype, its name, or "auto" for the dtype of the stored embedding. Rows of embedding and head beyond
    the tokenizer's are cut off, as in the reference's inference. `revision` pins a version on the hub; `vision_path` is
    a SigLIP for a checkpoint that is stored without its tower. `prepare` is called with the model on the meta device:
    of weights that it splits over processes (`lavida_adapter.sharding.shard`) each process reads its own rows only.

    Raises:
        MissingFileError: no checkpoint there, or no weights in it.
        UserError: pickled weights, an unsupported config, tensors that do not fit (one error lists them all), or
            weights that are not finite.
    """
    folder = locate(source, revision=revision)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    stored = with_tower(stored_tensors(folder), vision_path, config.vision, folder)
    config = replace(config, lm=replace(config.lm, vocab_size=n_rows(tokenizer)))
    with torch.device("meta"):
        model = cls(config, tokenizer)
    published = published_names(model)
    shapes = {published[own]: tuple(tensor.shape) for own, tensor in model.state_dict().items()}
    embedding, head = (published[_name_of(model, layer.weight)] for layer in (model.lm.embedding, model.lm.head))
    absent = check_tensors(shapes, stored, folder, config, rows=(embedding, head))
    dtype = parse_dtype(dtype, stored[embedding].dtype)
    model.to(dtype)
    if prepare is not None:
        prepare(model)
    broken = in_all(model, _read(model, {name: own for own, name in published.items()}, stored, dtype, device))
    if broken:
        raise UserError(
            f"{folder} has NaN or infinity, as {str(dtype).removeprefix('torch.')}, in {_listed(broken)}: "
            "download the checkpoint again, or choose a wider dtype"
        )
    for name in absent:  # in most checkpoints, but never applied
        fill = torch.ones if name.endswith("norm.weight") else torch.zeros
        place(model, name, fill(shapes[name], device=device, dtype=dtype))
    model.model.vision_tower.number_positions(device)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"tensors without memory after loading {folder}: {', '.join(left)}")
    return model.eval()


def _read(
    model: nn.Module,
    own: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """Reads this process's rows of every tensor that the model has; returns the names of those that are not finite."""
    broken, split = [], is_split(model)
    for path in sorted({tensor.file for tensor in stored.values()}):
        with open_tensors(path) as file:
            for name in (n for n in own if n in stored and stored[n].file == path):
                rows = own_rows(model.get_parameter(own[name]))
                part = file.get_slice(stored[name].name)[rows]
                tensor = part.to(device=device, dtype=dtype)
                # On a CPU it is a view of the file: of all its rows, which could not be saved again, or with pages in
                # memory that belong to rows of another process.
                if split or len(tensor) < stored[name].shape[0]:
                    tensor = tensor.clone()
                # Smallest and largest number: one pass without memory of its own, and NaN is both.
                if not tensor.is_meta and not torch.stack(torch.aminmax(tensor)).isfinite().all():
                    broken.append(name)
                place(model, own[name], tensor)
    return broken


def published_names(model: LavidaModules) -> dict[str, str]:
    """Name of each tensor in our tree -> its name in the published layout."""
    family = FAMILIES[model.config.lm.family]
    return {name: family.published_name(name) for name in model.state_dict()}


def _name_of(model: nn.Module, parameter: Tensor) -> str:
    return next(name for name, p in model.named_parameters() if p is parameter)


def save(model: LavidaModules, folder: Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes to a temporary folder and then moves the files: an interrupted save leaves an old checkpoint intact."""
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        raise UserError("the model carries LoRA layers: merge them (lavida_adapter.merge_lora) before saving it whole")
    with saving(folder) as temporary:
        names = published_names(model)
        tensors = {names[own]: tensor.detach().cpu().contiguous() for own, tensor in state.items()}
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size)
        (temporary / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        model.tokenizer.save_pretrained(temporary)
        share_like(temporary / "config.json", *temporary.glob("*.safetensors"))
        new = {file.name for file in temporary.iterdir()}
        for old in folder.glob("model*.safetensors*"):
            if old.name not in new:
                old.unlink()
        for name in sorted(new):
            os.replace(temporary / name, folder / name)


def fingerprint(model: nn.Module, skip: tuple[str, ...] = ()) -> str:
    """SHA-256 over name, shape and the first 1,024 numbers (as bfloat16) of every base tensor; identifies the base.

    Cheap for 8 B parameters, and equal in every dtype at least as wide as the stored one. Adapters and the modules in
    `skip` are left out. Collective for a base that is split over processes, which is not gathered.
    """
    sha = hashlib.sha256()
    named = {name.replace(".base_layer", ""): t for name, t in model.named_parameters() if "lora_" not in name}
    base = {n: t for n, t in sorted(named.items()) if not any(n == s or n.startswith(s + ".") for s in skip)}
    for (name, tensor), head in zip(base.items(), first_bits(base.values(), 1024), strict=True):
        sha.update(f"{name}{tuple(tensor.shape)}".encode() + head.numpy().tobytes())
    return sha.hexdigest()


def read_config(folder: Path) -> LavidaConfig:
    """The config of a checkpoint; MissingFileError without a config.json."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise MissingFileError(f"{folder} has no config.json: it is not a checkpoint folder")
    config = LavidaConfig.from_dict(read_json(path))
    if unlike := unlike_published(config.lm):
        warnings.warn(f"{path} is followed, but differs from the published model: {', '.join(unlike)}", stacklevel=2)
    return config


def parse_dtype(dtype: torch.dtype | str, stored: torch.dtype | None) -> torch.dtype:
    """The dtype to load in; "auto" is the stored one, which is None if nothing can be computed in it.

    Raises:
        UserError: for a dtype that is not floating, or for "auto" without a stored one.
    """
    if dtype == "auto" and stored is None:
        raise UserError(
            "dtype=auto: the checkpoint stores its embedding in a dtype that cannot be computed in; choose float32, "
            "bfloat16 or float16"
        )
    found = stored if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype={dtype}: choose auto, float32, bfloat16 or float16")
    return found


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    folder: Path,
    config: LavidaConfig,
    *,
    rows: Collection[str],
) -> set[str]:
    """Compares names and shapes; returns the optional tensors that are absent.

    Accepted: more rows in the tensors of `rows`, a further vision layer or a pooling head (ignored), no
    post_layernorm, and no newline vector where pictures have no rows.

    Raises:
        UserError: one error that lists all missing, unexpected and misshaped tensors, and those of integers.
    """
    unpads = config.mm_patch_merge_type == "spatial_unpad"
    optional = {name for name in expected if "post_layernorm" in name or (name == NEWLINE and not unpads)}
    layer = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.")
    n_layers = 1 + max((int(m[1]) for name in expected if (m := layer.match(name))), default=-1)
    ignored = re.compile(re.escape(TOWER) + rf"(head\..*|encoder\.layers\.{n_layers}\..*|embeddings\.position_ids)")
    missing = sorted(expected.keys() - stored.keys() - optional)
    both = sorted(expected.keys() & stored.keys())
    wrong = []
    for name in both:
        want, have = expected[name], stored[name].shape
        longer = name in rows and len(have) == 2 and have[0] >= want[0] and have[1] == want[1]
        if have != want and not longer:
            wrong.append(f"{name} is {list(have)}, expected {'at least ' if name in rows else ''}{list(want)}")
    note = f"{NEWLINE} (which mm_patch_merge_type={config.mm_patch_merge_type} puts behind every row of a picture)"
    kinds = {
        "missing": [note if name == NEWLINE else name for name in missing],
        "of the wrong shape": wrong,
        "of integers (quantised weights are not supported)": [name for name in both if stored[name].of_integers],
        "unexpected": sorted(name for name in stored.keys() - expected.keys() if not ignored.fullmatch(name)),
    }
    problems = [f"{len(names)} {what}: {_listed(names)}" for what, names in kinds.items() if names]
    if problems:
        raise UserError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")
    return optional - stored.keys()


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
