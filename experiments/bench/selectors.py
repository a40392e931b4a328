"""How long selection takes: every selector of conf/selector, beside a naive SHIRG-980 and the vision tower."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments import build
from experiments.bench import reference
from experiments.bench.common import (
    BenchResult,
    Columns,
    Encoded,
    encode_noise,
    random_tower,
    say,
    table_of,
    time_in_turns,
)
from experiments.profiling import Timing, time_call
from experiments.schema import CONF
from lavida_adapter import LavidaConfig
from shirg import Geometry, Selector, UserError, VisionFeatures

OWN: Geometry = "lavida_tiles"
COLUMNS: Columns = {
    "": ("selector", ""),
    "tokens": ("tokens", lambda tokens: " > ".join(map(str, tokens))),
    "batch": ("batch", "d"),
    "ms": ("ms", ".2f"),
    "min": ("ms_min", ".2f"),
    "IQR": ("ms_iqr", ".2f"),
    "cpu ms": ("cpu_ms", ".2f"),
    "ms/picture": ("ms_per_picture", ".2f"),
    "x naive": ("times_faster_than_naive", ".1f"),
    "of encode": ("share_of_encode", ".3%"),
}


def run(
    *, device: torch.device, dtype: str, batch: Sequence[int], repeats: int, only: Sequence[str] | None = None
) -> BenchResult:
    return measure(LavidaConfig(), only or everything(), device, getattr(torch, dtype), batch, repeats)


def everything() -> list[str]:
    """Every option of the group `selector`, and again with scope=global where its own scope is a view."""
    files = sorted((CONF / "selector").glob("*.yaml"))
    scoped = [path.stem for path in files if OmegaConf.select(OmegaConf.load(path), "scope") == "per_view"]
    return [path.stem for path in files] + [f"{name} scope=global" for name in scoped]


def build_selectors(wanted: Sequence[str], budgets: Mapping[str, int]) -> dict[str, Selector]:
    """Selectors as eval builds them: "saint", or "saint scope=global rho=0.1" with options of its own."""
    known = sorted(path.stem for path in (CONF / "selector").glob("*.yaml"))
    selectors = {}
    for entry in wanted:
        name, *options = entry.split()
        if name not in known:
            raise UserError(f"selector={name}: there is no such option; choose from {', '.join(known)}")
        cfg = build.compose_eval(f"selector={name}", *(f"selector.{option}" for option in options))
        selectors[entry] = build.build_selector(cfg, budgets).eval()
    return selectors


@torch.inference_mode()
def measure(
    config: LavidaConfig,
    wanted: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    repeats: int,
) -> BenchResult:
    """Times the selectors named in turns, each on its own geometry; the naive SHIRG-980 runs on the CPU."""
    selectors = {name: selector.to(device) for name, selector in build_selectors(wanted, config.budgets).items()}
    tower = random_tower(config, device, dtype)
    few = 2 if device.type == "cpu" else repeats
    encoded: dict[Geometry, Encoded] = {}
    tower_ms: dict[Geometry, Timing] = {}
    for geometry in dict.fromkeys([OWN, *(selector.geometry for selector in selectors.values())]):
        needs = frozenset().union(*(s.needs for s in selectors.values() if s.geometry == geometry))
        say(f"tower, {geometry}")
        # Recording is the warm-up: it runs the same layers.
        encoded[geometry] = encode_noise(config, tower, geometry, needs)
        tower_ms[geometry] = time_call(encoded[geometry].encode, device, repeats=few, warm_up=0)
    one = _on_cpu(encoded[OWN].features(1))
    budget, coarse = config.budgets["base"], min(8, config.pooled_side)
    naive = time_call(lambda: reference.naive_shirg980(one, 0, budget, coarse), torch.device("cpu"), repeats=repeats)

    def timed(name: str, geometry: Geometry, batch: int, timing: Timing, **more: Any) -> dict[str, Any]:
        """A row; the share of encode is taken of the tower's shortest run, because few runs fit in."""
        ms = timing.median / batch
        return {
            "selector": name,
            "geometry": geometry,
            "batch": batch,
            **more,
            **timing.report(),
            "ms_per_picture": ms,
            "times_faster_than_naive": naive.median / ms,
            "share_of_encode": ms / tower_ms[geometry].least,
        }

    measured = []
    for size in batches:
        features = {geometry: picture.features(size) for geometry, picture in encoded.items()}
        calls = {
            name: partial(selector, features_for(selector, features[selector.geometry], config.lm.d_model))
            for name, selector in selectors.items()
        }
        timings = time_in_turns(calls, device, repeats=repeats)
        for name, selector in selectors.items():
            tokens = features[selector.geometry].layout.n_tokens, calls[name]().tokens_BTD.shape[1]
            measured.append((name, size, timings[name], tokens))
    # The tower before and after what is compared with it; the least counts.
    for geometry, picture in encoded.items():
        again = time_call(picture.encode, device, repeats=few, warm_up=0)
        tower_ms[geometry] = min(tower_ms[geometry], again, key=lambda timing: timing.least)
    rows = [
        timed(name, selectors[name].geometry, size, timing, tokens=tokens) for name, size, timing, tokens in measured
    ]
    beside = [timed("naive shirg", OWN, 1, naive)]
    beside += [timed(f"encode, {geometry}", geometry, 1, timing) for geometry, timing in tower_ms.items()]
    report = {
        "width": config.vision.hidden_size,
        "naive": naive.report(),
        "encode": {geometry: timing.report() for geometry, timing in tower_ms.items()},
        "selectors": rows,
    }
    title = f"selectors on {device}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    return BenchResult(title, report, table_of([*beside, *rows], COLUMNS))


def features_for(selector: Selector, features: VisionFeatures, width: int) -> VisionFeatures:
    """The features, projected where the selector chooses behind the projector."""
    if selector.stage == "pre":
        return features
    tokens_BND = features.tokens_BND
    projected = torch.randn(*tokens_BND.shape[:2], width, device=tokens_BND.device, dtype=tokens_BND.dtype)
    return replace(features, tokens_BND=projected)


def _on_cpu(features: VisionFeatures) -> VisionFeatures:
    assert features.relevance_BN is not None
    return replace(
        features,
        layout=features.layout.to("cpu"),
        tokens_BND=features.tokens_BND.cpu(),
        valid_BN=features.valid_BN.cpu(),
        relevance_BN=features.relevance_BN.cpu(),
    )
