"""What an interval and a test promise, kept over 2,000 simulated studies each."""

import numpy as np
import pytest

from experiments.analysis.stats import cluster_bootstrap, estimate, holm, over_seeds, sign_test, totals

STUDIES = 2000
COVERS = pytest.approx(0.95, abs=0.02)


def difficulty(generator: np.random.Generator, mean: float, spread: float, size: tuple[int, ...]) -> np.ndarray:
    """Chances of a right answer, from picture to picture: a beta distribution."""
    scale = (1 - spread) / spread
    return generator.beta(mean * scale, (1 - mean) * scale, size=size)


def test_an_interval_over_pictures_covers_the_truth() -> None:
    generator, pictures, questions, mean = np.random.default_rng(7), 60, 3, 0.7
    clusters = np.repeat(np.arange(pictures), questions).tolist()
    chance = difficulty(generator, mean, 0.3, (STUDIES, pictures, 1))
    scores = (generator.random((STUDIES, pictures, questions)) < chance).astype(float).reshape(STUDIES, -1)
    found = [cluster_bootstrap(study, clusters) for study in scores]
    assert np.mean([low <= mean <= high for low, high in found]) == COVERS


def test_an_interval_of_unrelated_samples_covers_the_truth() -> None:
    right = np.random.default_rng(8).binomial(200, 0.7, size=STUDIES)
    found = {k: estimate([1.0] * k + [0.0] * (200 - k)) for k in set(right.tolist())}
    assert np.mean([found[k].low <= 0.7 <= found[k].high for k in right.tolist()]) == COVERS


def two_systems(generator: np.random.Generator, gain: float, pictures: int, questions: int) -> np.ndarray:
    """Differences [study, answer] of two systems whose answers agree more often than chance; truth: the gain."""
    chance = difficulty(generator, 0.5, 0.25, (STUDIES, pictures, 1))
    first = generator.random((STUDIES, pictures, questions))
    second = np.where(generator.random(first.shape) < 0.6, first, generator.random(first.shape))
    better = chance + gain * (1 - chance) / 0.5
    difference = (second < better).astype(float) - (first < chance)
    return difference.reshape(STUDIES, -1)


def test_a_paired_interval_covers_the_truth() -> None:
    clusters = np.repeat(np.arange(80), 2).tolist()
    differences = two_systems(np.random.default_rng(9), 0.08, 80, 2)
    found = [cluster_bootstrap(study, clusters) for study in differences]
    assert np.mean([low <= 0.08 <= high for low, high in found]) == COVERS


@pytest.mark.parametrize("questions", [1, 3])
def test_two_equal_systems_are_rarely_called_different(questions: int) -> None:
    differences = two_systems(np.random.default_rng(10), 0.0, 80, questions)
    clusters = np.repeat(np.arange(80), questions).tolist()
    p = [sign_test(totals(study, clusters)[0]) for study in differences]
    rate = np.mean(np.asarray(p) < 0.05)
    assert 0.01 < rate <= 0.06
    # Five systems at a time, none better: Holm holds the chance of any false alarm.
    families = np.asarray([holm(p[i : i + 5]) for i in range(0, STUDIES, 5)])
    assert np.mean((families < 0.05).any(axis=1)) <= 0.06


@pytest.mark.parametrize(("seeds", "between"), [(3, 0.4), (5, 0.2)])
def test_an_interval_over_seeds_covers_the_truth(seeds: int, between: float) -> None:
    """Log-odds of a right answer: a training's own part, a picture's own part. Differences: two such systems, equal."""
    generator = np.random.default_rng(11)

    def chance(*shape: int) -> np.ndarray:
        training = between * generator.normal(size=(shape[0], shape[1], 1, 1))
        return 1 / (1 + np.exp(-(0.5 + training + picture)))

    picture = generator.normal(size=(1_000_000, 1, 1, 1))
    truth = float(chance(1_000_000, 1).mean())
    picture = generator.normal(size=(STUDIES, 1, 60, 1))
    ours, theirs = (
        (generator.random((STUDIES, seeds, 60, 2)) < chance(STUDIES, seeds)).reshape(STUDIES, seeds, -1).astype(float)
        for _ in range(2)
    )
    clusters = np.repeat(np.arange(60), 2).tolist()
    found = [over_seeds(study, clusters, 0.0) for study in ours]
    assert np.mean([one.low <= truth <= one.high for one in found]) == COVERS
    p = [over_seeds(study, clusters).p for study in ours - theirs]
    assert np.mean(np.asarray(p) < 0.05) <= 0.06
