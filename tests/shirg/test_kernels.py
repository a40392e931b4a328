"""The kernel against the same in torch: in Triton's interpreter everywhere, on the device where there is one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from shirg import ShirgSelector, VisionFeatures
from shirg.dedup import assign_cells
from shirg.kernels import usable
from shirg.kernels.score import relevance_and_neighbours
from shirg.scoring import CLAMP, EPS
from tests.features import geometry_layout, make_features

ROOT = Path(__file__).resolve().parents[2]


def awkward() -> Iterator[tuple[VisionFeatures, dict[str, Any]]]:
    """Padding, zero and equal tokens, widths that are no powers of two, other canvases; and options for each."""
    features = make_features((1, 2), side=2, sizes=[(800, 400), (500, 375)], width=11)
    assert bool(features.valid_BN[0].all()) and not bool(features.valid_BN[1].all())
    features.tokens_BND[0, 4] = 0
    features.tokens_BND[0, 5:7] = 0.3
    yield features, {}
    yield replace(features, tokens_BND=features.tokens_BND.bfloat16())[1:], {"mask_padding": False}
    opposite = {"neighbour": {"sign": 1, "metric": "feature_cos"}}
    yield make_features((0, 0), side=3, sizes=[(100, 300)], width=3), opposite
    # With overlapping crops, cells are assigned other tokens in each picture.
    crops = make_features(layout=geometry_layout("seed_canvas48", side=2), sizes=[(640, 480), (300, 900)], width=5)
    yield crops, {"norm": "none", "weights": {"similarity": 0}}
    overflow = features.tokens_BND.clone()
    overflow[0, 9] = 1e30
    yield replace(features, tokens_BND=overflow)[:1], {}


def compare(features: VisionFeatures, **options: Any) -> None:
    """The kernel's scores against those of a selector that has no other terms."""
    layout = features.layout
    selector = ShirgSelector(budget=4, geometry=layout.geometry, scaffold={"size": 0}, **options)
    usable_BN = features.valid_BN if selector.options.mask_padding else torch.ones_like(features.valid_BN)
    assigned = assign_cells(layout, usable_BN, features.relevance_BN, selector.options.dedup)
    with torch.no_grad():
        everywhere = (True,) * len(features.ids)
        expected = selector.terms.relevance_and_neighbours(features, features.tokens_BND, assigned, everywhere)
        found = relevance_and_neighbours(
            features.tokens_BND,
            assigned.token_BP,
            assigned.usable_BP,
            assigned.take(features.relevance_BN.float()),
            layout.n_global,
            layout.side,
            max(layout.canvas[1], 1),
            selector.options.weights.similarity,
            selector.options.neighbour.sign * selector.options.weights.neighbour,
            selector.options.neighbour.metric == "feature_cos",
            selector.options.norm == "zscore",
            EPS,
            CLAMP,
        )
    assert expected.isfinite().any() and torch.allclose(found, expected, atol=2e-5, equal_nan=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_equals_torch_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads the switch when it is imported."""
    code = (
        "from tests.shirg.test_kernels import awkward, compare\n"
        "for features, options in awkward(): compare(features, **options)\n"
        "print('equal')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, shirg, shirg.kernels.score; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_compilers_mark_is_what_torch_sets() -> None:
    def marked() -> bool:
        return True

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == {name: getattr(usable, name) for name in vars(marked)} != {}


def on_cuda(features: VisionFeatures) -> VisionFeatures:
    tensors = {f.name: getattr(features, f.name) for f in fields(features)}
    moved = {name: value.cuda() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return replace(features, layout=features.layout.to("cuda"), taps={}, **moved)


def full_size() -> VisionFeatures:
    return on_cuda(make_features((2, 2), side=27, sizes=[(768, 768), (640, 480)], width=1152))


@pytest.mark.gpu
def test_equals_torch_on_the_device() -> None:
    for features, options in awkward():
        compare(on_cuda(features), **options)
    features = full_size()
    for _ in range(20):  # which program comes last differs from run to run
        compare(features)


@pytest.mark.gpu
def test_the_whole_selector_runs_as_one_cuda_graph() -> None:
    features = full_size()
    selector = ShirgSelector(budget=980).cuda()
    other = replace(features, tokens_BND=features.tokens_BND.flip(1).contiguous())
    with torch.inference_mode():
        expected = selector(other)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                selector(features)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = selector(features)
        features.tokens_BND.copy_(other.tokens_BND)
        graph.replay()
    assert torch.equal(captured.index_BT, expected.index_BT)
    assert torch.equal(captured.tokens_BTD, expected.tokens_BTD)


@pytest.mark.gpu
def test_the_kernel_is_part_of_the_compiled_graph() -> None:
    features, selector = full_size(), ShirgSelector(budget=980).cuda()
    torch.compiler.reset()
    compiled = torch.compile(selector, fullgraph=True, dynamic=False)(features)
    eager = selector(features)
    assert float((compiled.index_BT == eager.index_BT).float().mean()) > 0.99
