"""Reading and writing checkpoints in the published layout: config.json, safetensors, tokenizer files.

docs/lavida.md, "Checkpoint layout". Nothing in a checkpoint is ever executed: pickle files are refused, and tokenizers
are read from their JSON.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lavida_adapter.config import LavidaConfig
from lavida_adapter.prompt import CONTROL
from lavida_adapter.stored import WTE, check_tensors, first_line, open_tensors, read_headers, read_json, tensor_files

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida

M = TypeVar("M", bound="Lavida")


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint: a local one as it is, anything else as a hub repository."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise FileNotFoundError(f"model.path={source}: no such checkpoint folder")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise FileNotFoundError(
            f"model.path={source}: no such folder here, and the hub did not deliver it ({type(error).__name__}); "
            "download the checkpoint once and give its folder"
        ) from error


def load(cls: type[M], source: str | Path, *, dtype: torch.dtype | str, device: torch.device) -> M:
    """Builds a model without memory, then reads every tensor once, straight to its place.

    `dtype` is a torch dtype, its name, or "auto" for the one in which the embedding is stored. Rows of the embedding
    and the head beyond the tokenizer's are cut off, as the reference's inference does.

    Raises:
        FileNotFoundError: no checkpoint there, or no weights in it.
        ValueError: pickled weights, an unsupported config, or tensors that do not fit; one error lists them all.
    """
    folder = locate(source)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    check_tokens(config, tokenizer, folder)
    where = tensor_files(folder)
    shapes, stored = read_headers(where)
    config = replace(config, lm=replace(config.lm, vocab_size=n_rows(tokenizer)))
    with torch.device("meta"):
        model = cls(config, tokenizer)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent = check_tensors(expected, shapes, folder)
    dtype = parse_dtype(dtype, stored[WTE])
    for path in sorted(set(where.values())):
        with open_tensors(path) as file:
            for name in (n for n, p in where.items() if p == path and n in expected):
                tensor = file.get_slice(name)[: expected[name][0]]
                _assign(model, name, tensor.to(device=device, dtype=dtype))
    for name in absent:  # post_layernorm: stored by most checkpoints, applied by none
        fill = torch.ones if name.endswith("weight") else torch.zeros
        _assign(model, name, fill(expected[name], device=device, dtype=dtype))
    positions = torch.arange(config.vision.side**2, device=device).expand(1, -1)
    embeddings = model.model.vision_tower.vision_tower.vision_model.embeddings
    embeddings.register_buffer("position_ids", positions, persistent=False)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"tensors without memory after loading {folder}: {', '.join(left)}")
    return model.eval()


def parse_dtype(dtype: torch.dtype | str, stored: torch.dtype | None) -> torch.dtype:
    """A floating type, by itself or by name; "auto" is the stored one, None where nothing is computed in that.

    Raises:
        ValueError: for what is no floating type, or for "auto" without a stored one.
    """
    if dtype == "auto" and stored is None:
        raise ValueError(
            "dtype=auto: the checkpoint stores its embedding in a type that cannot be computed in; choose float32, "
            "bfloat16 or float16"
        )
    found = stored if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype}: choose auto, float32, bfloat16 or float16")
    return found


def read_config(folder: Path) -> LavidaConfig:
    """The config of a checkpoint; FileNotFoundError where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint folder")
    return LavidaConfig.from_dict(read_json(path))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, from its tokenizer.json; never another one in its place."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json: copy the tokenizer files of the checkpoint there")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the reader raises the bare Exception for a broken file
        raise ValueError(f"the tokenizer files in {folder} cannot be read: {first_line(error)}") from error


def check_tokens(config: LavidaConfig, tokenizer: Any, folder: Path) -> None:
    """The tokenizer must have the tokens of the prompt, and config.json its ids of the special ones."""
    known = tokenizer.get_added_vocab()
    absent = [token for token in CONTROL if token not in known]
    if absent:
        raise ValueError(f"the tokenizer in {folder} lacks {', '.join(absent)}: it is not LLaDA's")
    for token, name in (("<|mdm_mask|>", "mask_token_id"), ("<|endoftext|>", "eos_token_id")):
        if (told := getattr(config.lm, name)) != known[token]:
            raise ValueError(f"{folder}: config.json says {name}={told}, but the tokenizer's {token} is {known[token]}")


def n_rows(tokenizer: Any) -> int:
    """Rows of the embedding that the tokenizer can ask for: its length, unless its added tokens leave gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_added_vocab().values()))


def save(model: "Lavida", folder: Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes a checkpoint beside its place and then moves it in: an interrupted save leaves the old one as it was."""
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        raise ValueError("the model carries LoRA layers: merge them (lavida_adapter.merge_lora) before saving it whole")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size)
        (temporary / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        model.tokenizer.save_pretrained(temporary)
        folder.mkdir(exist_ok=True)
        new = {file.name for file in temporary.iterdir()}
        for old in folder.glob("model*.safetensors*"):
            if old.name not in new:
                old.unlink()
        for name in sorted(new):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)


def fingerprint(model: nn.Module, skip: tuple[str, ...] = ()) -> str:
    """SHA-256 over name, shape and the first 1,024 numbers (as bfloat16) of every base tensor: which base is this?

    Cheap at 8 B parameters, the same in every dtype at least as wide as the stored one, blind to adapters and to the
    modules named by `skip`.
    """
    sha = hashlib.sha256()
    base = ((name.replace(".base_layer", ""), t) for name, t in model.named_parameters() if "lora_" not in name)
    for name, tensor in sorted(base, key=lambda pair: pair[0]):
        if any(name == s or name.startswith(s + ".") for s in skip):
            continue
        head = tensor.detach().reshape(-1)[:1024].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        sha.update(f"{name}{tuple(tensor.shape)}".encode() + head.tobytes())
    return sha.hexdigest()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
