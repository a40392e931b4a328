"""`train.py ... plan=true`: what it prints, against arithmetic that does not come from the model."""

import json
import re
import struct
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from experiments import build
from experiments.jobs.distributed import Ranks
from experiments.schema import CONF, VERSION_BASE
from experiments.training.plan import plan
from experiments.training.stages import build_stage
from lavida_adapter.lightning_module import LavidaModule
from tests.experiments.conftest import ROOT, Command

GIB, MIB = 2**30, 2**20
D, F, LM_LAYERS, ROWS = 4096, 12288, 32, 126349
"""LLaDA-8B: width, width of the feed-forward layer, blocks, vocabulary after loading."""
W, V, TOWER_LAYERS = 1152, 4304, 26
"""SigLIP so400m: the same."""
TRAINED = 64 * (W + D) + 8 * 64 * (W + W)
"""SHIRG-980: rank 64 on the projector's first layer, and on queries and keys of four vision layers."""
BLOCK = 4 * D * D + 3 * D * F
SPLIT = LM_LAYERS * BLOCK + ROWS * D + TOWER_LAYERS * (4 * W * W + 2 * W * V)
"""What trainer=fsdp splits: linear layers of blocks, and the head."""
TOTAL = 8_433_894_944
"""docs/lavida.md: what the published checkpoint holds after loading."""
TOWER = TOTAL - LM_LAYERS * (BLOCK + 2 * D) - 2 * ROWS * D - D - (W * D + D) - (D * D + D) - D


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name="train"):
        return compose("train", [*overrides, "plan=true", "study=s"])


