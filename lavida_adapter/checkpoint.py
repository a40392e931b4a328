"""Checkpoints in the published layout: loading, saving, and the checks of their files (docs/lavida.md).

Only safetensors files are read. The model is built on the meta device and every tensor is read once, straight to its
device and dtype, so that loading never holds a second copy of the weights. huggingface_hub's `load_torch_model` copies
into memory that a meta model does not have, and its `load_state_dict_from_file` holds a whole file before a change of
dtype; neither reports all missing, unexpected and misshaped tensors in one error.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lavida_adapter.config import LavidaConfig
from lavida_adapter.modules import LavidaModules
from lavida_adapter.prompt import CONTROL
from shirg import MissingFileError, UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
_VISION = "model.vision_tower.vision_tower.vision_model."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

M = TypeVar("M", bound=LavidaModules)


def load(cls: type[M], source: str | Path, *, dtype: torch.dtype | str, device: torch.device) -> M:
    """Builds the model on the meta device, then reads every tensor once.

    `dtype`: a torch dtype, its name, or "auto" for the dtype of the stored embedding. Rows of embedding and head beyond
    the tokenizer's are cut off, as in the reference's inference.

    Raises:
        MissingFileError: no checkpoint there, or no weights in it.
        UserError: pickled weights, an unsupported config, or tensors that do not fit; one error lists them all.
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
    for name in absent:  # post_layernorm: in most checkpoints, but never applied
        fill = torch.ones if name.endswith("weight") else torch.zeros
        _assign(model, name, fill(expected[name], device=device, dtype=dtype))
    positions = torch.arange(config.vision.side**2, device=device).expand(1, -1)
    embeddings = model.model.vision_tower.vision_tower.vision_model.embeddings
    embeddings.register_buffer("position_ids", positions, persistent=False)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"tensors without memory after loading {folder}: {', '.join(left)}")
    return model.eval()


def save(model: LavidaModules, folder: Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes to a temporary folder and then moves the files: an interrupted save leaves an old checkpoint intact."""
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        raise UserError("the model carries LoRA layers: merge them (lavida_adapter.merge_lora) before saving it whole")
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
    """SHA-256 over name, shape and the first 1,024 numbers (as bfloat16) of every base tensor; identifies the base.

    Cheap for 8 B parameters, and equal in every dtype at least as wide as the stored one. Adapters and the modules in
    `skip` are left out.
    """
    sha = hashlib.sha256()
    base = ((name.replace(".base_layer", ""), t) for name, t in model.named_parameters() if "lora_" not in name)
    for name, tensor in sorted(base, key=lambda pair: pair[0]):
        if any(name == s or name.startswith(s + ".") for s in skip):
            continue
        head = tensor.detach().reshape(-1)[:1024].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        sha.update(f"{name}{tuple(tensor.shape)}".encode() + head.tobytes())
    return sha.hexdigest()


def locate(source: str | Path) -> Path:
    """The local folder of a checkpoint; a name that is no folder is downloaded from the hub."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise MissingFileError(f"model.path={source}: no such checkpoint folder")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise MissingFileError(
            f"model.path={source}: no such local folder, and the download from the hub failed "
            f"({type(error).__name__}); download the checkpoint once and give its folder"
        ) from error


def read_config(folder: Path) -> LavidaConfig:
    """The config of a checkpoint; MissingFileError without a config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} has no config.json: it is not a checkpoint folder")
    return LavidaConfig.from_dict(read_json(path))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, from its own tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        raise MissingFileError(f"{folder} has no tokenizer.json: copy the tokenizer files of the checkpoint there")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        raise UserError(f"the tokenizer files in {folder} cannot be read: {first_line(error)}") from error


def check_tokens(config: LavidaConfig, tokenizer: Any, folder: Path) -> None:
    """Raises UserError unless the tokenizer has the prompt's control tokens, with the ids in config.json."""
    known = tokenizer.get_added_vocab()
    absent = [token for token in CONTROL if token not in known]
    if absent:
        raise UserError(f"the tokenizer in {folder} lacks {', '.join(absent)}: it is not LLaDA's")
    for token, name in (("<|mdm_mask|>", "mask_token_id"), ("<|endoftext|>", "eos_token_id")):
        if (given := getattr(config.lm, name)) != known[token]:
            raise UserError(f"{folder}: config.json says {name}={given}, but the tokenizer's {token} is {known[token]}")


