"""Golden numbers of the public reference, and one printed line per family with the largest deviation."""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lavida_adapter import Lavida, LavidaConfig
from lavida_adapter.families import FAMILIES
from tests.golden_data import parity_folder

_DEVIATIONS: dict[str, list[tuple[float, float]]] = defaultdict(list)


class Golden:
    """One folder of golden numbers: sizes, seeds and special ids come from its config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw: dict[str, Any] = self.json("config")
        self.ids: dict[str, int] = self.raw["ids"]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder / name).convert("RGB")

    @cached_property
    def config(self) -> LavidaConfig:
        flat = {**self.raw["lm"], **self.raw["mm"], "vision_config": self.raw["vision"]}
        return LavidaConfig.from_dict(flat)

    @cached_property
    def model(self) -> Lavida:
        model = Lavida(self.config, tokenizer=_Plain())
        saved, family = self.tensors("model"), FAMILIES[self.config.lm.family]
        own = {name: saved.pop(family.published_name(name)) for name in model.state_dict()}
        assert not saved, f"tensors of the reference that we lack: {sorted(saved)}"
        model.load_state_dict(own, strict=True)
        return model.eval()


class _Plain:
    """Stands in for a tokenizer where the golden folder holds ids only."""

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": []}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="session")
def llada(request: pytest.FixtureRequest) -> Golden:
    """The numbers of LaViDa on LLaDA."""
    return Golden(parity_folder(request.config.getoption("--golden"), "lavida"))


@pytest.fixture(scope="session")
def dream(request: pytest.FixtureRequest) -> Golden:
    """The numbers of LaViDa on Dream."""
    return Golden(parity_folder(request.config.getoption("--golden"), "lavida_dream"))


@pytest.fixture(scope="session", params=["llada", "dream"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """The numbers of each language model, for what both have."""
    found: Golden = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def close() -> Callable[[str, Tensor, Tensor, float], None]:
    """Asserts |ours - theirs| <= tolerance, and remembers the deviation for the summary."""

    def check(family: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        assert ours.shape == theirs.shape, f"{family}: {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        deviation = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
        _DEVIATIONS[family].append((deviation, tolerance))
        assert deviation <= tolerance, f"{family}: deviates by {deviation:.3g}, tolerance {tolerance:g}"

    return check


@pytest.fixture
def equal() -> Callable[[str, Any, Any], None]:
    """Asserts exact equality, and counts it for the summary."""

    def check(family: str, ours: Any, theirs: Any) -> None:
        _DEVIATIONS[family].append((0.0 if ours == theirs else float("inf"), 0.0))
        assert ours == theirs, f"{family}: {ours!r} is not {theirs!r}"

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _DEVIATIONS:
        return
    terminalreporter.section("parity: largest deviation per family")
    for family, pairs in _DEVIATIONS.items():
        worst, tolerance = max(pairs)
        figure = "exact" if tolerance == 0 and worst == 0 else f"{worst:.2e} (tolerance {tolerance:g})"
        terminalreporter.line(f"{family:32} {len(pairs):4} comparisons   {figure}")
