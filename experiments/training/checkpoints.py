"""Checkpoints that are whole or absent, whatever stops the process that writes them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins import CheckpointIO

from experiments.study.files import replacing


class SafeCheckpoints(CheckpointIO):
    """Writes beside the last checkpoint and renames; reads tensors and plain values, no code.

    Raises:
        OSError: when a checkpoint cannot be written; the one before it stays.
        ValueError: when one cannot be read.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            rest = (
                "the last one is kept: make room and give resume=true" if path.exists() else "there is none before it"
            )
            raise OSError(
                f"the checkpoint of step {checkpoint['global_step']} could not be written to {path.parent} "
                f"({_reason(error)}); {rest}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not is_zipfile(path):
            raise ValueError(f"{path} is not a checkpoint: overwrite=true starts again")
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({_reason(error)}): overwrite=true starts again") from error
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The operating system's word for it, which torch wraps in its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]
