"""Packed products and attention on a CPU give what torch's own kernels give; the kernels are compiled for the tests."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavida_adapter import Lavida, cpu_kernels
from lavida_adapter.attention import attend, has_avx512
from lavida_adapter.cpu_kernels import PackedLinear, can_pack, compiler, load, pack, packed_copy, state_of
from lavida_adapter.engine import CompiledEngine, DecodeSteps, EagerEngine
from lavida_adapter.lora import LoraConfig, add_lora, merge_lora
from shirg import UserError
from tests.lavida_adapter.tiny import noise, tiny_model

CXX = pytest.mark.skipif(
    not has_avx512() or shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs AVX-512 and a C++ compiler"
)
WIDE = {"d_model": 64, "n_heads": 4, "n_layers": 3}
"""Heads of 16, which the kernel takes."""


def test_weights_in_panels() -> None:
    weight = noise(70, 5)
    panels = pack(weight)
    assert panels.shape == (3, 5, 32)
    assert torch.equal(panels.transpose(1, 2).flatten(0, 1)[:70], weight)
    assert not panels[2, :, 6:].any(), "filled up with zeros"


@CXX
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 32, 100])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (7, 32), (40, 33), (64, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_the_same(rows: int, n_in: int, n_out: int, bias: bool) -> None:
    load()
    layer, x = nn.Linear(n_in, n_out, bias=bias), noise(2, rows, n_in)
    packed = PackedLinear(layer)
    for given in (x, x.transpose(0, 1), noise(2, n_in, rows).transpose(1, 2)):
        torch.testing.assert_close(packed(given), layer(given), rtol=1e-5, atol=1e-5)


@CXX
@pytest.mark.parametrize("n_queries", [1, 12, 16, 17, 32, 45, 70])
@pytest.mark.parametrize(("n_keys", "width", "groups"), [(1, 16, 1), (128, 32, 1), (300, 48, 2), (129, 128, 4)])
def test_attention_computes_the_same(n_queries: int, n_keys: int, width: int, groups: int) -> None:
    load()
    q = 3 * noise(2, n_queries, 4, width).transpose(1, 2)
    k, v = (noise(2, 4 // groups, n_keys + 5, width, seed=i)[:, :, :n_keys] for i in (1, 2))
    for keys, tolerance in ((k, 1e-5), (40 * k, 3e-4), (k.transpose(2, 3).contiguous().transpose(2, 3), 1e-5)):
        expected = F.scaled_dot_product_attention(*(x.double() for x in (q, keys, v)), enable_gqa=True)
        found = attend(q, keys, v, None, "cpp")
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=tolerance)


@CXX
def test_what_the_kernel_does_not_compute_is_left_to_torch() -> None:
    q, mask = noise(2, 4, 3, 16), torch.tensor([[True, True, False]] * 2)[:, None, None]
    assert torch.equal(attend(q, q, q, mask, "cpp"), attend(q, q, q, mask))
    narrow = noise(2, 4, 3, 8)
    assert torch.equal(attend(narrow, narrow, narrow, None, "cpp"), attend(narrow, narrow, narrow, None))
    with pytest.raises(RuntimeError, match="values in order"):
        torch.ops.shirg_cpu.attend(q, q, q.transpose(2, 3).contiguous().transpose(2, 3))


@CXX
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_model_shares_all_but_its_panels(family: str, threads: int) -> None:
    lm = tiny_model(lm={**WIDE, "family": family, "n_kv_heads": 2}).lm
    packed = packed_copy(lm)
    assert packed.backend == "cpp" and lm.backend == "sdpa"
    assert packed.embedding.weight is lm.embedding.weight
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        embeds, ids = noise(2, 50, 64), torch.full((2, 6), lm.config.mask_token_id)
        cache, expected = packed.prefill(embeds, n_answer=6), lm.prefill(embeds, n_answer=6)
        for own, theirs in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
        want = torch.tensor([[0, 3, 5], [4, 2, 2]])
        logits = DecodeSteps(packed, cache, 6)(ids, want)
        torch.testing.assert_close(logits, DecodeSteps(lm, expected, 6)(ids, want), rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


class Uncompiled(CompiledEngine):
    """The compiled engine without compiling its functions, which takes most of a minute."""

    def steps(self, cache, n_answer):  # type: ignore[no-untyped-def]
        self._find_weights()
        return EagerEngine(self._run).steps(cache, n_answer)

    def _find_weights(self) -> None:
        super()._find_weights()
        self._prefill = self._run.prefill


def train_a_step(model: Lavida) -> None:
    with torch.no_grad():
        model.lm.layers[0].query.weight.mul_(1.5)


def merge(model: Lavida) -> None:
    add_lora(model, LoraConfig(targets=("transformer.blocks.*.q_proj",), rank=2))
    for name, p in model.lm.named_parameters():
        if "lora_" in name:
            p.data.normal_()
    merge_lora(model.lm)


@CXX
@torch.no_grad()
@pytest.mark.parametrize("change", [train_a_step, merge])
def test_changed_weights_are_packed_again(change) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(lm=WIDE)
    engine = Uncompiled(model.lm)
    embeds, ids = noise(1, 9, 64), torch.full((1, 6), model.config.lm.mask_token_id)
    first = engine.steps(engine.prefill(embeds, n_answer=6), 6)(ids, None)
    panels = engine._run.layers[0].query.panels
    engine.prefill(embeds, n_answer=6)
    assert engine._run.layers[0].query.panels is panels, "nothing has changed"
    change(model)
    second = engine.steps(engine.prefill(embeds, n_answer=6), 6)(ids, None)
    expected = DecodeSteps(model.lm, model.lm.prefill(embeds, n_answer=6), 6)(ids, None)
    assert (second - first).abs().max() > 1e-3
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-5)


@CXX
@torch.inference_mode()
def test_unmerged_adapters_stay_in_the_packed_model() -> None:
    model = tiny_model(lm=WIDE)
    add_lora(model, LoraConfig(targets=("transformer.blocks.*.{q_proj,ff_out}",), rank=2))
    for name, p in model.lm.named_parameters():
        if "lora_" in name:
            p.normal_()
    embeds = noise(1, 9, 64)
    torch.testing.assert_close(packed_copy(model.lm)(embeds), model.lm(embeds), rtol=0, atol=1e-4)


def test_other_types_are_not_packed() -> None:
    lm = tiny_model().lm
    before = state_of(lm)
    assert can_pack(lm) == has_avx512() and state_of(lm) == before
    assert not can_pack(lm.to(torch.bfloat16)) and state_of(lm) != before


def test_without_avx_512_the_engine_runs_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    lm = tiny_model().lm
    assert not can_pack(lm) and CompiledEngine(lm)._run is lm


@CXX
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "FLAGS", ("-no-such-flag",))
    with pytest.raises(UserError, match=r"cannot compile cpu_kernels.cpp \(.*no-such-flag.*name another compiler"):
        cpu_kernels._built()
    assert [path.name for path in tmp_path.rglob("*")] == ["shirg_cpu"], "nothing is left behind"


@CXX
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"which cannot be written \(Not a directory\): name another folder in TORCH_EXT"
    ):
        cpu_kernels._built()


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_a_torch_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UserError, match=rf"needs torch 2.10 for weights in float32, and this is {version[:3]}"):
        load.__wrapped__()


@torch.inference_mode()
def test_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    sentence = (
        "needs a C.. compiler on a CPU, and there is no 'no-such-compiler' on the path: install one, name another"
    )
    with pytest.raises(UserError, match=sentence):
        compiler()
    with pytest.raises(UserError, match=sentence):
        CompiledEngine(tiny_model().lm)
