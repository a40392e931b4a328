"""Reading and writing checkpoints in the published layout: config.json, safetensors, tokenizer files.

docs/lavida.md, "Checkpoint layout". Nothing in a checkpoint is ever executed: pickle files are refused and tokenizers are
read from their JSON.
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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lavida_adapter.config import LavidaConfig

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida

M = TypeVar("M", bound="Lavida")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
_VISION = "model.vision_tower.vision_tower.vision_model."


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

    `dtype` is a torch dtype, its name, or "auto" for the one that the checkpoint is stored in. Rows of the embedding and
    the head beyond the tokenizer's are cut off, as the reference's inference does.

    Raises:
        FileNotFoundError: no checkpoint there, or no weights in it.
        ValueError: pickled weights, an unsupported config, or tensors that do not fit; one error lists them all.
    """
    folder = locate(source)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    where = tensor_files(folder)
    shapes, stored_dtype = read_shapes(where)
    if WTE in shapes:
        config = replace(config, lm=replace(config.lm, vocab_size=min(shapes[WTE][0], len(tokenizer))))
    check_special_ids(config, tokenizer, folder)
    with torch.device("meta"):
        model = cls(config, tokenizer)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = check_tensors(expected, shapes, folder)
    dtype = stored_dtype if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name in expected.keys() - optional:
        with safe_open(where[name], framework="pt") as file:
            tensor = file.get_slice(name)[: expected[name][0]]
        _assign(model, name, tensor.to(device=device, dtype=dtype))
    for name in optional:  # post_layernorm: stored by most checkpoints, applied by none
        fill = torch.ones if name.endswith("weight") else torch.zeros
        _assign(model, name, fill(expected[name], device=device, dtype=dtype))
    n_positions = config.vision.side**2
    model.model.vision_tower.vision_tower.vision_model.embeddings.position_ids = torch.arange(
        n_positions, device=device
    ).expand(1, -1)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"tensors without memory after loading {folder}: {', '.join(left)}")
    return model.eval()


def read_config(folder: Path) -> LavidaConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint folder")
    try:
        return LavidaConfig.from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, from its tokenizer.json; never another one in its place."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json: copy the tokenizer files of the checkpoint there")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def check_special_ids(config: LavidaConfig, tokenizer: Any, folder: Path) -> None:
    """The ids in config.json must be those of the tokenizer's own special tokens."""
    for token, name in (("<|mdm_mask|>", "mask_token_id"), ("<|endoftext|>", "eos_token_id")):
        told, known = getattr(config.lm, name), tokenizer.convert_tokens_to_ids(token)
        if told != known:
            raise ValueError(f"{folder}: config.json says {name}={told}, but the tokenizer's {token} is {known}")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded checkpoint or from the single file."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        missing = sorted({file for file in index.values() if not (folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder}: {INDEX} names {', '.join(missing)}, which are not there")
        files = {name: folder / file for name, file in index.items()}
    elif (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as file:
            files = {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({', '.join(pickles[:3])}): loading a pickle can run any code, so "
                "it is refused; convert the checkpoint to safetensors"
            )
        raise FileNotFoundError(f"{folder} has no {SINGLE} and no {INDEX}: there are no weights to load")
    for path in {p for p in files.values() if p.suffix != ".safetensors"}:
        raise ValueError(
            f"{path} is not a safetensors file: other formats are refused, because a pickle can run any code"
        )
    return files


def read_shapes(where: Mapping[str, Path]) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
    """Shapes of all stored tensors, and the floating dtype of the first; headers alone are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    stored = torch.float32
    for path in sorted(set(where.values())):
        with _open(path) as file:
            names = [name for name, p in where.items() if p == path]
            absent = set(names) - set(file.keys())
            if absent:
                raise ValueError(f"{path} lacks tensors that {INDEX} puts there: {', '.join(sorted(absent)[:5])}")
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
            stored = _DTYPES.get(file.get_slice(names[0]).get_dtype(), stored)
    return shapes, stored


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], folder: Path
) -> set[str]:
    """Compares names and shapes; returns the tensors that may be absent and are.

    Tolerated: more rows in the embedding and head, a further vision layer or pooling head (ignored), no post_layernorm.
    """
    optional = {name for name in expected if "post_layernorm" in name}
    layers = 1 + max(
        (int(m[1]) for name in expected if (m := re.search(r"encoder\.layers\.(\d+)\.", name))), default=-1
    )
    ignored = re.compile(re.escape(_VISION) + rf"(head\..*|encoder\.layers\.{layers}\..*|embeddings\.position_ids)")
    missing = sorted(expected.keys() - stored.keys() - optional)
    extra = sorted(name for name in stored.keys() - expected.keys() if not ignored.fullmatch(name))
    wrong = []
    for name in sorted(expected.keys() & stored.keys()):
        want, have = expected[name], stored[name]
        longer = name in (WTE, HEAD) and have[0] >= want[0] and have[1:] == want[1:]
        if have != want and not longer:
            wrong.append(f"{name} is {list(have)}, expected {list(want)}")
    problems = [
        f"{len(names)} {what}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
        for names, what in ((missing, "missing"), (wrong, "of the wrong shape"), (extra, "unexpected"))
        if names
    ]
    if problems:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")
    return optional - stored.keys()


def save(model: "Lavida", folder: Path) -> None:
    """Writes a checkpoint beside its place and moves it in whole: an interrupted save leaves the old one as it was."""
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        raise ValueError("the model carries LoRA layers: merge them (lavida_adapter.merge_lora) before saving it whole")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_torch_state_dict({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)
        (temporary / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        model.tokenizer.save_pretrained(temporary)
        folder.mkdir(exist_ok=True)
        for old in (*folder.glob("model*.safetensors*"),):
            old.unlink()
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
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


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module.register_parameter(leaf, nn.Parameter(tensor))
