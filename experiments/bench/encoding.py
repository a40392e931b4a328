"""How long pictures take until they are tokens: cutting into views, and the tower over one or several pictures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from experiments.bench.common import Floor, Timing, aligned, load_model, noise_picture, table_title, time_call
from experiments.profiling import Work

if TYPE_CHECKING:
    from lavida_adapter import Lavida


@dataclass(frozen=True)
class EncodeRow:
    pictures: int
    views: Timing
    tower: Timing
    channels_last: Timing
    floor: dict[str, Any]


@dataclass(frozen=True)
class EncodeBench:
    model: str
    shape: dict[str, Any]
    rows: list[EncodeRow]

    def report(self) -> dict[str, Any]:
        rows = [
            {
                "pictures": row.pictures,
                "views": row.views.report(),
                "tower": row.tower.report(),
                "channels_last": row.channels_last.report(),
                "floor": row.floor,
            }
            for row in self.rows
        ]
        return {"model": self.model, **self.shape, "rows": rows}

    def lines(self) -> list[str]:
        head = ("pictures", "views ms", "tower ms", "tower ms/picture", "x floor", "channels-last ms")
        body = []
        for row in self.rows:
            times = (row.views.median, row.tower.median, row.tower.median / row.pictures)
            numbers = (*times, row.floor["times_floor"], row.channels_last.median)
            body.append((str(row.pictures), *(f"{x:.2f}" for x in numbers)))
        return [table_title(self.model, self.shape), *aligned([head, *body])]


def run(*, device: torch.device, model: str, batch: list[int], repeats: int) -> EncodeBench:
    return bench(model, load_model(model, device), batch, repeats)


@torch.inference_mode()
def bench(name: str, model: "Lavida", batch: list[int], repeats: int) -> EncodeBench:
    from lavida_adapter.views import cut

    tower, picture = model.model.vision_tower, noise_picture(model.config)
    views = cut(picture, model.config, "lavida_tiles")
    floor = Floor.of(model.device, model.dtype)
    rows = []
    for n in batch:
        pixels = torch.cat([views.pixels_V3SS] * n).to(model.device, model.dtype)
        last = pixels.contiguous(memory_format=torch.channels_last)
        cutting = time_call(lambda: cut(picture, model.config, "lavida_tiles"), torch.device("cpu"), repeats=repeats)
        timing, other = (
            time_call(lambda p=p: tower(p), model.device, repeats=repeats)  # type: ignore[misc]
            for p in (pixels, last)
        )
        rows.append(EncodeRow(n, cutting, timing, other, floor.row(timing.median, tower_work(model, len(pixels)))))
    shape = {"views": len(views.pixels_V3SS), "dtype": str(model.dtype).removeprefix("torch.")}
    return EncodeBench(name, shape | {"threads": torch.get_num_threads()}, rows)


def tower_work(model: "Lavida", views: int) -> Work:
    """Patches, and of every layer its projections, its MLP and the two products of attention."""
    config = model.config.vision
    n, d = config.side**2, config.hidden_size
    weights = (config.num_hidden_layers - 1) * (4 * d * d + 2 * d * config.intermediate_size)
    weights += 3 * config.patch_size**2 * d
    attention = (config.num_hidden_layers - 1) * 4 * n * n * d
    return Work(views * (2 * n * weights + attention), weights * model.dtype.itemsize)
