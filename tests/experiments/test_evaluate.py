"""The command eval: every selector, caches that are made smaller, shards, a control that asks another question."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from experiments.analysis.columns import columns
from experiments.analysis.table import collect
from experiments.compare import compare
from experiments.data.chosen_samples import choose_samples
from experiments.schema import CONF
from shirg import UserError
from tests.experiments.conftest import result_of, rows_of

Eval = Callable[..., Path]


WITHOUT_BUDGET = {"pooled": 88, "full": 336, "global_only": 64}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "selector").glob("*.yaml")))
def test_every_selector_answers(eval_here: Eval, name: str) -> None:
    """The job itself checks that each picture gets as many tokens as the selector's budget says."""
    own = [] if name in WITHOUT_BUDGET else ["selector.budget=70"]  # variants of the notes do not follow budget=
    folder = eval_here(f"selector={name}", "limit=4", *own, "shots=0")
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    counts = [row["n_visual"] for row in rows]
    if name == "llava_scissor":  # how many parts a picture has follows from its content
        assert len(counts) == 4 and all(0 < count <= 70 for count in counts) and len(set(counts)) > 1
    else:
        assert counts == [WITHOUT_BUDGET.get(name, 70)] * 4
    if name == "oracle":
        assert [row["recall"] for row in rows if row["recall"] is not None] == [1.0] * 4


def test_another_question_changes_what_is_kept_and_not_what_is_asked(eval_here: Eval) -> None:
    common = ("selector=shirg", "data.n=24", "shots=0", "study=shuffle")
    right, wrong, again = (
        pq.read_table(eval_here(*common, *overrides) / "samples.parquet").to_pylist()
        for overrides in ([], ["shuffle_questions=true"], ["shuffle_questions=true", "overwrite=true"])
    )
    assert [row["question"] for row in right] == [row["question"] for row in wrong]
    assert [row["prompt"] for row in right] == [row["prompt"] for row in wrong]
    assert sum(a["kept"] != b["kept"] for a, b in zip(right, wrong, strict=True)) == len(right)
    assert [row["kept"] for row in wrong] == [row["kept"] for row in again]


def test_an_even_context_takes_the_place_of_what_is_ranked_last(eval_here: Eval) -> None:
    """At the same budget; systems with and without are told apart, and compared."""
    kept: dict[tuple[str, str], list[list[int]]] = {}
    for name in (names := ("random", "saint", "cdpruner", "shirg")):
        for context in ("none", "even"):
            words = ["context=even"] if context == "even" else []
            study = (job := eval_here(f"selector={name}", "limit=4", "shots=0", *words)).parent
            rows = pq.read_table(job / "samples.parquet").to_pylist()
            assert [row["n_visual"] for row in rows] == [80] * 4
            assert result_of(job)["selector"]["budget"] == 80
            kept[name, context] = [row["kept"] for row in rows]
        pairs = list(zip(kept[name, "none"], kept[name, "even"], strict=True))
        chosen = len(pairs[0][0])
        assert all(len(a) == len(b) == chosen and 0.4 < len(set(a) & set(b)) / chosen < 0.8 for a, b in pairs)
    table = collect(study)
    assert {(row["selector"], row["context"]) for row in table} == set(kept)
    shown = {column.title: column.texts for column in columns(table)}
    assert sorted(shown["system"]) == sorted([*names, *(f"{name} context=even" for name in names)])
    found = compare([study], "context", "none")
    assert [each.choice for each in found] == ["none", "even"] * 4
    assert [each.name for each in found[1::2]] == [f"{each.name} context=even" for each in found[::2]]


FEW = ("limit=6", "selector=full")


