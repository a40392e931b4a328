"""Mixtures: exact shares, the same sample at the same place, every part in its own epochs."""

from collections import Counter

import pytest
from omegaconf import OmegaConf

from experiments import build
from experiments.data.loader import ROUND, Mixture
from experiments.data.synthetic.glyphs import SynthGlyphs
from tests.experiments.test_configs import composed


def part(n: int, seed: int = 0) -> SynthGlyphs:
    return SynthGlyphs(split="train", n=n, density="train", qa_per_image=3, seed=seed)


def mixture(weights: dict[str, float], seed: int = 0) -> Mixture:
    return Mixture(parts={name: part(30) for name in weights}, weights=weights, seed=seed)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"a": 1, "b": 3}, {"a": 2500, "b": 7500}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 3334, "b": 3333, "c": 3333}),
        ({"a": 0.2}, {"a": ROUND}),
        ({"a": 558_000, "b": 1}, {"a": 10_000}),
    ],
)
def test_every_round_has_the_shares(weights: dict[str, float], counts: dict[str, int]) -> None:
    mixed = mixture(weights)
    for number in (0, 3):
        found = [mixed.origin(place)[0] for place in range(number * ROUND, (number + 1) * ROUND)]
        assert Counter(found) == counts
        assert len(counts) == 1 or len(set(found[:50])) > 1, "shares must be spread over the round"


def test_parts_go_through_their_own_epochs() -> None:
    """Across the border of a round no place of a part is taken twice or left out."""
    mixed = mixture({"a": 1, "b": 3})
    places: dict[str, list[int]] = {"a": [], "b": []}
    for place in range(ROUND - 400, ROUND + 400):
        name, own = mixed.origin(place)
        places[name].append(own)
    for found in places.values():
        assert found == list(range(found[0], found[0] + len(found)))


def test_a_place_has_one_sample_wherever_one_starts() -> None:
    first, second = mixture({"a": 1, "b": 2}), mixture({"a": 1, "b": 2})
    later = [second(place).id for place in range(ROUND + 5, ROUND + 25)]
    assert [first(place).id for place in range(ROUND + 25)][-20:] == later
    other = mixture({"a": 1, "b": 2}, seed=1)
    assert [other.origin(p)[0] for p in range(50)] != [first.origin(p)[0] for p in range(50)]


def test_a_part_without_weight_need_not_exist() -> None:
    cfg = composed("train", "data=mixture", "data.weights.own=0", "data.parts.own.root=nowhere")
    parts = build.build_parts(cfg)
    assert list(parts) == ["glyphs"]
    assert build.build_stream(cfg, parts)(0).dataset == "synth_glyphs"
    with pytest.raises(ValueError, match="a mixture is for training; evaluate its parts one by one"):
        build.build_dataset(cfg)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"glyphs": 1}, "data.weights and data.parts must name the same datasets: own is in one of them alone"),
        ({"glyphs": 1, "own": -1}, "give numbers from 0 on, and one at least above 0"),
        ({"glyphs": 0, "own": 0}, "give numbers from 0 on, and one at least above 0"),
    ],
)
def test_impossible_weights(weights: dict[str, float], message: str) -> None:
    cfg = composed("train", "data=mixture", "data.parts.own.root=nowhere")
    cfg.data.weights = OmegaConf.create(weights)
    with pytest.raises(ValueError, match=message):
        build.build_parts(cfg)
