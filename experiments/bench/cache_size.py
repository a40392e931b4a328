"""What a smaller prefix cache costs and saves: bytes, milliseconds to make and to read, and how far logits move."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from experiments.bench.common import Floor, Timing, aligned, load_model, prompt_embeds, table_title, time_call
from experiments.bench.decode import as_prefix
from experiments.profiling import cost_of
from shirg import UserError

if TYPE_CHECKING:
    from lavida_adapter import CachePacker, Lavida


@dataclass(frozen=True)
class CacheRow:
    name: str
    n_bytes: int
    pack: Timing | None
    step: Timing
    floor: dict[str, Any]
    most: float
    same_top1: float


@dataclass(frozen=True)
class CacheBench:
    model: str
    shape: dict[str, Any]
    rows: list[CacheRow]

    def report(self) -> dict[str, Any]:
        rows = [
            {
                "cache": row.name,
                "bytes": row.n_bytes,
                "saved": 1 - row.n_bytes / self.rows[0].n_bytes,
                "pack": None if row.pack is None else row.pack.report(),
                "step": row.step.report(),
                "floor": row.floor,
                "max_logit_drift": row.most,
                "same_top1": row.same_top1,
            }
            for row in self.rows
        ]
        return {"model": self.model, **self.shape, "rows": rows}

    def lines(self) -> list[str]:
        head = ("cache", "MiB", "saved %", "pack ms", "step ms", "x floor", "max logit drift", "same top-1 %")
        body = []
        for row, told in zip(self.rows, self.report()["rows"], strict=True):
            pack = "-" if row.pack is None else f"{row.pack.median:.2f}"
            numbers = (row.n_bytes / 2**20, 100 * told["saved"])
            times = (row.step.median, row.floor["times_floor"])
            moved = (f"{row.most:.2g}", f"{100 * row.same_top1:.1f}")
            body.append((row.name, *(f"{x:.2f}" for x in numbers), pack, *(f"{x:.2f}" for x in times), *moved))
        return [table_title(self.model, self.shape), *aligned([head, *body])]


def run(
    *, device: torch.device, model: str, prompt: list[int], answer: int, batch: list[int], repeats: int
) -> CacheBench:
    if len(prompt) > 1 or len(batch) > 1:
        raise UserError("bench cache takes one prompt length and one batch size: give --prompt and --batch once")
    return bench(model, load_model(model, device), prompt[0], answer, batch[0], repeats)


@torch.inference_mode()
def bench(name: str, model: "Lavida", n_prompt: int, n_answer: int, batch: int, repeats: int) -> CacheBench:
    from experiments.inference import drift
    from lavida_adapter import Cast, Fp8, Int8
    from lavida_adapter.engine import DecodeSteps

    packers: dict[str, CachePacker | None] = {"none": None, "cast": Cast(), "int8": Int8(), "fp8": Fp8()}
    prefix = as_prefix(prompt_embeds(model, batch, n_prompt))
    whole = model.prefill(prefix)
    floor, cost = Floor.of(model.device, model.dtype), cost_of(model.config.lm, model.dtype)
    ids = torch.full((batch, n_answer), model.config.lm.mask_token_id, device=model.device)
    rows = []
    for label, packer in packers.items():
        stored = whole if packer is None else packer(whole, prefix, None)
        pack = None
        if packer is not None:
            pack = time_call(lambda p=packer: p(whole, prefix, None), model.device, repeats=repeats)  # type: ignore[misc]
        steps = DecodeSteps(model.lm, stored, n_answer)
        step = time_call(lambda s=steps: s(ids), model.device, repeats=repeats)  # type: ignore[misc]
        work = cost.step(n_prompt, n_answer, n_answer, batch, cache_bytes=stored.n_bytes)
        moved = drift(model.lm, whole, stored, n_answer)
        same = sum(moved.same_top1) / batch
        rows.append(CacheRow(label, stored.n_bytes, pack, step, floor.row(step.median, work), max(moved.most), same))
    shape = {"batch": batch, "prompt": n_prompt, "answer": n_answer, "dtype": str(model.dtype).removeprefix("torch.")}
    return CacheBench(name, shape | {"threads": torch.get_num_threads()}, rows)
