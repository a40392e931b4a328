"""What one process keeps from a job for the next: the model, and datasets.

A sweep of Hydra's own launcher runs its jobs one after the other in one process. The model stays in memory while jobs
differ in selector, cache, decoding, data or seed alone; another checkpoint, changed files, another dtype, device,
attention backend or adapter make the next job read its own. There is never more than one model. A job that fails
leaves none, because it may have stopped in the middle of a change.
"""

import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import build, profiling
from experiments.data.sample import Dataset
from experiments.schema import local_folder
from shirg import Selector

if TYPE_CHECKING:
    from lavida_adapter import Lavida

MOST_DATASETS = 8
PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_models: "list[KeptModel]" = []
_datasets: OrderedDict[str, Dataset] = OrderedDict()


@dataclass
class KeptModel:
    """A model with the adapter merged that its jobs share."""

    key: str
    model: "Lavida"
    adapter: str | None
    """The folder of the adapter; None for the model as its checkpoint has it."""
    weights: str = ""
    """The fingerprint of the weights, with the adapter."""
    _trained: dict[str, Tensor] = field(default_factory=dict)
    """The selector's tensors as the adapter left them."""
    _tensors: tuple[tuple[int, int], ...] = ()

    @property
    def unmerged(self) -> str | None:
        """The adapter, where it still has to be merged."""
        return None if self.weights else self.adapter

    def settle(self, selector: Selector) -> None:
        """To be called when the pipeline is built: the first one's adapter was merged, which later ones share."""
        if self.weights:
            if self._trained:
                selector.inner.load_state_dict({name: t.clone() for name, t in self._trained.items()}, assign=True)
            return
        if self.adapter is not None and build.trains_selector(self.adapter):
            self._trained = {name: tensor.detach().clone() for name, tensor in selector.inner.state_dict().items()}
        self.weights = build.fingerprint(self.model)
        self._tensors = tensors_of(self.model)

    def keep(self) -> None:
        """Keeps the model for the next job, as it was before this one, which has ended well."""
        self.model.release_engines()
        if tensors_of(self.model) == self._tensors:
            _models[:] = [self]


def tensors_of(model: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """Which tensors a model consists of, and how often each was written to."""
    return tuple((id(tensor), tensor._version) for tensor in (*model.parameters(), *model.buffers()))


def take_model(cfg: DictConfig, device: torch.device, adapter: str | None, stored: Mapping[str, Any]) -> KeptModel:
    """The model of a config: the kept one if it is the same, else a new one, for which the kept one is freed first.

    Args:
        adapter: the folder of the adapter that the pipeline is built with.
        stored: digests of the files of the checkpoint and of the adapter.
    """
    key = _model_key(cfg, device, adapter, stored)
    kept = _models.pop() if _models else None
    if kept is not None and kept.key == key:
        return kept
    del kept
    release_model()
    began = time.perf_counter()
    model = build.build_model(cfg, device)
    name = cfg.model.get("path") or "random weights"
    print(f"model {name}: {model.config.lm.family}, read in {time.perf_counter() - began:.1f} s", flush=True)
    return KeptModel(key, model, adapter)


def release_model() -> None:
    """Frees the model that is kept, if any."""
    _models.clear()
    profiling.release()


def _model_key(cfg: DictConfig, device: torch.device, adapter: str | None, stored: Mapping[str, Any]) -> str:
    """All that decides what the model is; for an adapter that trained the selector, too, also the selector."""
    spec = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(spec, dict)
    places = [spec.get("path"), spec.get("vision_path"), adapter]
    folders = [None if place is None else local_folder(str(place)) for place in places]
    files = [None if folder is None else _stamps(folder, deep=False) for folder in folders]
    selector = None
    if adapter is not None and build.trains_selector(adapter):
        selector = OmegaConf.to_container(cfg.selector, resolve=True)
    what = [spec, str(cfg.dtype), str(cfg.attention), str(device), adapter, dict(stored), files, selector]
    return json.dumps(what, sort_keys=True, default=str)


def take_dataset(cfg: DictConfig) -> Dataset:
    """The dataset of `data=...`, built once for each config while the files that it is built from stay as they are."""
    spec = OmegaConf.to_container(cfg.data, resolve=True)
    assert isinstance(spec, dict)
    if not _can_be_kept(spec):
        return build.build_dataset(cfg)
    # The files are looked at before they are read: a change in between is found the next time.
    key = json.dumps([os.getcwd(), spec, [_stamps(path) for path in _paths(spec)]], sort_keys=True)
    if key not in _datasets:
        _datasets[key] = build.build_dataset(cfg)
        while len(_datasets) > MOST_DATASETS:
            _datasets.popitem(last=False)
    _datasets.move_to_end(key)
    return _datasets[key]


def _can_be_kept(spec: Mapping[Any, Any]) -> bool:
    """Not so for what another package reads, which is not known here, nor where building checks every picture."""
    target = str(spec.get("_target_"))
    checked = target.startswith("experiments.data.synthetic.entitygrid.") and spec.get("source") != "generate"
    return target.startswith("experiments.data.") and not checked


def _paths(spec: object) -> Iterator[Path]:
    """The files and folders that exist among the texts of a config."""
    if isinstance(spec, Mapping | list):
        for value in spec.values() if isinstance(spec, Mapping) else spec:
            yield from _paths(value)
    elif isinstance(spec, str) and spec and os.path.exists(spec):
        yield Path(spec)


Stamp = tuple[str, int, int, int]
"""Name, inode, size and time of the last change."""


def _stamps(path: Path, deep: bool = True) -> list[Stamp]:
    """Stamps of a file, or of a folder and all in it but its pictures, which a dataset does not read when it is built.

    Args:
        deep: whether folders in the folder count.
    """
    if not os.path.isdir(path):
        return [_stamp(str(path))]
    found: list[Stamp] = []
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:  # a link leads to a folder above it
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(folders) if deep else []
        read = [name for name in sorted(names) if os.path.splitext(name)[1].lower() not in PICTURES]
        found += [_stamp(root), *(_stamp(os.path.join(root, name)) for name in read)]
    return found


def _stamp(path: str) -> Stamp:
    try:
        stat = os.stat(path)
    except OSError:  # a link that leads nowhere
        stat = os.lstat(path)
    return path, stat.st_ino, stat.st_size, stat.st_ctime_ns
