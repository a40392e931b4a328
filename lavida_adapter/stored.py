"""What lies in a checkpoint's folder, before any tensor of it is read (docs/lavida.md, "Checkpoint layout")."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
_VISION = "model.vision_tower.vision_tower.vision_model."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded checkpoint or from the single file."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{folder / INDEX} has no weight_map: download the checkpoint again")
        absent = sorted({file for file in index.values() if not (folder / file).is_file()})
        if absent:
            raise FileNotFoundError(f"{folder}: {INDEX} names {', '.join(absent)}, which are not there")
        files = {name: folder / file for name, file in index.items()}
    elif (folder / SINGLE).is_file():
        with open_tensors(folder / SINGLE) as file:
            files = {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({', '.join(pickles[:3])}): loading a pickle can run any code, "
                "so it is refused; convert the checkpoint to safetensors"
            )
        raise FileNotFoundError(f"{folder} has no {SINGLE} and no {INDEX}: there are no weights to load")
    for path in sorted({p for p in files.values() if p.suffix != ".safetensors"}):
        raise ValueError(
            f"{path} is not a safetensors file: loading a pickle can run any code, so it is refused; convert the "
            "checkpoint to safetensors"
        )
    return files


def read_headers(where: Mapping[str, Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype | None]]:
    """Shape and dtype of every stored tensor, None for a type that nothing is computed in; headers alone are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | None] = {}
    for path in sorted(set(where.values())):
        with open_tensors(path) as file:
            names = [name for name, p in where.items() if p == path]
            absent = set(names) - set(file.keys())
            if absent:
                raise ValueError(f"{path} lacks tensors that {INDEX} puts there: {', '.join(sorted(absent)[:5])}")
            for name in names:
                header = file.get_slice(name)
                shapes[name] = tuple(header.get_shape())
                dtypes[name] = _DTYPES.get(header.get_dtype())
    return shapes, dtypes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], folder: Path
) -> set[str]:
    """Compares names and shapes; returns the tensors that may be absent and are.

    Tolerated: more rows in embedding and head, a further vision layer or pooling head (ignored), no post_layernorm.
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
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")
    return optional - stored.keys()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def open_tensors(path: Path) -> Any:
    """A safetensors file, to be used as a context; ValueError names a file that is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, cut to a line that fits into another sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
