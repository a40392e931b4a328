"""The records of a study: those that can be used, and a word about each that cannot.

A study may be shared by many processes and people. A record that is torn, foreign or of another version is left out; it
must not fail the jobs beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.analysis.memo import Memo, stamp
from experiments.analysis.rows import flatten
from experiments.analysis.systems import Result, base_config, data_digests, seed_of
from experiments.errors import ConfigError, leave_out
from experiments.jobs.results import RESULT, SAMPLES, read_result

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, pa.ArrowException)
"""What reading a record raises that is not what a job writes."""
_NUMBERS = (" mean", " low", " high", " n", " min", " max", " ms")


def read_study(study: Path, memo: Memo | None = None) -> dict[Path, Result]:
    """The usable records by folder. A record is that of the folder it is in, whatever folder it was written in.

    Args:
        memo: spares reading samples that were read before.
    """
    found: dict[Path, Result] = {}
    memo = memo or Memo()
    for path in sorted(study.glob(f"*/{RESULT}")):
        try:
            result = read_result(path.parent)
            if result is not None:
                found[path.parent] = _checked(path.parent, {**result, "job": path.parent.name}, memo)
        except _DAMAGED as error:
            known = isinstance(error, ConfigError)
            leave_out(path.parent, error if known else f"not the record of a job ({type(error).__name__}: {error})")
    return found


def _checked(folder: Path, result: Mapping[str, Any], memo: Memo) -> Result:
    """The record, after whatever the table reads from it has been read once.

    Raises:
        ValueError, KeyError, ...: one of `_DAMAGED`, where it is not what a job writes.
    """
    if result["verb"] != "eval":
        return result
    row = flatten(result)
    odd = [key for key, value in row.items() if key.endswith(_NUMBERS) and not isinstance(value, int | float | None)]
    if odd:
        raise TypeError(f"{odd[0]} is {row[odd[0]]!r}")
    seed_of(result), base_config(result), result["command"], result["config_hash"]
    if result["status"] == "ok":
        data_digests(folder, result)
        samples, score = folder / SAMPLES, f"score_{result['quality']['metric']}"
        memo.get("samples are whole", [stamp(samples), score], lambda: _check_samples(samples, score))
    return result


def _check_samples(path: Path, score: str) -> bool:
    """Reads what every comparison reads; raises where the file is torn."""
    names = ["id", "prediction", "picture", "group", "density", score]
    if not pq.read_table(path, columns=names).num_rows:
        raise ConfigError(f"{SAMPLES} is empty")
    return True