def n_rows(tokenizer: Any) -> int:
    """How many rows of the embedding the tokenizer can address: its length, unless its added tokens leave gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_added_vocab().values()))


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


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded checkpoint or from the single file."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX} has no weight_map: download the checkpoint again")
        absent = sorted({file for file in index.values() if not (folder / file).is_file()})
        if absent:
            raise MissingFileError(f"{folder}: {INDEX} names {', '.join(absent)}, which do not exist")
        files = {name: folder / file for name, file in index.items()}
    elif (folder / SINGLE).is_file():
        with open_tensors(folder / SINGLE) as file:
            files = {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} holds pickled weights only ({', '.join(pickles[:3])}): loading a pickle can run any code, "
                "so it is refused; convert the checkpoint to safetensors"
            )
        raise MissingFileError(f"{folder} has no {SINGLE} and no {INDEX}: there are no weights to load")
    for path in sorted({p for p in files.values() if p.suffix != ".safetensors"}):
        raise UserError(
            f"{path} is not a safetensors file: loading a pickle can run any code, so it is refused; convert the "
            "checkpoint to safetensors"
        )
    return files


def read_headers(where: Mapping[str, Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype | None]]:
    """Shape and dtype of every stored tensor, from the headers; the dtype is None if nothing can be computed in it."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | None] = {}
    for path in sorted(set(where.values())):
        with open_tensors(path) as file:
            names = [name for name, p in where.items() if p == path]
            absent = set(names) - set(file.keys())
            if absent:
                raise UserError(f"{path} lacks tensors that {INDEX} lists for it: {', '.join(sorted(absent)[:5])}")
            for name in names:
                header = file.get_slice(name)
                shapes[name] = tuple(header.get_shape())
                dtypes[name] = _DTYPES.get(header.get_dtype())
    return shapes, dtypes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], folder: Path
) -> set[str]:
    """Compares names and shapes; returns the optional tensors that are absent.

    Accepted: more rows in embedding and head, a further vision layer or a pooling head (ignored), no post_layernorm.

    Raises:
        UserError: one error that lists all missing, unexpected and misshaped tensors.
    """
    optional = {name for name in expected if "post_layernorm" in name}
    layer = re.compile(re.escape(_VISION) + r"encoder\.layers\.(\d+)\.")
    n_layers = 1 + max((int(m[1]) for name in expected if (m := layer.match(name))), default=-1)
    ignored = re.compile(re.escape(_VISION) + rf"(head\..*|encoder\.layers\.{n_layers}\..*|embeddings\.position_ids)")
    missing = sorted(expected.keys() - stored.keys() - optional)
    extra = sorted(name for name in stored.keys() - expected.keys() if not ignored.fullmatch(name))
    wrong = []
    for name in sorted(expected.keys() & stored.keys()):
        want, have = expected[name], stored[name]
        longer = name in (WTE, HEAD) and len(have) == 2 and have[0] >= want[0] and have[1] == want[1]
        if have != want and not longer:
            least = "at least " if name in (WTE, HEAD) else ""
            wrong.append(f"{name} is {list(have)}, expected {least}{list(want)}")
    problems = [
        f"{len(names)} {what}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
        for names, what in ((missing, "missing"), (wrong, "of the wrong shape"), (extra, "unexpected"))
        if names
    ]
    if problems:
        raise UserError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")
    return optional - stored.keys()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError names a file without one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file, as a context manager; UserError names a file that cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
