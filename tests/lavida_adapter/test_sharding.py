"""A base that is split over two processes, against one that each process holds whole."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import Pooled
from lavida_adapter import DecodeConfig, Lavida, LoraConfig, ObjectiveConfig, add_lora
from lavida_adapter.adapter_files import base_fingerprint, save_adapter
from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.sharding import draw, gather_base, held, own_rows, shard
from shirg import UserError
from tests.lavida_adapter.tiny import tiny_config, tokenizer
from tests.lavida_adapter.training_runs import LORA
from tests.lavida_adapter.training_runs import draw as batch_of

WORLD = 2
LM_LAYERS, TOWER_LAYERS = 3, 2
CPU = torch.device("cpu")
DREAM = replace(LORA, targets=("mm_projector.{0,2}", "transformer.layers.*.self_attn.q_proj"))


class Gathers(TorchDispatchMode):
    """Counts what processes send to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))

    def counted(self) -> int:
        """Gathers since the last call of this method; there is nothing else."""
        calls, self.calls = self.calls, Counter()
        assert set(calls) <= {"_allgather_base_"}
        return sum(calls.values())


def two_processes(work: Callable[..., None], folder: Path, *given: Any) -> None:
    mp.spawn(_process, args=(work, folder, *given), nprocs=WORLD)


