"""A GPU's rules, held on a CPU: devices, host waits, launches, wide temporaries of all that answers or is trained.

`tests/pretend_cuda.py` says what is counted; docs/results/gpu, "Counted without a GPU", what this proves and what not.
"""

import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

import lavida_adapter.model as model_module
from lavida_adapter import DecodeConfig, Lavida, LmEmbed
from tests.lavida_adapter.tiny import noise
from tests.pretend_cuda import CUDA, SMALL, values_of
from tests.pretend_machine import Graph, capture, pretend
from tests.pretend_rows import (
    CACHES,
    DECODINGS,
    FAMILIES,
    RELEVANCES,
    ROOT,
    WORDS,
    A,
    Row,
    encode,
    machine,
    model_of,
    rows,
)
from tests.test_contract import ALL

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU has tests of its own")

ROWS = rows()
FILE = ROOT / "docs" / "results" / "gpu" / "pretend_cuda.json"

WAITS_INSIDE = {
    "threshold": "how many tokens are sure enough",
    "early_stop": "whether the answers have ended",
    "parity": "whether the mask token was written, as the published sampler may",
    "dream_parity": "which slots are masked: the published sampler uses them as an index",
}
"""What only the device knows after a step of these decodings: one wait in each."""
ASKED_BEFORE = ("early_stop", "parity", "dream_parity")
"""One wait before the first step: an answer may have ended or hold a mask by then."""
TRAINING = {"prefix_mask": 4}
"""Waits of a loss and its gradient, 3 for the other objectives: how many tokens the pictures use, how far answers are
padded (drawn on the device), which targets are masked; with `prefix_mask` also where the answers begin."""
OF_A_LAYER = {
    # Launches of a layer in an eager step, or kernels of a layer in a recorded one before any compiler joins them.
    "eager": {"llada": 34, "dream": 32},
    "graph": {"llada": 24, "dream": 22},
    "compile": {"llada": 24, "dream": 22},
    "cast": {"llada": 36, "dream": 34},
    "fp8": {"llada": 36, "dream": 34},
    "int8": {"llada": 36, "dream": 34},
}


def waits_of_answer(name: str, batch: int, steps: int) -> int:
    """One for the ids of the answers; those of each step; what is asked before the first."""
    inside = steps if name in WAITS_INSIDE else 0
    # `origin` draws on the device how many tokens each step fills: for each row and step, the last one excepted.
    drawn = batch * (A - 1) if name == "origin" else 0
    return 1 + inside + (name in ASKED_BEFORE) + drawn


def expected_waits(row: str, found: Row) -> int:
    kind, *names = row.split(",")[0].split()
    if kind in ("encode", "relevance"):
        return 1  # how many tokens the pictures of the batch use
    name, batch = names[1], int(names[2][1:])
    if kind == "train":
        return TRAINING.get(name, 3)
    return waits_of_answer(name if kind != "cache" else "default", batch, found["steps"])


@pytest.mark.parametrize("row", [name for name in ROWS if not name.startswith("layer")])
def test_a_gpu_has_no_more_to_do(row: str) -> None:
    found, committed = ROWS[row](), list(json.loads(FILE.read_text()).values())[-1]
    where = found.pop("where")
    assert found["waits"] == expected_waits(row, found), where
    assert found["mixed"] == found.get("refused", 0) == 0
    for count in {"launches", "step_launches", "captured"} & set(found):
        # A new selector has no number yet; a number that has to rise is written anew by tests.pretend_rows.
        assert row not in committed or found[count] <= committed[row][count], count
    if "steps" in found:
        assert found["step_waits"] == (row.split()[2] in WAITS_INSIDE and not row.startswith("cache"))
        assert found["vocabulary"] <= A * WORDS, "one answer's logits at a time"


@pytest.mark.parametrize("row", [name for name in ROWS if name.startswith("layer")])
def test_a_layer_launches_no_more(row: str) -> None:
    _, family, kind = row.split()
    assert sum(ROWS[row]().values()) == OF_A_LAYER[kind][family]


