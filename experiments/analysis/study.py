"""The records of a study: those that can be used, and a word about each that cannot.

A study may be shared by many processes and people. A record that is torn, foreign or of another version is left out; it
must not fail the jobs beside it.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.analysis.rows import flatten
from experiments.analysis.systems import Result, base_config, data_digests, seed_of
from experiments.errors import ConfigError, leave_out
from experiments.jobs.results import RESULT, SAMPLES, read_result

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, pa.ArrowException)
"""What reading a record raises that is not what a job writes."""
_NUMBERS = (" mean", " low", " high", " n", " min", " max", " ms")


def read_study(study: Path) -> dict[Path, Result]:
    """The usable records by folder. A record is that of the folder it is in, whatever folder it was written in."""
    found = {}
    for path in sorted(study.glob(f"*/{RESULT}")):
        try:
            result = read_result(path.parent)
            if result is not None:
                found[path.parent] = _checked(path.parent, {**result, "job": path.parent.name})
        except _DAMAGED as error:
            known = isinstance(error, ConfigError)
            leave_out(path.parent, error if known else f"not the record of a job ({type(error).__name__}: {error})")
    return found


def _checked(folder: Path, result: Mapping[str, Any]) -> Result:
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
        _check_samples(folder / SAMPLES, f"score_{result['quality']['metric']}", (folder / SAMPLES).stat().st_mtime_ns)
    return result


@cache
def _check_samples(path: Path, score: str, changed: int) -> None:
    """Reads what every comparison reads; raises where the file is torn. Once for each state of the file."""
    names = ["id", "prediction", "picture", "group", "density", score]
    if not pq.read_table(path, columns=names).num_rows:
        raise ConfigError(f"{SAMPLES} is empty")