def _process(rank: int, work: Callable[..., None], folder: Path, *given: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    work(rank, init_device_mesh("cpu", (WORLD,)), folder, *given)
    dist.destroy_process_group()


def whole_model(family: str) -> Lavida:
    torch.manual_seed(0)
    return Lavida(tiny_config(lm={"family": family, "n_layers": LM_LAYERS}), tokenizer(family)).requires_grad_(False)


def split_model(family: str, mesh: DeviceMesh) -> Lavida:
    with torch.device("meta"):
        model = whole_model(family)
    shard(model, mesh)
    torch.manual_seed(0)
    draw(model, CPU)
    return model


def step(model: Lavida, mask: bool, *, recompute: bool = False) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Loss, gradients, and the gathers of the forward and of the backward pass."""
    model.checkpoint_gradients(recompute)
    with Gathers() as gathers:
        objective = ObjectiveConfig(extra_padding=4, prefix_mask=mask)
        loss = model.loss(batch_of(0), Pooled(), objective, torch.Generator().manual_seed(3))
        counts = [gathers.counted()]
        loss.backward()
        counts.append(gathers.counted())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients, counts


def check_parts(split: Lavida, whole: Lavida) -> None:
    """Own rows of the same numbers, all of them frozen matrices; the rest whole."""
    theirs = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        assert torch.equal(held(parameter), theirs[name][own_rows(parameter)]), name
    of_layers = [name for name in theirs if re.search(r"(layers|blocks)\.\d+\..*(proj|out|fc\d)\.weight$", name)]
    head = next(name for name, p in theirs.items() if p is whole.lm.head.weight)
    assert {n for n, p in split.named_parameters() if isinstance(p, DTensor)} == {*of_layers, head}
    assert len(of_layers) == 7 * LM_LAYERS + 6 * TOWER_LAYERS


def train_and_answer(rank: int, mesh: DeviceMesh, folder: Path) -> None:
    check_training(rank, mesh, folder / "llada", LORA, 0.0)
    check_training(rank, mesh, folder / "dream", DREAM, 1e-6)


def check_training(rank: int, mesh: DeviceMesh, folder: Path, lora: LoraConfig, tolerance: float) -> None:
    whole, split = whole_model(folder.name), split_model(folder.name, mesh)
    check_parts(split, whole)
    with Gathers() as gathers:
        assert fingerprint(split) == fingerprint(whole)
    assert gathers.calls == {"allreduce_": 1}
    for model in (whole, split):
        torch.manual_seed(1)
        add_lora(model, lora, Pooled())
    once = TOWER_LAYERS + LM_LAYERS + 1
    last_alone = split.lm.shift  # of the last block in a prefill: keys and values, then what predicts the first token
    for mask, forward, backward in (
        (False, once, LM_LAYERS + 1),
        (True, once + LM_LAYERS + last_alone, 2 * LM_LAYERS + last_alone + 1),
    ):
        for recompute in (False, True):
            loss, gradients, _ = step(whole, mask, recompute=recompute)
            found_loss, found, counts = step(split, mask, recompute=recompute)
            assert found_loss == loss and found.keys() == gradients.keys() and len(found) == 2 * (2 + LM_LAYERS) + 1
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)
            # FSDP gathers the layer before the first block in vain, where the tower needs no gradient.
            assert counts[0] == forward and backward <= counts[1] <= backward + 1, counts
    before = own_bytes(split)
    answers = []
    for model in (whole, split):
        prefix = model.encode(batch_of(0).images, batch_of(0).questions, Pooled())
        with Gathers() as gathers:
            found_answer = model.generate(prefix, DecodeConfig(max_new_tokens=6))
        answers.append(found_answer.ids_BA)
    assert torch.equal(*answers)
    assert gathers.counted() <= LM_LAYERS + last_alone + found_answer.forwards * (LM_LAYERS + 1)
    assert step(split, False)[0] == step(whole, False)[0], "a training goes on after an answer"
    assert own_bytes(split) == before
    base = base_fingerprint(split, lora)
    if rank == 0:
        save_adapter(split, lora, folder / "split", base=base)
        save_adapter(whole, lora, folder / "whole")
        for path in (folder / "whole").iterdir():
            assert (folder / "split" / path.name).read_bytes() == path.read_bytes(), path.name
    gather_base(split)
    assert not any(isinstance(p, DTensor) for p in split.parameters())


def own_bytes(model: Lavida) -> int:
    return sum(held(p).nbytes for p in model.parameters())


def test_a_split_base_is_the_base(tmp_path: Path) -> None:
    """Weights, fingerprint, losses, gradients, answers and the adapter's file, bit by bit for LLaDA.

    With a prefix mask Dream's last block has two outputs, whose gradients are added in another order. The gathers are
    one for each block and pass.
    """
    two_processes(train_and_answer, tmp_path)


WIDE = {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 2048, "n_layers": 8}
FILE = 24_000_000


def memory() -> dict[str, int]:
    """Bytes that this process holds, without what it shares with files, and the most that it ever held with it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmHWM", "VmRSS")}


def load_in_parts(rank: int, mesh: DeviceMesh, folder: Path) -> None:
    loaded = Lavida.from_pretrained(folder / "model")  # this also imports what loading needs
    expected = fingerprint(loaded)
    del loaded
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    split = Lavida.from_pretrained(folder / "model", prepare=lambda model: shard(model.requires_grad_(False), mesh))
    after = memory()
    base = sum(p.numel() * p.element_size() for p in split.parameters())
    own, most = own_bytes(split), after["VmHWM"] - before["VmRSS"]
    print(f"rank {rank}: base {base / 1e6:.1f} MB, own {own / 1e6:.1f} MB, peak of loading {most / 1e6:.1f} MB")
    assert base > 135e6 and base / 2 < own < 0.51 * base
    assert after["RssAnon"] - before["RssAnon"] < own + 8e6
    assert most < own + FILE + 8e6
    assert fingerprint(split) == expected
    with pytest.raises(UserError, match=r"has NaN or infinity, as float32, in model.transformer.blocks.1.up_proj"):
        Lavida.from_pretrained(folder / "broken", prepare=lambda model: shard(model.requires_grad_(False), mesh))
    with torch.device("meta"):
        model = whole_model("llada").requires_grad_(True)
    with pytest.raises(UserError, match="splits the frozen layers of a base, and none is frozen"):
        shard(model, mesh)


def test_a_process_reads_its_own_rows(tmp_path: Path) -> None:
    """The peak of loading is the own part of the base, and one file that is read; a fault of one part stops all."""
    with torch.random.fork_rng():
        Lavida(tiny_config(lm=WIDE), tokenizer()).save_pretrained(tmp_path / "model", max_shard_size=FILE)
        model = whole_model("llada")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 4
    model.lm.layers[1].up.weight[-1, 3] = float("nan")  # a row of the second process
    model.save_pretrained(tmp_path / "broken")
    two_processes(load_in_parts, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_weights_are_those_of_a_model_that_is_built(dtype: torch.dtype) -> None:
    config = tiny_config(lm={"init_std": 0.02})
    with torch.device("meta"):
        drawn = Lavida(config, tokenizer()).to(dtype)
    torch.manual_seed(5)
    draw(drawn, CPU)
    torch.manual_seed(5)
    torch.set_default_dtype(dtype)
    try:
        built = Lavida(config, tokenizer())
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.state_dict().keys() == built.state_dict().keys()
    for name, tensor in built.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], tensor), name
    tower = drawn.model.vision_tower.vision_tower.vision_model.embeddings
    assert torch.equal(tower.position_ids, built.model.vision_tower.vision_tower.vision_model.embeddings.position_ids)