def printed(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    plan(composed(*overrides))
    return capsys.readouterr().out


def table(text: str) -> dict[int, list[float]]:
    """GPUs: rows, base, trained, activations and totals, each of the latter without and with checkpointing."""
    lines = re.findall(r"^ +(\d+ +\d+ .*\(.*)$", text, re.M)
    found = [[float(n.replace(",", "")) for n in re.findall(r"[\d.,]+", line)] for line in lines]
    return {int(first): rest for first, *rest in found}


@pytest.fixture(scope="module")
def published() -> str:
    """The plan of the published checkpoint, of which no file is here."""
    with redirect_stdout(out := StringIO()):
        plan(composed("model=lavida_8b", "recipe=shirg_980"))
    return out.getvalue()


def test_parameters_and_steps_of_the_published_model(published: str) -> None:
    assert f"mm_projector: {64 * (W + D):,} parameters (LoRA, rank 64, 1 layer)" in published
    assert f"vision_tower: {8 * 64 * 2 * W:,} parameters (LoRA, rank 64, 8 layers)" in published
    assert f"together {TRAINED:,} of {TOTAL + TRAINED:,} parameters (0.018%)" in published
    transformer = LM_LAYERS * (BLOCK + 2 * D) + 2 * ROWS * D + D
    assert f"transformer {transformer:,}" in published and f"mm_projector {W * D + D + D * D + D:,}" in published
    assert "steps    8,719 of 128 samples on any number of GPUs" in published
    assert (
        f"data     {8719 * 128:,} samples from the 1,000,000 in synth_glyphs: 1.12 epochs of 7,813 steps" in published
    )


def test_bytes_of_the_published_model(published: str) -> None:
    """bfloat16. By hand, what the backward pass needs of each position, where weights are frozen:

    a block of the language model: the inputs of two norms in float32 (8 D bytes), queries, keys, values and output of
    attention (8 D) with one float32 a head, gate, its SiLU and the linear branch (6 F); a layer of the tower: inputs of
    two norms (4 W), attention (8 W), the input of the GELU (2 V).
    """
    found = table(published)
    assert list(found) == [1, 2, 4, 8, 16, 32, 64]
    picture, prompt, answer = map(int, re.findall(r"sample +(\d+) .* \+ (\d+) of text \+ (\d+) of", published)[0])
    assert picture == 980 and answer - 127 in range(2, 8)  # padding, and a glyph's name with its end
    length = 2 * (picture + prompt + answer)
    block = length * (8 * D + 8 * D + 4 * 32 + 6 * F)
    tower = 3645 * (4 * W + 8 * W + 4 * 16 + 2 * V)
    logits = answer * ROWS * (4 + 2)
    kept = LM_LAYERS * block + TOWER_LAYERS * tower + logits
    less_kept = LM_LAYERS * length * 2 * D + TOWER_LAYERS * 3645 * 2 * W + block + logits
    for gpus, (rows, base, trained, plain, less, *totals) in found.items():
        assert rows == 128 / gpus
        assert base == pytest.approx(TOTAL * 2 / GIB, abs=0.01)
        assert trained == pytest.approx(TRAINED * 16 / GIB, abs=0.01)
        assert plain == pytest.approx(rows * kept / GIB, rel=0.05)
        assert less == pytest.approx(rows * less_kept / GIB, rel=0.15)
        # The head and the block before it are whole at a time.
        shards = TOTAL if gpus == 1 else TOTAL - SPLIT + SPLIT / gpus + ROWS * D + BLOCK
        weights = [2 * n / GIB for n in (TOTAL, TOTAL, shards, shards)]
        expected = [w + trained + kept for w, kept in zip(weights, (plain, less, plain, less), strict=True)]
        assert totals == pytest.approx(expected, abs=0.03)
    assert found[8][6] < 40 < found[8][5]  # 16 rows fit on a GPU of 40 GiB with checkpointing, and not without


def test_bytes_of_the_published_dream(capsys: pytest.CaptureFixture[str]) -> None:
    """As above; keys and values have four of 28 heads, and the head 151,667 rows."""
    text = printed(capsys, "model=lavida_dream", "recipe=shirg_980")
    width, kv, feed_forward, layers = 3584, 4 * 128, 18944, 28
    picture, prompt, answer = map(int, re.findall(r"sample +(\d+) .* \+ (\d+) of text \+ (\d+) of", text)[0])
    length = 2 * (picture + prompt + answer)
    block = length * (8 * width + 2 * (2 * width + 2 * kv) + 4 * 28 + 6 * feed_forward)
    tower = 3645 * (4 * W + 8 * W + 4 * 16 + 2 * V)
    logits = answer * 151_667 * (4 + 2)
    total = 7_615_616_512 - 2 * (152_064 - 151_667) * width + TOWER + (W + 1) * width + (width + 1) * width + width
    assert f" of {total + 64 * (W + width) + 8 * 64 * 2 * W:,} parameters" in text
    for gpus, (rows, base, _, plain, less, *_) in table(text).items():
        assert rows == 128 / gpus and base == pytest.approx(total * 2 / GIB, abs=0.01)
        assert plain == pytest.approx(rows * (layers * block + TOWER_LAYERS * tower + logits) / GIB, rel=0.05)
        less_kept = layers * length * 2 * width + TOWER_LAYERS * 3645 * 2 * W + block + logits
        assert less == pytest.approx(rows * less_kept / GIB, rel=0.15)


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes by name from the head of a safetensors file."""
    with open(folder / "model.safetensors", "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        head = json.loads(file.read(size))
    return {name: entry["shape"] for name, entry in head.items() if name != "__metadata__"}


def test_the_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "device=cpu")
    shapes = stored_shapes(ROOT / "weights/tiny")
    adapted = re.compile(r"mm_projector\.[02]|layers\.0\.self_attn\.[qk]_proj|blocks\.\d+\.\w+_(proj|out)")
    lora = sum(8 * sum(s) for n, s in shapes.items() if adapted.search(n) and len(s) == 2 and n.endswith("weight"))
    newline = shapes["model.image_newline"][0]
    total = sum(torch.Size(s).numel() for s in shapes.values())
    assert f"together {lora + newline:,} of {total + lora:,} parameters" in text
    assert "steps    350 of 36 samples" in text and "data     12,600 samples from the 1,000,000" in text
    found = table(text)
    assert list(found) == [1, 2, 4]
    for gpus, (rows, base, trained, *_) in found.items():
        assert rows == 36 / gpus
        assert base == pytest.approx((total - newline) * 4 / MIB, abs=0.01)
        assert trained == pytest.approx((lora + newline) * 16 / MIB, abs=0.01)


def kept_by_a_step(*overrides: str) -> int:
    """Bytes that autograd keeps of the first step of the run itself, without gradient checkpointing."""
    cfg = composed("device=cpu", *overrides)
    stage = build_stage(cfg, build.build_model(cfg, torch.device("cpu")), Ranks())
    assert isinstance(stage.module, LavidaModule)
    stage.module.model.train()
    own = {p.untyped_storage()._cdata for p in stage.module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage())._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    batch = stage.draw(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = stage.module.loss(batch, torch.Generator().manual_seed(0))
    assert loss.requires_grad
    return sum(kept.values())


def test_activations_are_those_of_a_real_step(capsys: pytest.CaptureFixture[str]) -> None:
    """12 questions about as many pictures, so that every row has its own."""
    words = ["batch_size=12", "data.qa_per_image=1", "data.density=[dense]"]
    row = table(printed(capsys, "device=cpu", *words))[1]
    assert row[3] == pytest.approx(kept_by_a_step(*words) / MIB, rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stage=text", "model=tiny_scratch"], "plan=true: stage=text makes the tiny model's base in minutes and has"),
        (["model.path=nobody/nothing"], "plan=true downloads nothing, and model.path=nobody/nothing is not a folder"),
        (["batch_size=0"], "batch_size=0: give at least 1"),
        (["optim.steps=0"], "training needs steps >= 1"),
        (["++optim.rates.selector=0.1"], "optim.rates.selector: nothing of it is trained"),
        (["lora.targets=[mm_projector.1]"], "the nearest names are mm_projector"),
        (["dtype=float16"], "dtype=float16 loses small gradients"),
        (["mix.budgets=[none]"], "budget=none: give base"),
        (
            ["lora=progressive", "lora.targets=[mm_projector.0]", "++lora.ranks.mm_projector=2", "lora.grow.start=3"],
            "lora.grow.start=3: no layer has more than 2 ranks",
        ),
    ],
)
def test_a_plan_refuses_what_the_run_would_refuse(overrides: Sequence[str], sentence: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        plan(composed("device=cpu", *overrides))


@pytest.mark.parametrize(("words", "code"), [(["selector=random"], 0), (["batch_size=0"], 1)])
def test_nothing_is_written(words: list[str], code: int, command: Command, tmp_path: Path) -> None:
    ended = command("train", "plan=true", "device=cpu", *words)
    assert ended.code == code and list(tmp_path.iterdir()) == []
    assert ended.err == ([] if code == 0 else ["error: batch_size=0: give at least 1"])
    assert ("together 44,128 of" in ended.out) is (code == 0)
