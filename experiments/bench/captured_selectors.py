"""Selectors and SHIRG's kernel on a GPU: one by one and as CUDA graphs; parts of `experiments.bench.true_size`.

A selector is a hundred small kernels. One by one they measure how fast Python launches; replayed as a CUDA graph they
measure the method.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from baselines import (
    CDPruner,
    DivPrune,
    Full,
    HiPrune,
    HoloV,
    LlavaScissor,
    OTPrune,
    Pooled,
    Saint,
    ToMe,
    TopV,
    UniformGrid,
    VisionZip,
    VisPruner,
)
from experiments.bench.recorder import Bench, time_ms
from lavida_adapter.encode import PictureGroup, run_tower
from shirg import Selector, ShirgSelector, VisionFeatures
from shirg.dedup import assign_cells
from shirg.kernels.score import relevance_and_neighbours
from shirg.scoring import CLAMP, EPS

PRUNERS: tuple[type[Selector], ...] = (
    ShirgSelector,
    Saint,
    TopV,
    DivPrune,
    VisionZip,
    VisPruner,
    CDPruner,
    ToMe,
    HiPrune,
    HoloV,
    LlavaScissor,
    OTPrune,
    UniformGrid,
)
"""Selectors with a budget, with the options of their YAML; all at the base budget."""
REPLAYS = 10


def selectors_of(bench: Bench) -> dict[str, Selector]:
    made: dict[str, Callable[[], Selector]] = {"Pooled": Pooled, "Full": Full}
    budget = bench.model.config.budgets["base"]
    made |= {kind.__name__: partial(kind, budget=budget) for kind in PRUNERS}
    return {name: make().to(bench.device).eval() for name, make in made.items()}


def features_of(bench: Bench, selector: Selector, batch: int) -> VisionFeatures:
    """What the tower gives the selector for `batch` pictures; the relevance is noise."""
    model = bench.model
    encoded = run_tower(model, list(bench.views[:batch]), selector.needs - {"encoder", "pixels"})
    group = PictureGroup(encoded, list(range(batch)), model.model.mm_projector)
    features = group.features(tuple(map(str, range(batch))), pixels="pixels" in selector.needs)
    generator = torch.Generator(bench.device).manual_seed(0)
    noise = torch.randn(batch, features.layout.n_tokens, device=bench.device, generator=generator)
    taps = dict(features.taps) | ({"encoder": features.tokens_BND} if "encoder" in selector.needs else {})
    tokens = group.projected() if selector.stage == "post" else features.tokens_BND
    return replace(features, tokens_BND=tokens, relevance_BN=noise, taps=taps)


def captured(call: Callable[[], Tensor]) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """A CUDA graph of a call, and the tensor that its replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def measure_selectors(bench: Bench) -> None:
    """Each selector kernel by kernel and as a graph, and whether both keep the same tokens."""
    for batch in bench.batches:
        for name, selector in selectors_of(bench).items():
            key = {"part": "selectors", "lm": bench.lm, "batch": batch, "name": name}
            found = bench.recorder.measure(key, partial(_time_selector, bench, selector, batch))
            if found is not None:
                bench.recorder.put(key, found)


def _time_selector(bench: Bench, selector: Selector, batch: int) -> dict[str, object]:
    features = features_of(bench, selector, batch)
    call = partial(_kept_index, selector, features)
    read = features.tokens_BND.numel() * features.tokens_BND.element_size()
    found: dict[str, object] = {"work": {"graph": [0.0, float(read)]}, "kept": call().shape[1]}
    return found | _both_ways(call, bench)


def _kept_index(selector: Selector, features: VisionFeatures) -> Tensor:
    return selector(features).index_BT


def _both_ways(call: Callable[[], Tensor], bench: Bench) -> dict[str, object]:
    """Milliseconds kernel by kernel and as a replayed graph, in turns; the graph's result must be the same."""
    expected = call()
    eager = [time_ms(call, bench.device) for _ in range(bench.rounds)]
    if bench.device.type != "cuda":
        return {"ms": {"eager": sorted(eager)[len(eager) // 2]}, "ms_all": {"eager": eager}, "n": bench.rounds}
    graph, result = captured(call)
    replayed = []
    for i in range(bench.rounds):
        eager[i] = time_ms(call, bench.device)
        replayed.append(time_ms(graph.replay, bench.device, REPLAYS))
    return {
        "ms": {"eager": sorted(eager)[len(eager) // 2], "graph": sorted(replayed)[len(replayed) // 2]},
        "ms_all": {"eager": eager, "graph": replayed},
        "n": bench.rounds,
        "same": bool(torch.equal(result, expected)),
        "largest_difference": float((result.float() - expected.float()).abs().max()),
    }


def measure_kernel(bench: Bench) -> None:
    """The score kernel of SHIRG and its twin in torch: how far apart, and how long each takes as a graph."""
    if bench.device.type != "cuda":
        bench.recorder.put({"part": "kernel", "lm": bench.lm}, {"skipped": "needs CUDA"})
        return
    for batch in bench.batches:
        key = {"part": "kernel", "lm": bench.lm, "batch": batch}
        found = bench.recorder.measure(key, partial(_compare_kernel, bench, batch))
        for name, row in (found or {}).items():
            bench.recorder.put(key | {"name": name}, row)


def _compare_kernel(bench: Bench, batch: int) -> dict[str, dict[str, object]]:
    selector = ShirgSelector(budget=bench.model.config.budgets["base"]).to(bench.device)
    features = features_of(bench, selector, batch)
    assert features.relevance_BN is not None
    options, layout, states = selector.options, features.layout, features.tokens_BND
    assigned = assign_cells(layout, features.valid_BN, features.relevance_BN, options.dedup)
    relevance_BP = assigned.take(features.relevance_BN)

    def twin() -> Tensor:
        return selector.terms.relevance_and_neighbours(features, states, assigned, (True,) * batch)

    def kernel() -> Tensor:
        found: Tensor = relevance_and_neighbours(
            states,
            assigned.token_BP,
            assigned.usable_BP,
            relevance_BP,
            layout.n_global,
            layout.view_shape[1],
            layout.canvas[1],
            options.weights.similarity,
            options.neighbour.sign * options.weights.neighbour,
            options.neighbour.metric == "feature_cos",
            options.norm == "zscore",
            EPS,
            CLAMP,
        )
        return found

    read = float(states.numel() * states.element_size())
    apart = float((kernel() - twin()).abs().max())
    return {
        name: {**_both_ways(call, bench), "from_twin": apart, "work": {"graph": [0.0, read]}}
        for name, call in (("kernel", kernel), ("twin", twin))
    }
