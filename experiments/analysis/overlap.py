"""How much of what two systems keep is the same: Jaccard's index of their kept tokens, picture by picture.

docs/report.md, "Statistics of what is kept". It is computed from the tokens that samples.parquet names, without a
model. Two systems are compared only where the same number means the same token.

Shape letters: N samples, T source tokens, W bytes, C kinds of counts, K pictures, S pairs of seeds.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache, partial
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import gammaln, stdtrit

from experiments.analysis.rows import Row
from experiments.analysis.stats import over_seeds, totals, wilson
from experiments.analysis.systems import Result, RunGroup, base_config, without_seed
from experiments.jobs.results import SAMPLES
from experiments.jobs.sample_rows import picture_column

PREFIX = "overlap "
"""Columns of the table: `overlap JOB KEY` is a row's overlap with the row of that job."""
MOST_COMPARED = 64
"""Systems of a kind that are compared with each other, the first in the order of the table: pairs are a square."""
_MOST_BYTES = 2**29
"""Memory of what they keep, all together; with many samples fewer systems are compared."""
_SAMPLE_BYTES = 2**9
"""Of one sample: a bit for each of up to 3645 source tokens, and its id."""
_BATCH = 4096
"""Samples that are read at a time."""
_ANY_METRIC = frozenset({"metrics", "limit"})
"""Options of a dataset that change neither a picture nor what is kept of it."""


@dataclass(frozen=True)
class Overlap:
    """The mean of Jaccard's index over the samples in which both systems keep source tokens, and over seeds."""

    mean: float
    low: float | None
    """The 95 % interval: Student's t over pictures, or with seeds for a new seed and a new picture. None for a single
    picture."""
    high: float | None
    n: int
    """Samples of one seed."""
    chance: float | None
    """What two independent random selections of the same sizes have; None for studies that do not know how many tokens
    there are."""


@dataclass(frozen=True)
class KeptTokens:
    """What one job kept, sample by sample."""

    bits_NW: np.ndarray
    """uint8: one bit for each source token, eight to a byte; synthesised tokens have none."""
    n_valid_N: np.ndarray
    """int64: how many source tokens there were to choose from; 0 where the record does not say."""
    ids: tuple[str, ...]
    pictures: tuple[str, ...]

    @cached_property
    def sizes_N(self) -> np.ndarray:
        return _count_bits(self.bits_NW)

    def take(self, ids: tuple[str, ...]) -> "KeptTokens":
        """The samples of these ids, in their order."""
        if ids == self.ids:
            return self
        place = {name: i for i, name in enumerate(self.ids)}
        rows = [place[name] for name in ids]
        return KeptTokens(self.bits_NW[rows], self.n_valid_N[rows], ids, tuple(self.pictures[i] for i in rows))


ReadKept = Callable[[RunGroup], Mapping[str, KeptTokens]]
"""Reads what a system keeps, by seed."""


def read_kept(path: Path) -> KeptTokens:
    """What samples.parquet says about the kept tokens."""
    there = pq.read_schema(path).names
    picture = picture_column(path)
    table = pq.read_table(path, columns=[name for name in ("id", picture, "n_valid") if name in there])
    ids = table["id"].to_pylist()
    valid = table["n_valid"].to_pylist() if "n_valid" in there else [None] * len(ids)
    parts = [_bits(batch["kept"]) for batch in pq.ParquetFile(path).iter_batches(_BATCH, columns=["kept"])]
    width = max(part.shape[1] for part in parts)
    return KeptTokens(
        bits_NW=np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]),
        n_valid_N=np.asarray([n or 0 for n in valid], dtype=np.int64),
        ids=tuple(ids),
        pictures=tuple(table[picture].to_pylist()),
    )


