"""deck.pptx: nine slides about a study, filled with its rows, figures and examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from experiments.analysis.columns import columns, differences, labels
from experiments.analysis.paired import BASELINE, UNABLATED, other_name
from experiments.analysis.rows import Row, our_row, unequal
from experiments.analysis.table import parts, records
from experiments.jobs.results import SAMPLES, SHOTS, read_result
from experiments.jobs.sample_rows import RECALL, read_scores
from experiments.override_grammar import command_in
from experiments.report.answer_browser import RIGHT
from experiments.report.figure_style import ReportFigure
from experiments.report.slide_layout import Slide, Slides
from experiments.viz.examples import ExampleRecord, load_examples, printable

NAME = "deck.pptx"
LONGEST_QUESTION = 60
BENCHMARKS = ("chartqa", "docvqa", "vqav2", "entitygrid")
MOST_ROWS = 14
MOST_EXAMPLES = 3
NARROW = 5
"""Columns of a table that leave room for intervals."""


def write_slides(study: Path, frame: pd.DataFrame, drawn: Sequence[ReportFigure]) -> Path:
    """Writes the slides beside the page; the study must have a finished row."""
    facts = StudyFacts(study, records(frame))
    slides = Slides(facts.summary)
    figures = {one.name: one for one in drawn}
    motivation(slides, facts)
    upper_bound(slides, facts, figures)
    selectors(slides, facts)
    method(slides, facts)
    results(slides, facts)
    efficiency(slides, facts, figures)
    ablations(slides, facts, figures)
    failures(slides, facts)
    roadmap(slides, facts)
    return slides.save(study / NAME)


class StudyFacts:
    """The finished rows of a study, at least one, and what the slides state about them.

    Most slides are about three of them: the baseline, the one with all tokens, and the best row of our method.
    """

    def __init__(self, study: Path, rows: Sequence[Row]) -> None:
        self.study = study
        self.rows = parts([row for row in rows if row["status"] == "ok"])[0][1]
        self.names = labels(self.rows)
        self.pooled = self._first(BASELINE)
        self.full = self._first("full")
        self.ours = our_row(self.rows)

    @property
    def summary(self) -> str:
        sets = ", ".join(sorted({row["dataset"] for row in self.rows}))
        counts = sorted({row["n"] for row in self.rows})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"study {self.study.name}; {sets}; n = {n}; 95 % intervals"

    def name(self, row: Row) -> str:
        return self.names[next(i for i, other in enumerate(self.rows) if other is row)]

    def result(self, row: Row) -> Mapping[str, Any]:
        result = read_result(self.study / row["job"])
        assert result is not None
        return result

    def examples(self, row: Row) -> dict[str, ExampleRecord]:
        """The samples that the row's job drew, by id."""
        return {one.record["id"]: one for one in load_examples(self.study / row["job"] / SHOTS)}

    def against_baseline(self, row: Row) -> str:
        """The row's differences to the baseline, with intervals; empty where there is none."""
        parts = []
        for name in self._compared(BASELINE):
            if row.get(f"delta {name} mean") is not None:
                mean, low, high = (100 * row[f"delta {name} {key}"] for key in ("mean", "low", "high"))
                group = name.removesuffix(f"vs {BASELINE}").strip() or "all"
                parts.append(f"{group} {signed(mean)} [{signed(low)}, {signed(high)}]")
        return "; ".join(parts)

    def extremes(self, against: str) -> list[str]:
        """The largest loss and the largest gain of a comparison."""
        found = [
            (100 * row[f"delta {name} mean"], name, self.name(row))
            for row in self.rows
            for name in self._compared(against)
            if row.get(f"delta {name} mean") is not None
        ]
        ends = dict.fromkeys((min(found), max(found))) if found else ()
        return [f"{label}, {name}: {signed(size)} points." for size, name, label in ends]

    def detectable(self) -> float | None:
        """The largest of the differences that the study's comparisons would find with 80 % power, in points."""
        sizes = [
            100 * row[f"delta {name} detectable"]
            for row in self.rows
            for name in differences(self.rows)
            if row.get(f"delta {name} detectable") is not None
        ]
        return max(sizes, default=None)

    def right(self, row: Row) -> dict[str, bool]:
        """Whether each sample was answered right."""
        scores = read_scores(self.study / row["job"] / SAMPLES, row["metric"])
        return {i: score.value >= RIGHT for i, score in scores.items()}

    def recall(self, row: Row) -> dict[str, float]:
        """Share of each sample's evidence that was kept, where it is known."""
        return {i: score.value for i, score in read_scores(self.study / row["job"] / SAMPLES, RECALL).items()}

    def answers(self, ids: Sequence[str], row: Row, other: Row) -> list[list[str]]:
        """Question, expected answers, the row's answer and the other row's answer of each sample."""
        columns = ["id", "question", "answers", "prediction"]
        ours, theirs = (
            {sample["id"]: sample for sample in pq.read_table(path / SAMPLES, columns=columns).to_pylist()}
            for path in (self.study / row["job"], self.study / other["job"])
        )
        return [
            [
                printable(ours[i]["question"], LONGEST_QUESTION),
                printable(" | ".join(ours[i]["answers"])),
                printable(ours[i]["prediction"]) or "(empty)",
                printable(theirs[i]["prediction"]) or "(empty)",
            ]
            for i in ids
        ]

    def missing(self, words: str, meaning: str) -> str:
        return f"Not in this study: {meaning}. {command_in(self.study.name)} {words} adds it."

    def _compared(self, against: str) -> list[str]:
        return [name for name in differences(self.rows) if other_name(name) == against]

    def _first(self, selector: str) -> Row | None:
        return next((row for row in self.rows if row["selector"] == selector), None)


