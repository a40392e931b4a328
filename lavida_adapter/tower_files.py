"""The vision tower from a SigLIP checkpoint in transformers' layout, for a LaViDa checkpoint stored without one.

The first stage of LaViDa's training stores a projector alone, and copies of a checkpoint may leave the tower out: the
reference then downloads SigLIP. Here its folder or hub id is given as `model.vision_path`.
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import SiglipVisionConfig

from lavida_adapter.checkpoint_files import StoredTensor, locate, read_json, stored_tensors
from lavida_adapter.config import VisionConfig
from shirg import MissingFileError, UserError

TOWER = "model.vision_tower.vision_tower.vision_model."
"""How the tower's names begin, in our tree and in every published checkpoint."""
PUBLISHED_TOWER = "google/siglip-so400m-patch14-384"
OPTION = "model.vision_path"
_KINDS = ("siglip", "siglip_vision_model")


def with_tower(
    stored: Mapping[str, StoredTensor], vision_path: str | Path | None, config: VisionConfig, folder: Path
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with a tower: its own one, or the one of `vision_path` where it has none.

    Raises:
        MissingFileError: there is no tower in the checkpoint and none was given, or its files are not there.
        UserError: a second tower, or one of another kind or other sizes.
    """
    if any(name.startswith(TOWER) for name in stored):
        if vision_path is not None:
            raise UserError(
                f"{OPTION}={vision_path}: {folder} has a vision tower of its own, which was trained with it; leave "
                f"{OPTION} out"
            )
        return dict(stored)
    if vision_path is None:
        given = read_json(folder / "config.json").get("mm_vision_tower") or PUBLISHED_TOWER
        raise MissingFileError(
            f"{folder} is stored without its vision tower: give the SigLIP that it was trained with, {given}, as "
            f"{OPTION} (a folder or hub id)"
        )
    return {**stored, **_tower_tensors(locate(vision_path, option=OPTION), config)}


def _tower_tensors(folder: Path, config: VisionConfig) -> dict[str, StoredTensor]:
    """The tensors of a SigLIP's vision part under the names of a LaViDa checkpoint; its text part is left out."""
    if not os.path.isfile(folder / "config.json"):
        raise MissingFileError(f"{OPTION}={folder} has no config.json: it is not a checkpoint folder")
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in _KINDS:
        raise UserError(f"{OPTION}={folder} is a {raw.get('model_type')} model: give a SigLIP, as {PUBLISHED_TOWER}")
    _check_sizes(raw.get("vision_config") or raw, config, folder)
    stored, start = stored_tensors(folder), "vision_model."
    if not any(name.startswith(start) for name in stored):
        start = ""  # newer files of the vision part alone
    return {TOWER + name.removeprefix(start): t for name, t in stored.items() if name.startswith(start)}


def _check_sizes(raw: Mapping[str, Any], config: VisionConfig, folder: Path) -> None:
    """The shapes of tensors do not say all: the number of heads and the activation must be the expected ones too."""
    theirs = SiglipVisionConfig.from_dict(dict(raw))
    wrong = [
        f"{f.name}={getattr(theirs, f.name)!r} (expected {getattr(config, f.name)!r})"
        for f in fields(config)
        if getattr(theirs, f.name) != getattr(config, f.name)
    ]
    if wrong:
        raise UserError(f"{OPTION}={folder} is another tower than the checkpoint was trained with: {', '.join(wrong)}")