@pytest.mark.parametrize("cache", [("cache=fastv", "cache.layer=0"), ("cache=redvtp",)])
@pytest.mark.parametrize(("budget", "count"), [("base", 80), ("matched", 88), ("77", 77)])
def test_rows_tell_what_was_fed_and_what_was_left(
    eval_here: Eval, cache: tuple[str, ...], budget: str, count: int
) -> None:
    plain = pq.read_table(eval_here(*FEW) / "samples.parquet").to_pylist()
    job = eval_here(*FEW, *cache, f"budget={budget}")
    rows = pq.read_table(job / "samples.parquet").to_pylist()
    assert [r["n_cache"] for r in plain] == [None] * 6
    for before, after in zip(plain, rows, strict=True):
        assert after["n_visual"] == before["n_visual"] == 336 and after["n_prefix"] == before["n_prefix"]
        assert after["n_cache"] == count
        assert set(after["kept"]) < set(before["kept"]) and count - 16 <= len(after["kept"]) <= count
        assert after["n_kept"] == 320, "sources are what was fed"
    recalls = [[row["recall"] for row in answers] for answers in (plain, rows)]
    assert sum(recalls[0]) == 6 and 0 <= sum(recalls[1]) < 6, "recall is that of the rows that are left"
    result = result_of(job)
    assert result["tokens"]["cache"] == {"mean": count, "min": count, "max": count}
    assert result["cache"]["budget"] == (count if budget != "matched" else "matched")
    assert 0 < result["times"]["ms_per_sample"]["cache"] < result["times"]["ms_per_sample"]["total"]


@pytest.mark.parametrize("cache", ["sparsevlm", "dart", "pyramiddrop"])
def test_methods_of_several_layers_leave_the_budget(eval_here: Eval, cache: str) -> None:
    """On the shipped model, which has three layers; `pyramiddrop` has 137, 69 and 34 rows in them."""
    job = eval_here(*FEW, f"model.path={CONF.parent / 'weights' / 'tiny'}", f"cache={cache}")
    rows = pq.read_table(job / "samples.parquet").to_pylist()
    for row in rows:
        assert row["n_visual"] == 336 and row["n_cache"] == 80
        # Keys and values of 96 numbers in 3 layers, 4 bytes each.
        assert row["cache_bytes"] == (80 + row["n_prefix"] - 336) * 3 * 2 * 96 * 4
        assert len(row["kept"]) <= (34 if cache == "pyramiddrop" else 80)
    assert len({tuple(row["kept"]) for row in rows}) == len(rows), "it depends on the picture"


def test_an_adaptive_cache_is_counted_row_by_row(eval_here: Eval) -> None:
    job = eval_here("limit=12", "selector=shirg", "cache=adaptive_k", "cache.candidates=[1000,2000]")
    rows = pq.read_table(job / "samples.parquet").to_pylist()
    assert {row["n_cache"] for row in rows} == {40} and {row["n_visual"] for row in rows} == {80}
    assert all(len(row["kept"]) == 24 for row in rows), "16 of the 40 are the scaffold"


def test_an_answer_that_is_complete_before_the_cut_says_so(eval_here: Eval) -> None:
    """On the shipped model some answers take one step: what their rows say does not depend on their batch."""
    weights = f"model.path={CONF.parent / 'weights' / 'tiny'}"
    words = ("limit=12", "selector=full", weights, "cache=redvtp", "decode.threshold=0.7")
    jobs = [eval_here(*words, f"batch_size={n}") for n in (12, 1)]
    together, each = (pq.read_table(job / "samples.parquet").to_pylist() for job in jobs)
    assert {row["n_steps"] for row in together} == {1, 2}
    for row, by_itself in zip(together, each, strict=True):
        whole = row["n_steps"] == 1
        assert row["n_cache"] == (336 if whole else 80) and (len(row["kept"]) == 320) == whole
        assert (row["drift"] == 0) == whole and (row["same_top1"] == 1 or not whole)
        # Keys and values of 96 numbers in 3 layers, 4 bytes each.
        assert row["cache_bytes"] == (row["n_prefix"] if whole else row["n_prefix"] - 256) * 3 * 2 * 96 * 4
        assert {name: row[name] for name in SAME} == {name: by_itself[name] for name in SAME}
    assert result_of(jobs[0])["tokens"]["cache"]["max"] == 336