def signed(points: float) -> str:
    """With a minus sign instead of a hyphen, so that no line breaks after it."""
    return f"{points:+.1f}".replace("-", "\u2212")


def motivation(slides: Slides, facts: StudyFacts) -> None:
    points = ["A diffusion language model reads one prefix cache in every step: its vision tokens are selected once."]
    if facts.pooled:
        before = f" of {facts.full['visual tokens mean']:.0f}" if facts.full else ""
        count = f"{facts.pooled['visual tokens mean']:.0f}{before}"
        points.append(f"{BASELINE} passes on {count} tokens, spread evenly over the picture.")
    points.append("At the same number of tokens: which ones should be kept?")
    slide = slides.add("Selected once, read in every step", points)
    rows = [row for row in (facts.pooled, facts.ours) if row]
    examples = [facts.examples(row) for row in rows]
    common = next((i for i in (examples[-1] if examples else ()) if all(i in of_row for of_row in examples)), None)
    if common is None:
        slide.remark("This study has no examples; shots=8 draws some.")
        return
    pictures = [("the picture", examples[0][common].picture)]
    pictures += [
        (f"kept by {facts.name(row)}", of_row[common].overlay) for row, of_row in zip(rows, examples, strict=True)
    ]
    question = printable(examples[0][common].record["question"], LONGEST_QUESTION)
    slide.pictures([(image, f"{caption}\nquestion: {question}") for caption, image in pictures])


def upper_bound(slides: Slides, facts: StudyFacts, figures: Mapping[str, ReportFigure]) -> None:
    title = "All tokens: quality and cost"
    if not facts.full:
        slides.add(title, [facts.missing("selector=full", "all tokens")]).remark("No row selector=full in this study.")
        return
    full, pooled = facts.full, facts.pooled
    points = [f"{facts.name(full)}, {full['visual tokens mean']:.0f} tokens: {facts.against_baseline(full)}."]
    if pooled and pooled.get("total ms") and full.get("total ms"):
        tokens, time = (full[key] / pooled[key] for key in ("visual tokens mean", "total ms"))
        points.append(f"Cost: {tokens:.1f} times the tokens, {time:.1f} times the time for a sample.")
    points.append("Without training on long prefixes this need not be an upper bound: compare rows trained alike.")
    _with_figure(slides, title, points, figures, "pareto_tokens")


