"""The kernels of a denoising step on a CPU, beside torch's: products with packed weights, and attention to a prompt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.common import (
    BenchResult,
    Columns,
    load_model,
    only_one,
    table_of,
    time_in_turns,
    title_of,
)
from experiments.profiling import measure_limits
from lavida_adapter.attention import attend, has_avx512
from shirg import UserError

COLD_BYTES = 2**25
"""Each kernel runs over weights or keys of this size, one after the other, so that none is found in a cache."""
COLUMNS: Columns = {
    "": ("name", ""),
    "torch us": ("torch_us", ".0f"),
    "ours us": ("ours_us", ".0f"),
    "torch / ours": ("times_faster", ".2f"),
    "ours GFLOP/s": ("gflops", ".0f"),
}
Kernel = Callable[..., Tensor]


def run(
    *, device: torch.device, model: str, prompt: list[int], answer: int, batch: list[int], repeats: int
) -> BenchResult:
    n_prompt, size = only_one("kernels", "prompt", prompt), only_one("kernels", "batch", batch)
    if device.type != "cpu" or not has_avx512():
        raise UserError(
            f"bench kernels measures those of a CPU with AVX-512, which {device} is not: use another machine"
        )
    return measure(model, load_model(model, device).lm.config, n_prompt, answer, size, repeats)


@torch.inference_mode()
def measure(name: str, config: Any, n_prompt: int, n_answer: int, batch: int, repeats: int) -> BenchResult:
    """`config`: of a language model, whose sizes the products have."""
    from lavida_adapter.cpu_kernels import PackedLinear, load

    load()
    d, kv, rows = config.d_model, config.n_kv_heads * config.head_dim, batch * n_answer
    shapes = {
        "query": (d, d),
        "key": (d, kv),
        "gate": (d, config.mlp_hidden_size),
        "down": (config.mlp_hidden_size, d),
        "head": (d, config.vocab_size),
    }
    found = []
    for part, (n_in, n_out) in shapes.items():
        layers = [nn.Linear(n_in, n_out, bias=False) for _ in range(copies(4 * n_in * n_out))]
        packed = [PackedLinear(layer) for layer in layers]
        x = torch.randn(rows, n_in)
        inputs = [(x, layer, ours) for layer, ours in zip(layers, packed, strict=True)]
        found.append(compare(part, inputs, 2 * rows * n_in * n_out, repeats, _product, _packed))
    q = torch.randn(batch, config.n_heads, n_answer, config.head_dim)
    shape = batch, config.n_kv_heads, n_prompt + n_answer, config.head_dim
    pairs = [(q, torch.randn(shape), torch.randn(shape)) for _ in range(copies(8 * batch * kv * shape[2]))]
    flops = 4 * rows * shape[2] * d
    found.append(compare("attention", pairs, flops, repeats, _attention, _own_attention))
    limits = measure_limits(torch.device("cpu"), torch.float32)
    sizes = {"batch": batch, "prompt": n_prompt, "answer": n_answer, "threads": torch.get_num_threads()}
    report = {"model": name, **sizes, "dtype": "float32", "limits": limits.report(), "rows": found}
    note = f"torch's largest product on this machine: {limits.matmul / 1e9:.0f} GFLOP/s"
    return BenchResult(title_of(name, sizes), report, table_of(found, COLUMNS), (note,))


def copies(n_bytes: int) -> int:
    return max(2, COLD_BYTES // n_bytes)


def _product(x: Tensor, layer: nn.Module, _: nn.Module) -> Tensor:
    return layer(x)


def _packed(x: Tensor, _: nn.Module, ours: nn.Module) -> Tensor:
    return ours(x)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, None)


def _own_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, None, "cpp")


def compare(name: str, inputs: list[Any], flops: int, repeats: int, torchs: Kernel, ours: Kernel) -> dict[str, Any]:
    """Microseconds of one call of each, in turns over all inputs; CPU time, which other processes disturb less."""
    torch.testing.assert_close(ours(*inputs[0]), torchs(*inputs[0]), rtol=0, atol=1e-4)
    calls = {key: lambda f=f: [f(*x) for x in inputs] for key, f in (("torch", torchs), ("ours", ours))}
    times = time_in_turns(calls, torch.device("cpu"), repeats=repeats)
    torch_us, ours_us = (1000 * times[key].report()["cpu_ms"] / len(inputs) for key in ("torch", "ours"))
    faster, rate = torch_us / ours_us, flops / ours_us / 1000
    return {"name": name, "torch_us": torch_us, "ours_us": ours_us, "times_faster": faster, "gflops": rate}