SAME = ("prediction", "n_steps", "n_cache", "kept", "recall", "same_top1")


def test_the_table_shows_the_cache_where_one_was_cut(eval_here: Eval) -> None:
    eval_here("limit=6", "selector=pooled")
    study = eval_here(*FEW).parent
    titles = [c.title for c in columns(collect(study))]
    assert "cache tokens" not in titles and "cache ms" not in titles
    eval_here(*FEW, "cache=redvtp")
    eval_here("limit=6", "selector=pooled", "cache=redvtp", "cache.budget=40")
    shown = {c.title: c.texts for c in columns(collect(study))}
    at = {(name.split()[0], "redvtp" in name): i for i, name in enumerate(shown["system"])}
    cut, whole = at["full", True], at["full", False]
    assert [shown["cache tokens"][i] for i in (cut, whole, at["pooled", True])] == ["80", "-", "40 (0.5x)"]
    assert shown["visual tokens"][cut] == "336" and shown["budget"][cut] == "base (80)"
    assert float(shown["cache ms"][cut]) > 0 and shown["cache ms"][whole] == "-"
    assert shown["budget"][at["pooled", True]] == "40" and "cache=redvtp" in shown["changes"][cut]


def test_a_pooled_job_with_a_shortened_cache_is_no_baseline(eval_here: Eval) -> None:
    eval_here("limit=6", "selector=pooled", "cache=redvtp", "cache.budget=40")
    study = eval_here(*FEW).parent
    assert not any(key.startswith("delta") for row in collect(study) for key in row)
    eval_here("limit=6", "selector=pooled")
    rows = {(row["selector"], row["cache"]): row for row in collect(study)}
    assert "delta vs pooled mean" in rows["full", "none"] and "delta vs pooled mean" in rows["pooled", "redvtp"]
    assert "delta vs pooled mean" not in rows["pooled", "none"]


def test_both_budgets_are_shown_where_they_differ(eval_here: Eval) -> None:
    study = eval_here("limit=6", "selector=random", "cache=redvtp", "cache.budget=40").parent
    assert [row["budget"] for row in collect(study)] == ["base (80), cache 40"]


SYSTEM = ("selector=shirg", "data.n=25", "study=s", "shots=2", "threads=1")


def test_shards_equal_the_whole(eval_here: Eval) -> None:
    whole = eval_here(*SYSTEM)
    parts = []
    for shard in (2, 0, 1):
        assert {path.parent for path in whole.parent.glob("*/result.json")} == {whole, *parts}
        parts.append(eval_here(*SYSTEM, "shards=3", f"shard={shard}"))
    (merged,) = {path.parent for path in whole.parent.glob("*/result.json")} - {whole, *parts}
    assert [{**row, "batch": 0} for row in rows_of(merged)] == [{**row, "batch": 0} for row in rows_of(whole)]
    ours, theirs = result_of(merged), result_of(whole)
    same = ("quality", "tokens", "selection", "data", "config", "config_hash", "model", "selector", "status")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert "shard=0,1,2" in ours["command"] and ours["command"].startswith("python eval.py -m ")
    assert sorted(p.name for p in (merged / "shots").iterdir()) == sorted(p.name for p in (whole / "shots").iterdir())
    table = (whole.parent / "table.csv").read_text().splitlines()
    assert len(table) == 3, "a header, the whole and the merged row; no row for a shard"


def test_a_shard_by_itself_says_so(eval_here: Eval) -> None:
    folder = eval_here(*SYSTEM, "shards=2", "shard=1")
    assert "shard 1 of 2" in (folder.parent / "table.md").read_text()


class TwoAlike:
    """Two samples that share an id."""

    name = "twins"

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(id="same", picture=index)


def test_two_samples_with_one_id_are_refused() -> None:
    with pytest.raises(UserError, match="twins has two samples with the same id"):
        choose_samples(TwoAlike(), None, 0)
