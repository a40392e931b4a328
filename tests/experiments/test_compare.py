"""The command `experiments.compare`: systems that differ in one choice."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from experiments.analysis.paired import Part
from experiments.compare import compare, main, table_of
from experiments.jobs.sample_rows import read_scores
from tests.experiments.planting import plant

Eval = Callable[..., Path]


def test_one_choice_over_several_seeds(eval_here: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    eighths = {"pooled": 3, "shirg": 5}
    for selector, right in eighths.items():
        for seed in (0, 1, 2):
            job = eval_here(f"selector={selector}", f"seed={seed}", "data.n=48", "data.seed=0")
            # Seed 2 gains a quarter more. Other answers in each seed: seeds that change nothing count once.
            more = 2 * (seed == 2 and selector == "shirg")
            plant(job, lambda i, right=right + more, seed=seed: (i + seed) % 8 < right)
    pooled, shirg = table_of(compare([job.parent], "selector", "pooled"), "selector").to_dict("records")
    assert [pooled[key] for key in ("system", "selector", "n", "seeds")] == ["pooled", "pooled", "48", "3"]
    assert [shirg[key] for key in ("system", "selector", "n", "seeds")] == ["shirg", "shirg", "48", "3"]
    assert pooled["fine, against pooled"] == "-" and shirg["fine, against pooled"].startswith("+33.3 [")
    assert float(pooled["fine"]) == pytest.approx(37.5, abs=0.1)
    assert len(compare([job.parent], "adapter", "null")) == 2, "nothing to compare: each is alone in its block"
    capsys.readouterr()
    main([str(job.parent), "selector=pooled", "--wide"])
    head, align, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert head == list(pooled) and align[0].startswith(":-") and align[2].endswith("-:")
    assert rows == [list(pooled.values()), list(shirg.values())]
    main([str(job.parent), "selector=pooled", "--wide", "--seeds"])
    head, _, *rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    title = next(i for i, name in enumerate(head) if name.strip() == "fine by seed")
    by_seed = [[float(mean) for mean in row[title].split(",")] for row in rows]
    assert by_seed[0] == pytest.approx([37.5] * 3, abs=5) and by_seed[1] == pytest.approx([62.5, 62.5, 87.5], abs=5)


def test_subsets_divide_the_groups(eval_here: Eval) -> None:
    """Only hard questions gain: by group the gain is diluted, by subset it is seen where it is."""
    few = ("data.n=96", "data.density=[sparse,hard]")
    plant(eval_here("selector=pooled", *few), lambda _: False)
    job = eval_here("selector=shirg", *few)
    densities = [score.density for score in read_scores(job / "samples.parquet", "exact_match").values()]
    plant(job, lambda i: densities[i] == "hard")
    by_group, by_subset = (
        table_of(compare([job.parent], "selector", "pooled", part), "selector") for part in get_args(Part)
    )
    assert by_group["fine, against pooled"][1].startswith("+50.0 [")
    assert by_subset["fine hard, against pooled"][1].startswith("+100.0 [")
    assert by_subset["fine sparse, against pooled"][1].startswith("+0.0 [")
    assert "fine, against pooled" not in by_subset


def test_budgets_and_decoding_are_not_mixed(eval_here: Eval) -> None:
    """Each with its own budget and steps; what has no budget is compared with all of them."""
    few = ("data.n=24", "shots=0")
    for words in (
        ["selector=full"],
        *([f"selector={name}", f"budget={n}"] for name in ("shirg", "random") for n in (20, 40)),
    ):
        job = eval_here(*words, *few)
    eval_here("selector=random", "budget=40", "decode.step_ratio=0.5", *few)

    def blocks(choice: str) -> list[list[str]]:
        found: list[list[str]] = []
        for each in compare([job.parent], *choice.split("=")):
            new = next(cell.text for title, cell in each.cells.items() if title.endswith(choice.split("=")[1])) == "-"
            found += [[]] if new else []
            found[-1].append(each.name)
        return sorted(found)

    assert [[name.split()[0] for name in block] for block in blocks("selector=shirg")] == [["shirg", "random"]] * 2
    (block,) = blocks("selector=full")
    assert len(block) == 5 and not any("step_ratio" in name for name in block)
    assert sorted(len(block) for block in blocks("budget=40")) == [1, 2, 2]
    recall = {each.name: each.cells["recall"].main for each in compare([job.parent], "selector", "full")}
    kept = [float(recall[name]) for name in ("random 20", "random 40", "full")]
    assert kept == sorted(set(kept)) and kept[-1] == 100


def test_what_may_differ(eval_here: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters are two systems' own; a system without one is still compared with none that has one."""
    tiny = Path(__file__).parents[2] / "weights" / "tiny"
    few = (f"model.path={tiny}", "data.n=24", "shots=0")
    for selector, *words in (
        ("random", "adapter=random"),
        ("shirg", "adapter=own"),
        ("shirg", "relevance=none", "adapter=own"),
        ("saint", "adapter=null"),
    ):
        job = eval_here(f"selector={selector}", *words, *few)

    def found(*may_differ: str) -> list[str]:
        return [each.name for each in compare([job.parent], "selector", "random", may_differ=frozenset(may_differ))]

    assert [name.split()[0] for name in found()] == ["random"]
    assert [name.split()[0] for name in found("adapter")] == ["random", "shirg"]
    both = found("adapter", "relevance")
    assert len(both) == 3 and sum("relevance=none" in name for name in both) == 1
    capsys.readouterr()
    for words in ([str(job.parent), "selector=random"], [str(job.parent), str(job.parent)]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--may-differ", "relevances"])
        assert ended.value.code == 1
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "error: may-differ=relevances: this is no group of these jobs; did you mean relevance?",
        "error: --may-differ belongs to a choice, as selector=pooled",
    ]


def test_an_ablation_may_take_the_question_away(eval_here: Eval) -> None:
    eval_here("selector=shirg", "data.n=24")
    job = eval_here("selector=shirg", "data.n=24", "ablation=relevance_none")
    found = compare([job.parent], "ablation", "none")
    assert [(each.name, each.choice) for each in found] == [
        ("shirg", "none"),
        ("shirg relevance_none", "relevance_none"),
    ]


def test_two_studies(eval_here: Eval, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system of the second against the same one of the first; what only one of them has is left out."""
    few = ("data.n=48", "shots=0")
    for study, right in (("before", 3), ("after", 5)):
        for selector in ("pooled", "shirg"):
            job = eval_here(f"selector={selector}", f"study={study}", *few)
            plant(job, lambda i, right=right, selector=selector: i % 8 < right - (selector == "shirg"))
    eval_here("selector=random", "study=after", *few)
    before, after = (str(job.parent.with_name(name)) for name in ("before", "after"))
    frame = table_of(compare([Path(before), Path(after)], "study", "before"), "study")
    assert frame[["system", "study"]].to_numpy().tolist() == [
        [selector, study] for selector in ("pooled", "shirg") for study in ("before", "after")
    ]
    assert [text.partition(" ")[0] for text in frame["fine, against before"]] == ["-", "+25.0", "-", "+25.0"]
    both = compare([Path(before), Path(after)], "selector", "pooled")
    assert [each.name for each in both[:2]] == ["pooled (before)", "shirg (before)"] and len(both) == 5
    capsys.readouterr()
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        main([before, after])
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= width and printed.count("+25.0") == 4
    with pytest.raises(SystemExit):
        main([after, "selector=poled"])
    assert "no finished evaluation has selector=poled; did you mean pooled?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "outputs/before outputs/after" in capsys.readouterr().out
