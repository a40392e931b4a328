"""Which adapter `adapter=...` means."""

from collections.abc import Mapping
from typing import Any

from experiments.study.record import local_folder

OWN = "own"
"""The adapter that was trained for the selector."""


def adapter_path(adapter: str | None, model: Mapping[str, Any], selector: str) -> str | None:
    """The folder of an adapter.

    A name stands for the folder of that name in `adapters/` beside the model's weights, `own` for the one that bears
    the selector's name; anything else is a path.

    Raises:
        FileNotFoundError: a name that the model has no adapter for.
    """
    if adapter is None or "/" in adapter or local_folder(adapter) is not None:
        return adapter
    name = selector if adapter == OWN else adapter
    path = f"{model.get('path')}/adapters"
    folder = local_folder(path)
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder is not None else []
    if name not in there:
        raise FileNotFoundError(
            f"adapter={adapter}: there is no adapter {name} in {path} ({', '.join(there) or 'it has none'}); "
            f"train one: python train.py selector={selector} weights={path}/{name}"
        )
    return f"{path}/{name}"
