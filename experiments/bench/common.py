"""What the benches share: results and their tables, models, inputs, and the distance to the device's limits."""

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from experiments import build
from experiments.profiling import Timing, Work, measure_limits, suspicion, time_once
from lavida_adapter import LavidaConfig, VisionConfig
from lavida_adapter.views import Views, cut, layout_on, patch_pixels
from lavida_adapter.vision import VisionTower
from shirg import Geometry, UserError, VisionFeatures, picture_counts

if TYPE_CHECKING:
    from lavida_adapter import Lavida, Prefix

Format = str | Callable[[Any], str]
Columns = Mapping[str, tuple[str, Format]]
"""Title of a column -> the value's key in a row of the report (inner keys after dots), and how it is shown."""

BOX = (0.30, 0.40, 0.55, 0.45)
"""A box of evidence for the oracle: a line of print, as fractions of the picture."""


def say(what: str) -> None:
    """What is measured now, on standard error: the table comes at the end."""
    print(f"measuring  {what}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class BenchResult:
    """What a part measured."""

    title: str
    report: dict[str, Any]
    """Everything, for JSON."""
    table: pd.DataFrame
    """The main numbers, as text."""
    notes: tuple[str, ...] = ()
    """Lines below the table."""
    figure: Figure | None = None

    def lines(self) -> list[str]:
        """The result as text; the first column is aligned to the left, the others to the right."""
        first = self.table.columns[0]
        width = max(map(len, [first, *self.table[first]]))
        names = self.table[first].str.ljust(width)
        table = self.table.assign(**{first: names}).rename(columns={first: first.ljust(width)})
        return [self.title, *table.to_string(index=False).splitlines(), *self.notes]


def table_of(rows: Sequence[Mapping[str, Any]], columns: Columns) -> pd.DataFrame:
    """The rows of a report as a table of texts; "-" where a row has no value."""

    def show(row: Mapping[str, Any], key: str, form: Format) -> str:
        value: Any = row
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            return "-"
        return form(value) if callable(form) else format(value, form)

    return pd.DataFrame({title: [show(row, key, form) for row in rows] for title, (key, form) in columns.items()})


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.2f}"


def only_one(part: str, name: str, values: Sequence[int]) -> int:
    """The value of an option that may be a list in other parts."""
    if len(values) > 1:
        raise UserError(f"bench {part} takes one value of --{name}: give it once, not {','.join(map(str, values))}")
    return values[0]


