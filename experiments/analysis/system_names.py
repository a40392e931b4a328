"""Names of the systems of a study: the shortest that tell them apart, as `shirg + LoRA r64`.

A name is the selector, what its command line changed, and `+ LoRA` with an adapter; what all systems share is left out.
Budgets, ranks and so on are added only to names that would otherwise be equal.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from experiments.analysis.rows import Row

ADAPTED = "+ LoRA"
_ALONE = frozenset({"experiment", "ablation", "decode", "cache"})
"""Groups whose options are understood without the group's name."""
_IMPLIED = frozenset({"adapter", "experiment"})
"""Overrides that are no words of their own: `+ LoRA` and the selector stand for them. Those of data are none either."""


def labels(rows: Sequence[Row], *, with_data: bool = True) -> list[str]:
    """A short name for each row.

    Args:
        with_data: whether the same system on two datasets has two names; False where a column names the dataset.
    """
    common = set(shared_changes(rows))
    heads = [[str(row["selector"]), *_changed(row, common)] for row in rows]
    tails = [[ADAPTED] if _adapter(row) and f"adapter={_adapter(row)}" not in common else [] for row in rows]
    details: list[tuple[list[list[str]], Detail]] = [
        (heads, _each(_budget)),
        (tails, _each(_rank)),
        (heads, _each(lambda row: _values(row).get("experiment", ""))),
        (tails, lambda alike: _differing([_adapter(row) for row in alike])),
        (tails, _each(lambda row: f"{row['n']} samples" if row["limited"] else "")),
        (tails, _each(lambda row: str(row["dataset"] or row["data"]) if with_data else "")),
        (tails, _each(lambda row: " ".join(f"{k}={v}" for k, v in _values(row).items() if k.startswith("data.")))),
        (tails, _each(lambda row: f"({row['job']})")),
    ]
    for place, detail in details:
        for members in _alike(heads, tails, [None if with_data else row["dataset"] or row["data"] for row in rows]):
            texts = detail([rows[i] for i in members])
            if len(set(texts)) > 1:
                for i, text in zip(members, texts, strict=True):
                    place[i] += filter(None, [text])
    return [" ".join([*head, *tail]) for head, tail in zip(heads, tails, strict=True)]


Detail = Callable[[Sequence[Row]], list[str]]
"""What is added to the names of rows that would have the same one."""


def _each(text: Callable[[Row], str]) -> Detail:
    return lambda rows: [text(row) for row in rows]


def _alike(heads: Sequence[list[str]], tails: Sequence[list[str]], data: Iterable[object]) -> list[list[int]]:
    """The numbers of rows whose names are equal, where that is more than one."""
    found: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(map(tuple, heads), map(tuple, tails), data, strict=True)):
        found[key].append(i)
    return [members for members in found.values() if len(members) > 1]


def shared_changes(rows: Sequence[Row]) -> list[str]:
    """The overrides that all rows have."""
    words = [row["changes"].split() for row in rows]
    return [word for word in words[0] if all(word in other for other in words)] if words else []


def short(change: str) -> str:
    """A short form of an override: `rank=32` of lora.rank=32, an ablation's name alone, the last folder of a path."""
    key, _, value = change.lstrip("+~").partition("=")
    value = value.rstrip("/").rpartition("/")[2]
    if key == "adapter":
        return ADAPTED if value == "own" else f"{ADAPTED} {value}"
    return value if key in _ALONE else f"{key.removeprefix('selector.')}={value}"


def _values(row: Row) -> dict[str, str]:
    """The values of a row's overrides by their keys."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in row["changes"].split())}


def _changed(row: Row, common: set[str]) -> list[str]:
    words = [word for word in row["changes"].split() if word not in common]
    keys = [word.lstrip("+~").partition("=")[0] for word in words]
    own = [not (key in _IMPLIED or key.startswith("data.")) for key in keys]
    return [short(word) for word, is_own in zip(words, own, strict=True) if is_own]


def _adapter(row: Row) -> str:
    return _values(row).get("adapter", "")


def _rank(row: Row) -> str:
    rank = row.get("lora rank")
    return f"r{rank}" if rank and _adapter(row) else ""


def _budget(row: Row) -> str:
    """Numbers of tokens without the names that the model has for them: `80` for `base (80)`."""
    return re.sub(r"\S+ \((\d+)\)", r"\1", str(row["budget"] or ""))


def _differing(texts: Sequence[str]) -> list[str]:
    """The parts of each text, between slashes and underscores, that not all texts have."""
    parts = [re.split(r"[/_]+", text) for text in texts]
    common = set.intersection(*map(set, parts))
    return [" ".join(part for part in each if part not in common) for each in parts]
