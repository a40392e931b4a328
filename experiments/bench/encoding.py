"""How long a picture takes to become tokens: cutting into views, and the tower over one or several pictures."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from experiments.bench.common import (
    BenchResult,
    Columns,
    Floors,
    load_model,
    noise_picture,
    say,
    sizes_of,
    table_of,
    time_in_turns,
    times_floor,
    title_of,
)
from experiments.profiling import Work, time_call

if TYPE_CHECKING:
    from lavida_adapter import Lavida

COLUMNS: Columns = {
    "pictures": ("pictures", "d"),
    "views ms": ("views.ms", ".2f"),
    "tower ms": ("tower.ms", ".2f"),
    "tower ms/picture": ("tower_ms_per_picture", ".2f"),
    "x floor": ("floor.times_floor", times_floor),
    "channels-last ms": ("channels_last.ms", ".2f"),
}


def run(*, device: torch.device, model: str, batch: list[int], repeats: int) -> BenchResult:
    return measure(model, load_model(model, device), batch, repeats)


@torch.inference_mode()
def measure(name: str, model: "Lavida", batch: list[int], repeats: int) -> BenchResult:
    from lavida_adapter.views import cut

    tower, picture, cpu = model.model.vision_tower, noise_picture(model.config), torch.device("cpu")
    views = cut(picture, model.config, "lavida_tiles")
    floors = Floors(model.device, model.dtype)
    rows = []
    for n in batch:
        say(f"batch {n}")
        pixels = torch.cat([views.pixels_V3SS] * n).to(model.device, model.dtype)
        last = pixels.contiguous(memory_format=torch.channels_last)
        cutting = time_call(lambda: cut(picture, model.config, "lavida_tiles"), cpu, repeats=repeats)
        orders = {"tower": partial(tower, pixels), "channels_last": partial(tower, last)}
        times = time_in_turns(orders, model.device, repeats=repeats)
        tower_ms = times["tower"].median
        rows.append(
            {
                "pictures": n,
                "views": cutting.report(),
                **{name: timing.report() for name, timing in times.items()},
                "tower_ms_per_picture": tower_ms / n,
                "floor": floors.over(tower_ms, tower_work(model, len(pixels))),
            }
        )
    sizes = sizes_of(model, views=len(views.pixels_V3SS))
    limits, doubts = floors.settle()
    report = {"model": name, **sizes, "limits": limits, "rows": rows}
    return BenchResult(title_of(name, sizes), report, table_of(rows, COLUMNS), doubts)


def tower_work(model: "Lavida", views: int) -> Work:
    """The least work of the tower: patches, and in each layer the projections, the MLP and attention's two products."""
    config = model.config.vision
    n, d = config.side**2, config.hidden_size
    weights = (config.num_hidden_layers - 1) * (4 * d * d + 2 * d * config.intermediate_size)
    weights += 3 * config.patch_size**2 * d
    attention = (config.num_hidden_layers - 1) * 4 * n * n * d
    return Work(views * (2 * n * weights + attention), weights * model.dtype.itemsize)