def _bits(kept: pa.ListArray) -> np.ndarray:
    """Bits of token lists [N, W], as wide as the largest token needs."""
    tokens = kept.flatten().to_numpy(zero_copy_only=False)
    kept_NT = np.zeros((len(kept), 1 + int(tokens.max(initial=0))), dtype=bool)
    kept_NT[np.repeat(np.arange(len(kept)), kept.value_lengths().to_numpy(zero_copy_only=False)), tokens] = True
    return np.packbits(kept_NT, axis=1)


def overlap_all(systems: Sequence[RunGroup], rows: Sequence[Row]) -> None:
    """Adds to each row its overlap with every other system that it can be compared with, of the first ones of a kind.

    Args:
        systems, rows: in the order of the table.
    """
    kinds: dict[str, list[tuple[RunGroup, Row]]] = {}
    for system, row in zip(systems, rows, strict=True):
        if system.finished:
            kinds.setdefault(token_frame(system.result), []).append((system, row))
    for members in kinds.values():
        read = cache(_read_seeds)
        for (ours, row), (theirs, column) in combinations(members[: _most_compared(members)], 2):
            compute = partial(_overlap_row, read, ours, theirs)
            values = ours.memo.get("overlap", [ours.stamps, theirs.stamps], compute)
            if values is not None:
                row |= {f"{PREFIX}{column['job']} {key}": value for key, value in values.items()}
                column |= {f"{PREFIX}{row['job']} {key}": value for key, value in values.items()}


