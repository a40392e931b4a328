"""The bench of a step's kernels on a CPU: what it compares, and its arithmetic."""

import os
import shutil

import pytest
import torch

from experiments.bench import step_kernels
from lavida_adapter import LladaConfig
from lavida_adapter.attention import has_avx512
from shirg import UserError


@pytest.mark.skipif(
    not has_avx512() or shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs AVX-512 and a C++ compiler"
)
def test_kernels_are_timed_beside_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_kernels, "COLD_BYTES", 0)
    config = LladaConfig(d_model=32, n_heads=2, n_kv_heads=2, n_layers=1, mlp_hidden_size=48, vocab_size=40)
    report = step_kernels.measure("tiny", config, 20, 4, 2, repeats=2).report
    assert [row["name"] for row in report["rows"]] == ["query", "key", "gate", "down", "head", "attention"]
    for row in report["rows"]:
        assert row["times_faster"] == row["torch_us"] / row["ours_us"]
    assert report["rows"][2]["gflops"] == pytest.approx(2 * 8 * 32 * 48 / report["rows"][2]["ours_us"] / 1000)
    with pytest.raises(UserError, match="measures those of a CPU with AVX-512, which cuda is not"):
        step_kernels.run(device=torch.device("cuda"), model="bench_tiny", prompt=[20], answer=4, batch=[1], repeats=1)
