"""Attention of a step on a GPU, kernel against kernel, as CUDA graphs; a part of `experiments.bench.true_size`.

Our kernel with several numbers of splits stands beside torch's own, with and without the padding mask that prompts of
unequal lengths need there.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.bench.captured_selectors import captured
from experiments.bench.recorder import Bench, medians, time_ms
from lavida_adapter.attention import attend
from lavida_adapter.prefix_attention import PromptSlots, attend_prompt, by_kernel

N_PROMPT = 1064
LAYERS = 8
"""So many caches in turn, so that none stays in the GPU's own cache."""
SPLITS = (1, 2, 4, 8, 16)
REPLAYS = 5


def measure_attention(bench: Bench) -> None:
    """One layer's attention of a whole answer, in milliseconds, for each kernel; and its distance from float32."""
    if bench.device.type != "cuda":
        bench.recorder.put({"part": "attention", "lm": bench.lm}, {"skipped": "needs CUDA"})
        return
    for batch in bench.batches:
        calls = calls_of(bench, batch)
        for name, call in calls.items():
            key = {"part": "attention", "lm": bench.lm, "batch": batch, "name": name}
            found = bench.recorder.measure(key, partial(_time, bench, call, calls["float32"]))
            if found is not None:
                bench.recorder.put(key, {**found, "work": {"layer": [0.0, kv_bytes(bench, batch)]}})


def kv_bytes(bench: Bench, batch: int) -> float:
    lm = bench.model.config.lm
    return 2.0 * batch * lm.n_kv_heads * lm.head_dim * (N_PROMPT + bench.n_answer) * bench.model.dtype.itemsize


def calls_of(bench: Bench, batch: int) -> dict[str, Callable[[int], Tensor]]:
    """Attention [B, A, H, Dh] over the cache of a layer, by name."""
    lm, n, device = bench.model.config.lm, bench.n_answer, bench.device

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, lm.head_dim, device=device, dtype=bench.model.dtype)

    q = draw(lm.n_heads, n)
    prompts = [(draw(lm.n_kv_heads, N_PROMPT), draw(lm.n_kv_heads, N_PROMPT)) for _ in range(LAYERS)]
    answer = draw(lm.n_kv_heads, n), draw(lm.n_kv_heads, n)
    joined = [(torch.cat([keys, answer[0]], dim=2), torch.cat([values, answer[1]], dim=2)) for keys, values in prompts]
    used = PromptSlots.blank(batch, N_PROMPT, device)
    used.fill(N_PROMPT, None)
    mask = torch.ones(batch, 1, 1, N_PROMPT + n, dtype=torch.bool, device=device)

    def torch_kernel(layer: int, mask: Tensor | None) -> Tensor:
        return attend(q, joined[layer][0], joined[layer][1], mask).transpose(1, 2)

    def exact(layer: int) -> Tensor:
        keys, values = joined[layer]
        return attend(q.float(), keys.float(), values.float(), None, "math").transpose(1, 2)

    found: dict[str, Callable[[int], Tensor]] = {
        "float32": exact,
        "torch": partial(torch_kernel, mask=None),
        "torch, mask": partial(torch_kernel, mask=mask),
        "prompt kernel": lambda layer: attend_prompt(q, prompts[layer], used, answer),
    }
    for splits in SPLITS:
        found[f"prompt kernel, {splits} splits"] = lambda layer, splits=splits: by_kernel(  # type: ignore[misc]
            q, prompts[layer], used, answer, splits
        )
    return found


def _time(bench: Bench, call: Callable[[int], Tensor], exact: Callable[[int], Tensor]) -> dict[str, object]:
    found, right = call(0).float(), exact(0)
    graph, _ = captured(lambda: [call(layer) for layer in range(LAYERS)][-1])
    times = [{"layer": time_ms(graph.replay, bench.device, REPLAYS) / LAYERS} for _ in range(bench.rounds)]
    return {**medians(times), "relative_error": float((found - right).norm() / right.norm())}