def sizes_of(model: "Lavida", **sizes: Any) -> dict[str, Any]:
    """The sizes of a measurement, with the model's number format and the number of threads."""
    return {**sizes, "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}


def title_of(model: str, sizes: Mapping[str, Any]) -> str:
    """The line above a table."""
    return f"{model}: " + ", ".join(f"{name} {value}" for name, value in sizes.items())


class Floors:
    """Times over the least time of their work. The device's limits are measured before and after; the better counts."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._measure = partial(measure_limits, device, dtype)
        self._before = self._measure()
        self._times: list[tuple[float, Work, dict[str, Any]]] = []

    def over(self, ms: float, work: Work) -> dict[str, Any]:
        """What a row says about a time and its floor; `settle` adds the floor, when all times are measured."""
        found = {"gflop": work.flops / 1e9, "mb": work.bytes / 1e6}
        self._times.append((ms, work, found))
        return found

    def settle(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The limits, and a line about each suspicious time, which the table marks and shows."""
        limits = self._before.better(self._measure())
        doubts = []
        for ms, work, found in self._times:
            floor_ms = limits.floor_ms(work)
            found |= {"floor_ms": floor_ms, "times_floor": ms / floor_ms}
            if why := suspicion(ms, floor_ms):
                doubts.append(f"! {why}: the time or the limits are wrong")
        return limits.report(), tuple(doubts)


def times_floor(value: float) -> str:
    """How many times its floor a time is, as a cell; with a mark where it is suspicious."""
    return f"{value:.2f}{'!' if suspicion(value, 1.0) else ''}"


Name = TypeVar("Name", bound=Hashable)


def time_in_turns(
    calls: Mapping[Name, Callable[[], object]], device: torch.device, *, repeats: int, warm_up: int = 2
) -> dict[Name, Timing]:
    """`time_call` of several calls that take turns, so that a change of the clock and other processes hit all alike."""
    runs: dict[Name, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(-warm_up, repeats):
        say(f"round {warm_up + number + 1} of {warm_up + repeats}: {len(calls)} calls in turn")
        for name, call in calls.items():
            run = time_once(call)
            runs[name] += [run] if number >= 0 else []
    return {name: Timing.of(seconds, device) for name, seconds in runs.items()}


def load_model(name: str, device: torch.device, attention: str = "sdpa", dtype: str | None = None) -> "Lavida":
    """Weights of a checkpoint, or random ones made on the device itself. `dtype`: None is the model's own."""
    words = [f"model={name}", f"attention={attention}", *([f"dtype={dtype}"] if dtype else [])]
    return build.build_model(build.compose_eval(*words), device)


def prompt_embeds(model: "Lavida", batch: int, n: int) -> Tensor:
    """Noise with the scale of the model's own word embeddings [B, P, D]; every row differs."""
    weight = model.lm.embedding.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(batch, n, weight.shape[1], generator=generator, device=weight.device)
    return (noise * weight.float().std()).to(weight.dtype)


def as_prefix(embeds_BPD: Tensor) -> "Prefix":
    """A prefix without padding and without a picture."""
    from lavida_adapter import Prefix

    here = torch.ones(embeds_BPD.shape[:2], dtype=torch.bool, device=embeds_BPD.device)
    return Prefix(embeds_BPD, here, ~here)


def random_tower(config: LavidaConfig, device: torch.device, dtype: torch.dtype) -> VisionTower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTower(config.vision).eval().to(device, dtype)


def noise_picture(config: LavidaConfig) -> Image.Image:
    """Noise of the size of the largest canvas, so that no token is padding."""
    width, height = max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@dataclass(frozen=True)
class Encoded:
    """One picture on one geometry, after the vision tower."""

    views: Views
    states_ND: Tensor
    taps: dict[str, Tensor]
    encode: Callable[[], object]
    """The call of the tower without recordings, to be timed."""

    def features(self, batch: int) -> VisionFeatures:
        """The picture `batch` times, each with a little noise of its own."""
        states_ND, layout = self.states_ND, self.views.layout
        device = states_ND.device
        generator = torch.Generator(device).manual_seed(0)
        noise_BND = torch.randn(batch, *states_ND.shape, device=device, dtype=states_ND.dtype, generator=generator)
        tokens_BND = states_ND + 0.1 * states_ND.std() * noise_BND
        count = self.views.base_count
        return VisionFeatures(
            tokens_BND=tokens_BND,
            layout=layout_on(layout, device),
            valid_BN=self.views.valid_N.to(device).expand(batch, -1).contiguous(),
            picture_B4=torch.tensor([self.views.picture_4] * batch, device=device),
            size_B2=torch.tensor([self.views.size] * batch, device=device),
            ids=tuple(f"picture {i}" for i in range(batch)),
            n_valid=(int(self.views.valid_N.sum()),) * batch,
            counts=picture_counts(layout, self.views.valid_N[None], [self.views.matched_count]) * batch,
            relevance_BN=torch.randn(batch, layout.n_tokens, device=device, generator=generator),
            base_count_B=None if count is None else torch.tensor([count] * batch, device=device),
            taps={name: torch.stack([tap] * batch) for name, tap in self.taps.items()} | {"encoder": tokens_BND},
            boxes=((BOX,),) * batch,
        )


def encode_noise(config: LavidaConfig, tower: VisionTower, geometry: Geometry, needs: Iterable[str]) -> Encoded:
    """The noise picture after the tower, with the recordings that `needs` names."""
    needs = frozenset(needs)
    weight = next(tower.parameters())
    views = cut(noise_picture(config), config, geometry)
    pixels_V3SS = views.pixels_V3SS.to(weight.device, weight.dtype)
    states_VnD, recorded = tower(pixels_V3SS, needs - {"encoder", "pixels"})
    taps = {name: tap.flatten(0, 1) for name, tap in recorded.items()}
    if "pixels" in needs:
        taps["pixels"] = patch_pixels(views.pixels_V3SS, views.layout).to(weight.device)
    return Encoded(views, states_VnD.flatten(0, 1), taps, lambda: tower(pixels_V3SS))


def square_features(n: int, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> VisionFeatures:
    """Noise on one square view of about `n` tokens, for selectors that need no recordings."""
    side = round(n**0.5)
    config = LavidaConfig(
        vision=VisionConfig(image_size=8 * side, patch_size=8), image_grid_pinpoints=((8 * side, 8 * side),)
    )
    views = cut(Image.new("RGB", (8 * side, 8 * side)), replace(config, image_aspect_ratio="resize"), "lavida_tiles")
    generator = torch.Generator(device).manual_seed(0)
    n_tokens = views.layout.n_tokens
    tokens = torch.randn(batch, n_tokens, width, device=device, generator=generator).to(dtype)
    return VisionFeatures(
        tokens_BND=tokens,
        layout=layout_on(views.layout, device),
        valid_BN=views.valid_N.to(device).expand(batch, -1).contiguous(),
        picture_B4=torch.tensor([views.picture_4] * batch, device=device),
        size_B2=torch.tensor([views.size] * batch, device=device),
        ids=tuple(f"picture {i}" for i in range(batch)),
        n_valid=(n_tokens,) * batch,
        counts=picture_counts(views.layout, views.valid_N[None], [views.matched_count]) * batch,
        relevance_BN=torch.randn(batch, n_tokens, device=device, generator=generator),
    )