def _most_compared(members: Sequence[tuple[RunGroup, Row]]) -> int:
    """How many of the systems are compared with each other."""
    n_samples = max(sum(result["data"]["n"] for result in system.results) for system, _ in members)
    return min(len(members), MOST_COMPARED, max(2, _MOST_BYTES // (_SAMPLE_BYTES * n_samples)))


def _read_seeds(system: RunGroup) -> dict[str, KeptTokens]:
    return {s: read_kept(folder / SAMPLES) for s, folder in zip(system.seeds, system.folders, strict=False)}


def _overlap_row(read: ReadKept, ours: RunGroup, theirs: RunGroup) -> dict[str, float | None] | None:
    found = overlap(read(ours), read(theirs))
    return None if found is None else asdict(found)


def token_frame(result: Result) -> str:
    """What two systems must share, so that equal numbers mean equal tokens of equal pictures under one adapter setting.

    These are the model, the data, how pictures are cut into tokens, and whether there is an adapter. Adapters that were
    trained for their own selectors are one setting.
    """
    config = base_config(result)
    data = {key: value for key, value in config["data"].items() if key not in _ANY_METRIC}
    # Records from before the geometry was stored have it among the options of those selectors that know several.
    cut = result["selector"].get("geometry") or config["selector"].get("geometry", "lavida_tiles")
    name, adapter = result["choices"]["selector"], without_seed(str(config["adapter"]))
    adapter = re.sub(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9_])", "*", adapter)
    shared = [config["model"], result["data"]["name"], data, cut, adapter, config.get("shuffle_questions", False)]
    return json.dumps(shared, sort_keys=True, default=str)


def overlap(ours: Mapping[str, KeptTokens], theirs: Mapping[str, KeptTokens]) -> Overlap | None:
    """The overlap of two systems, each given by seed.

    Seeds are paired where both have them; a system with one seed only is compared with every seed of the other.

    Returns:
        None where no sample has source tokens in both.
    """
    if 1 in (len(ours), len(theirs)):
        pairs = [(a, b) for a in ours.values() for b in theirs.values()]
    else:
        pairs = [(kept, theirs[seed]) for seed, kept in ours.items() if seed in theirs]
    found = [part for a, b in pairs if len((part := _by_sample(a, b)).ids)]
    if not found:
        return None
    low, high = _interval(found)
    return Overlap(
        mean=fmean(float(part.jaccard_N.mean()) for part in found),
        low=low,
        high=high,
        n=round(fmean(len(part.ids) for part in found)),
        chance=_chance(np.concatenate([part.counts_N3 for part in found])),
    )


@dataclass(frozen=True)
class _Pair:
    """Two jobs on the samples in which both keep source tokens."""

    ids: tuple[str, ...]
    pictures: tuple[str, ...]
    jaccard_N: np.ndarray
    counts_N3: np.ndarray
    """int64: valid tokens, and how many of them each job keeps."""


def _by_sample(ours: KeptTokens, theirs: KeptTokens) -> _Pair:
    known = set(theirs.ids)
    ids = tuple(name for name in ours.ids if name in known)
    ours, theirs = ours.take(ids), theirs.take(ids)
    width = min(ours.bits_NW.shape[1], theirs.bits_NW.shape[1])
    both_N = _count_bits(ours.bits_NW[:, :width] & theirs.bits_NW[:, :width])
    a_N, b_N = ours.sizes_N, theirs.sizes_N
    here = np.flatnonzero((a_N > 0) & (b_N > 0))
    return _Pair(
        ids=tuple(ids[i] for i in here),
        pictures=tuple(ours.pictures[i] for i in here),
        jaccard_N=both_N[here] / (a_N + b_N - both_N)[here],
        counts_N3=np.stack([np.minimum(ours.n_valid_N, theirs.n_valid_N), a_N, b_N], axis=1)[here],
    )


def _count_bits(bits_NW: np.ndarray) -> np.ndarray:
    counts_N: np.ndarray = np.bitwise_count(bits_NW).sum(axis=1, dtype=np.int64)
    return counts_N


def _interval(parts: Sequence[_Pair]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean over seeds and pictures, within [0, 1]."""
    if len(parts) == 1:
        return _students(parts[0].jaccard_N, parts[0].pictures)
    values = [dict(zip(part.ids, part.jaccard_N, strict=True)) for part in parts]
    pictures = dict(zip(parts[0].ids, parts[0].pictures, strict=True))
    ids = [name for name in pictures if all(name in value for value in values)]
    if len({pictures[name] for name in ids}) < 2:
        return None, None
    table_SN = np.asarray([[value[name] for name in ids] for value in values])
    found = over_seeds(table_SN, [pictures[name] for name in ids], lowest=0.0)
    return found.low, found.high


def _students(jaccard_N: np.ndarray, pictures: Sequence[str]) -> tuple[float | None, float | None]:
    """Student's t over pictures; where nothing varies as wide as Wilson's interval for an event never seen."""
    mean, (sums_K, sizes_K) = float(jaccard_N.mean()), totals(jaccard_N, pictures)
    n_pictures = len(sizes_K)
    if n_pictures < 2:
        return None, None
    if bool((jaccard_N == jaccard_N[0]).all()):
        half = wilson(0, n_pictures)[1]
    else:
        # Pictures with more questions weigh more.
        away_K = (sums_K - mean * sizes_K) / sizes_K.mean()
        error = math.sqrt(float(away_K @ away_K) / (n_pictures - 1) / n_pictures)
        half = float(stdtrit(n_pictures - 1, 0.975)) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def _chance(counts_N3: np.ndarray) -> float | None:
    """The mean over samples of `chance_jaccard`; None where a record does not say how many tokens there were."""
    kinds_C3, times_C = np.unique(counts_N3, axis=0, return_counts=True)
    if not (kinds_C3[:, 0] > 0).all():
        return None
    chance_C = [chance_jaccard(*map(int, kind)) for kind in kinds_C3]
    return float(np.average(chance_C, weights=times_C))


@lru_cache(maxsize=100_000)
def chance_jaccard(n: int, a: int, b: int) -> float:
    """The expected Jaccard index of two independent random sets of `a` and `b` out of `n` tokens, at least one each.

    The number of tokens in both, x, has a hypergeometric distribution; this is the mean of x / (a + b - x).
    """
    x = np.arange(max(0, a + b - n), min(a, b) + 1)
    log_p = _log_choose(a, x) + _log_choose(n - a, b - x) - _log_choose(n, np.asarray(b))
    return float(np.exp(log_p) @ (x / (a + b - x)))


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    log: np.ndarray = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return log
