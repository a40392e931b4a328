"""How long choosing takes: every selector of conf/selector, beside a naive twin of SHIRG-980 and the vision tower."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import build
from experiments.bench import reference
from experiments.bench.common import Encoded, Timing, aligned, encode_noise, random_tower, time_call
from experiments.schema import CONF, VERSION_BASE
from lavida_adapter import LavidaConfig
from shirg import Geometry, Selector, UserError, VisionFeatures

OWN: Geometry = "lavida_tiles"


@dataclass(frozen=True)
class SelectorRow:
    """One selector at one batch size."""

    selector: str
    geometry: Geometry
    batch: int
    tokens: tuple[int, int]
    """Source tokens and selected tokens of one picture."""
    timing: Timing


@dataclass(frozen=True)
class SelectorBench:
    """Everything that one run measured."""

    rows: list[SelectorRow]
    naive: Timing
    encode: Mapping[Geometry, Timing]
    """The tower over the views of one picture, on each geometry."""
    width: int

    def report(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "naive": self.naive.report(),
            "encode": {geometry: timing.report() for geometry, timing in self.encode.items()},
            "selectors": [
                {
                    "selector": row.selector,
                    "geometry": row.geometry,
                    "batch": row.batch,
                    "tokens": list(row.tokens),
                    **row.timing.report(),
                    **self.relative(row.geometry, row.batch, row.timing),
                }
                for row in self.rows
            ],
        }

    def relative(self, geometry: Geometry, batch: int, timing: Timing) -> dict[str, float]:
        """By picture: against the naive twin, and as a share of what the tower takes on the same geometry.

        Against the tower's shortest run, because few fit in: one that was disturbed must not make choosing look cheap.
        """
        ms = timing.median / batch
        return {
            "ms_per_picture": ms,
            "times_faster_than_naive": self.naive.median / ms,
            "share_of_encode": ms / self.encode[geometry].least,
        }

    def lines(self) -> list[str]:
        head = ("", "tokens", "batch", "ms", "min", "cpu ms", "ms/picture", "x naive", "% encode")
        body = [self._line("naive shirg", OWN, "", 1, self.naive)]
        body += [self._line(f"encode, {geometry}", geometry, "", 1, t) for geometry, t in self.encode.items()]
        for row in self.rows:
            tokens = f"{row.tokens[0]} > {row.tokens[1]}"
            body.append(self._line(row.selector, row.geometry, tokens, row.batch, row.timing))
        return aligned([head, *body])

    def _line(self, name: str, geometry: Geometry, tokens: str, batch: int, timing: Timing) -> tuple[str, ...]:
        relative = self.relative(geometry, batch, timing)
        return (
            name,
            tokens,
            str(batch),
            f"{timing.median:.2f}",
            f"{timing.least:.2f}",
            f"{statistics.median(timing.cpu_ms):.2f}" if timing.cpu_ms else "-",
            f"{relative['ms_per_picture']:.2f}",
            f"{relative['times_faster_than_naive']:.1f}",
            f"{100 * relative['share_of_encode']:.3f}",
        )


def everything() -> list[str]:
    """Every option of the group `selector`, and again with scope=global where its own scope is a view."""
    files = sorted((CONF / "selector").glob("*.yaml"))
    scoped = [path.stem for path in files if OmegaConf.select(OmegaConf.load(path), "scope") == "per_view"]
    return [path.stem for path in files] + [f"{name} scope=global" for name in scoped]


def build_selectors(wanted: Sequence[str], budgets: Mapping[str, int]) -> dict[str, Selector]:
    """Selectors as eval builds them: "saint", or "saint scope=global rho=0.1" with knobs of its own."""
    options = sorted(path.stem for path in (CONF / "selector").glob("*.yaml"))
    selectors = {}
    for entry in wanted:
        name, *knobs = entry.split()
        if name not in options:
            raise UserError(f"selector={name}: there is no such option; choose from {', '.join(options)}")
        with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            cfg = compose("eval", overrides=[f"selector={name}", *(f"selector.{knob}" for knob in knobs)])
        selectors[entry] = build.build_selector(cfg, budgets).eval()
    return selectors


def run(
    *, device: torch.device, dtype: str, batch: Sequence[int], repeats: int, only: Sequence[str] | None = None
) -> SelectorBench:
    return bench(LavidaConfig(), only or everything(), device, getattr(torch, dtype), batch, repeats)


@torch.inference_mode()
def bench(
    config: LavidaConfig,
    wanted: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    repeats: int,
) -> SelectorBench:
    """Times the selectors named, each on its own geometry."""
    selectors = {name: selector.to(device) for name, selector in build_selectors(wanted, config.budgets).items()}
    tower = random_tower(config, device, dtype)
    few = 2 if device.type == "cpu" else repeats
    encoded: dict[Geometry, Encoded] = {}
    tower_ms: dict[Geometry, Timing] = {}
    for geometry in dict.fromkeys([OWN, *(selector.geometry for selector in selectors.values())]):
        needs = frozenset().union(*(s.needs for s in selectors.values() if s.geometry == geometry))
        # Recording is the warm-up: it runs the same layers.
        encoded[geometry] = encode_noise(config, tower, geometry, needs)
        tower_ms[geometry] = time_call(encoded[geometry].encode, device, repeats=few, warm_up=0)
    one = _on_cpu(encoded[OWN].features(1))
    budget, coarse = config.budgets["base"], min(8, config.pooled_side)
    twin = time_call(lambda: reference.naive_shirg980(one, 0, budget, coarse), torch.device("cpu"), repeats=repeats)
    rows = []
    for size in batches:
        features = {geometry: picture.features(size) for geometry, picture in encoded.items()}
        for name, selector in selectors.items():
            rows.append(time_selector(name, selector, features[selector.geometry], config.lm.d_model, device, repeats))
    return SelectorBench(rows, twin, tower_ms, config.vision.hidden_size)


def time_selector(
    name: str, selector: Selector, features: VisionFeatures, width: int, device: torch.device, repeats: int
) -> SelectorRow:
    if selector.stage == "post":
        projected = torch.randn(*features.tokens_BND.shape[:2], width, device=device, dtype=features.tokens_BND.dtype)
        features = replace(features, tokens_BND=projected)
    timing = time_call(lambda: selector(features), device, repeats=repeats)
    tokens = (features.layout.n_tokens, selector(features).tokens_BTD.shape[1])
    return SelectorRow(name, selector.geometry, len(features.ids), tokens, timing)


def _on_cpu(features: VisionFeatures) -> VisionFeatures:
    assert features.relevance_BN is not None
    return replace(
        features,
        layout=features.layout.to("cpu"),
        tokens_BND=features.tokens_BND.cpu(),
        valid_BN=features.valid_BN.cpu(),
        relevance_BN=features.relevance_BN.cpu(),
    )