def selectors(slides: Slides, facts: StudyFacts) -> None:
    table = []
    for row, name in zip(facts.rows, facts.names, strict=True):
        sources = facts.result(row)["tokens"]["by_source"]
        trained, select = row["trainable parameters"], row.get("select ms")
        table.append(
            [
                name,
                ", ".join(f"{count:.0f} {source}" for source, count in sources.items() if count),
                "yes" if row.get("relevance ms") else "no",
                f"{trained:,}" if trained else "-",
                "-" if select is None else f"{select:.2f}",
            ]
        )
    points = [
        f"{len({row['selector'] for row in facts.rows})} selectors, {len(facts.rows)} systems.",
        "All select before the prefix is cached; the prefix does not change afterwards.",
        "A selector is useful only if it beats random at the same budget.",
    ]
    head = ["system", "tokens passed on", "reads question", "trained", "select ms"]
    slides.add("Selectors compared", points).table(head, table[:MOST_ROWS])


def method(slides: Slides, facts: StudyFacts) -> None:
    if not facts.ours:
        slide = slides.add("SHIRG", [facts.missing("selector=shirg", "the method")])
        slide.remark("No row selector=shirg in this study.")
        return
    row, result = facts.ours, facts.result(facts.ours)
    weights = {name: weight for name, weight in result["config"]["selector"].get("weights", {}).items() if weight}
    sources = {name: count for name, count in result["tokens"]["by_source"].items() if count}
    steps = [
        ("Views", "up to five views of the picture, each a grid of tokens"),
        ("Score", ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "see its config"),
        ("Keep", f"the best at a fixed budget: {', '.join(f'{n:.0f} {name}' for name, n in sources.items())}"),
        ("Project, cache", "in reading order; keys and values are written once"),
        ("Denoise", "every step reads the same prefix"),
    ]
    points = ["Score each token once, keep the best, add coarse scaffold tokens so that no region is left out."]
    trained = row["trainable parameters"]
    share = f"{trained:,} trained parameters, {trained / result['model']['parameters']:.2%} of the model."
    points.append(share if trained else "Nothing is trained in this row.")
    if row.get("select ms") is not None and row.get("total ms"):
        points.append(f"Selection takes {row['select ms']:.2f} of {row['total ms']:.2f} ms for a sample.")
    slides.add(f"SHIRG: {facts.name(row)}", points).flow(steps, accent=1)


def results(slides: Slides, facts: StudyFacts) -> None:
    kinds = ("score", "difference")
    shown = [c for c in columns(facts.rows) if c.kind in kinds or c.title == "visual tokens"]
    shown = [
        c for c in shown if c.title != "recall" and not (c.kind == "difference" and other_name(c.title) == UNABLATED)
    ]
    whole = len(shown) < NARROW
    cells = [[cell.text if whole else cell.brief for cell in c.cells] for c in shown]
    table = [[name, *values] for name, *values in zip(facts.names, *cells, strict=True)]
    found = [(row, facts.against_baseline(row)) for row in (facts.ours, facts.full) if row]
    points = [f"{facts.name(row)}: {text}." for row, text in found if text]
    points.append("Scores in %, differences in points on the same samples; intervals: report.html, table.tex.")
    bold = [i for i, row in enumerate(facts.rows) if row is facts.ours]
    slides.add("Results", points).table(["system", *(c.title for c in shown)], table[:MOST_ROWS], bold)


def efficiency(slides: Slides, facts: StudyFacts, figures: Mapping[str, ReportFigure]) -> None:
    points = []
    if facts.ours and facts.pooled and facts.ours.get("total ms") and facts.pooled.get("total ms"):
        ours, theirs = (f"{row['total ms']:.2f} ms" for row in (facts.ours, facts.pooled))
        points.append(f"{facts.name(facts.ours)}: {ours} for a sample; {facts.name(facts.pooled)}: {theirs}.")
    points.append(f"On {facts.rows[0]['env device']}, {facts.rows[0]['env dtype']}: medians over batches.")
    if "memory" not in figures:
        points.append("No accelerator memory: this ran on a CPU; device=cuda measures it.")
    _with_figure(slides, "Where the time goes", points, figures, "latency", "memory")