def test_every_option_has_a_row() -> None:
    assert {row.split()[1] for row in ROWS if row.startswith("encode")} == set(ALL)
    for group, tried in (("cache", set(CACHES)), ("decode", set(DECODINGS)), ("relevance", set(RELEVANCES))):
        options = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert options - tried <= {"siglip_text"}, "which needs a checkpoint of SigLIP's text tower"


def first_logits(model: Lavida, batch: int, budget: int, engine: str = "eager") -> torch.Tensor:
    """The logits [B, A, W] of an answer's first step, on the CPU."""
    found: list[torch.Tensor] = []
    denoise = model_module.denoise

    def watched(logits_of: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def step(*inputs: Any) -> Any:
            logits = logits_of(*inputs)
            found.append(values_of(logits).clone())
            return logits

        return denoise(step, *args, **options)

    with patch.object(model_module, "denoise", watched):
        prefix = encode(model, ALL["norm_topk"].build(budget=budget), batch, None, shared=False)
        model.generate(prefix, DecodeConfig(max_new_tokens=A, engine=engine))
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_values_are_those_of_the_cpu(family: str, batch: int) -> None:
    """Replayed graphs included, which read fixed addresses alone: the second prompt is a replay."""
    on_cpu = model_of(family, dtype=torch.float32, device="cpu")
    expected = [first_logits(on_cpu, batch, budget) for budget in (40, 60)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    for engine in ("eager", "graph"):
        with machine():
            model = model_of(family, dtype=torch.float32)
            for budget, logits in zip((40, 60), expected, strict=True):
                found = first_logits(model, batch, budget, engine)
                # The prompt fills Dream's first slot; a GPU computes all slots nevertheless.
                torch.testing.assert_close(found[:, -logits.shape[1] :], logits, rtol=0, atol=1e-4)
            model.release_engines()


X = noise(4, WORDS)
MANY = torch.zeros(SMALL // 4 + 1)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x.argmax()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[1, 0]],
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave((x[0] > 0).long()),
        lambda x: x[0].softmax(-1).multinomial(1),
        lambda x: torch.tensor([1.0], device=CUDA),
        lambda x: torch.ones(2).to(CUDA),
        lambda x: MANY.to(CUDA, non_blocking=True),
        lambda x: x[0, :2].copy_(torch.ones(2)),
    ],
)
def test_a_wait_is_seen(wait: Callable[[Any], Any]) -> None:
    with pretend() as recorder:
        x = X.pin_memory().to(CUDA, non_blocking=True)
        assert recorder.n_waits == 0
        wait(x)
        assert recorder.n_waits == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[torch.arange(2, device=CUDA)],
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: x.masked_scatter(x > 0, x),
        lambda x: torch.full((), 5, device=CUDA),
        lambda x: torch.ones(2).to(CUDA, non_blocking=True),
        lambda x: MANY.pin_memory().to(CUDA, non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.sort(stable=True),
    ],
)
def test_work_that_does_not_wait(work: Callable[[Any], Any]) -> None:
    with pretend() as recorder:
        work(X.pin_memory().to(CUDA, non_blocking=True))
        assert recorder.n_waits == 0 == sum(recorder.mixed.values())


def test_what_else_is_seen() -> None:
    with pretend(WORDS) as recorder:
        x = X.pin_memory().to(CUDA, non_blocking=True)
        recorder.reset()
        x[0].view(-1)[1:]
        assert recorder.n_launches == 0, "views"
        (x + 1).mul_(2)
        assert recorder.launched == {"add": 1, "mul_": 1} and recorder.widest == X.numel()
        assert recorder.n_launches == 2 and not recorder.float64
        x.double()
        assert sum(recorder.float64.values()) == 1
        with torch.no_grad():
            x + X
        assert sum(recorder.mixed.values()) == 1
        LmEmbed()._mean_word(x)
        assert any("lavida_adapter/relevance.py" in line for _, line in recorder.wide), "the line of ours is named"


def test_a_graph_reads_fixed_addresses() -> None:
    with pretend() as recorder:
        x, graph = torch.ones(2, device=CUDA), Graph()
        with capture(graph):
            y = (2 * x).sum()
            y.item()
        assert sum(recorder.captured_waits.values()) == 1 and recorder.n_waits == 0
        x.fill_(5)
        recorder.reset()
        graph.replay()
        assert recorder.n_launches == 1 and values_of(y) == 20