def ablations(slides: Slides, facts: StudyFacts, figures: Mapping[str, ReportFigure]) -> None:
    if "ablations" in figures:
        points = ["Each row removes one part; differences to the whole method.", *facts.extremes(UNABLATED)]
        _with_figure(slides, "Ablations", points, figures, "ablations")
        return
    points = ["No ablations in this study; instead, all differences.", *facts.extremes(BASELINE)]
    _with_figure(slides, f"Differences to {BASELINE}", points, figures, "differences")


def failures(slides: Slides, facts: StudyFacts) -> None:
    title = "Where it fails"
    if not (facts.ours and facts.pooled):
        slide = slides.add(title, [facts.missing("selector=pooled,shirg", "a pair to compare")])
        slide.remark("There is no pair of systems to compare.")
        return
    ours, theirs = facts.right(facts.ours), facts.right(facts.pooled)
    both = ours.keys() & theirs.keys()
    broken = sorted(i for i in both if theirs[i] and not ours[i])
    fixed = sum(ours[i] and not theirs[i] for i in both)
    names = f"{facts.name(facts.ours)} against {facts.name(facts.pooled)}"
    points = [f"{names}: {fixed} answers fixed, {len(broken)} broken of {len(both)}."]
    recall = facts.recall(facts.ours)
    lost = [recall[i] for i in broken if i in recall]
    if lost:
        points.append(f"Evidence kept where broken: {sum(lost) / len(lost):.0%}, n = {len(lost)}.")
        points.append(f"Evidence kept in all: {sum(recall.values()) / len(recall):.0%}, n = {len(recall)}.")
    slide = slides.add(title, points)
    drawn = [one for i, one in facts.examples(facts.ours).items() if i in broken][:MOST_EXAMPLES]
    if drawn:
        slide.pictures([(one.overlay, _answered(one.record)) for one in drawn])
    elif broken:
        rows = facts.answers(broken[:MOST_ROWS], facts.ours, facts.pooled)
        slide.table(["question", "expected", "answer", f"answer of {BASELINE}"], rows)
    else:
        slide.remark(f"No answer was right with {BASELINE} and wrong here.")


def roadmap(slides: Slides, facts: StudyFacts) -> None:
    seeds = min(1 if row["seeds equal"] else len(row["seeds"].split()) for row in facts.rows)
    sets = {row["dataset"] for row in facts.rows}
    trained = all(facts.result(row)["model"]["trained"] for row in facts.rows)
    size = facts.detectable()
    table = [
        *([f"data: {name}", "in this study" if name in sets else "not in this study"] for name in BENCHMARKS),
        ["other data", ", ".join(sorted(sets - set(BENCHMARKS))) or "none"],
        ["seeds for each system", str(seeds)],
        ["smallest detectable difference", "-" if size is None else f"{size:.1f} points"],
        ["rows at another budget", str(sum(unequal(row) for row in facts.rows))],
        ["weights", "trained" if trained else "random: answers carry no information"],
        ["device", facts.rows[0]["env device"]],
    ]
    known = "Intervals hold for a new training seed." if seeds > 2 else "Then: at least three seeds of each training."
    points = [
        "First: what the table on the right lacks.",
        known,
        "Then: a smaller cache, cache=NAME.",
    ]
    slides.add("What is known, what is next", points).table(["evidence", "state"], table)


def _with_figure(
    slides: Slides, title: str, points: Sequence[str], figures: Mapping[str, ReportFigure], *names: str
) -> Slide:
    drawn = [figures[name] for name in names if name in figures]
    slide = slides.add(title, points, notes="\n".join(one.caption for one in drawn))
    if drawn:
        slide.stack([one.png for one in drawn])
    else:
        slide.remark("The study has too few rows for this figure.")
    return slide


def _answered(record: Mapping[str, object]) -> str:
    answers = record["answers"]
    assert isinstance(answers, list)
    expected = printable(" | ".join(answers))
    given = printable(str(record["prediction"])) or "(empty)"
    return f"{printable(str(record['question']), LONGEST_QUESTION)}\nexpected {expected}\nanswered {given}"
