"""What the slides say about a study: which rows stand for what, and sentences with their figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.analysis.columns import columns, differences, labels, our_row, parts, unequal
from experiments.analysis.paired import BASELINE, UNABLATED
from experiments.analysis.rows import Row
from experiments.jobs.results import RECALL, SAMPLES, SHOTS, read_result, read_scores
from experiments.report.figure_style import ReportFigure
from experiments.report.page import RIGHT, printable
from experiments.report.slide_layout import Slide, Slides
from experiments.viz.examples import ExampleRecord, load_examples

LONGEST_QUESTION = 60


class DeckFacts:
    """The finished rows of a study, which must have one, and the three that most slides are about."""

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

    def shots(self, row: Row) -> dict[str, ExampleRecord]:
        """The samples that the row's job drew, by id."""
        return {shot.record["id"]: shot for shot in load_examples(self.study / row["job"] / SHOTS)}

    def against_baseline(self, row: Row) -> str:
        """The row's differences to the baseline, with intervals; empty where there is none."""
        parts = []
        for name in self._compared(BASELINE):
            if f"delta {name} mean" in row:
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
            if f"delta {name} mean" in row
        ]
        ends = dict.fromkeys((min(found), max(found))) if found else ()
        return [f"{who}, {what}: {signed(size)} points." for size, what, who in ends]

    def detectable(self) -> float | None:
        """The largest of the differences that the study's comparisons would find with 80 % power, in points."""
        sizes = [
            100 * row[f"delta {name} detectable"]
            for row in self.rows
            for name in differences(self.rows)
            if f"delta {name} detectable" in row
        ]
        return max(sizes, default=None)

    def right(self, row: Row) -> dict[str, bool]:
        """Whether each sample was answered right."""
        scores = read_scores(self.study / row["job"] / SAMPLES, row["metric"])
        return {i: score.value >= RIGHT for i, score in scores.items()}

    def recall(self, row: Row) -> dict[str, float]:
        """Share of each sample's evidence that was kept, where it is known."""
        return {i: score.value for i, score in read_scores(self.study / row["job"] / SAMPLES, RECALL).items()}

    def said(self, ids: Sequence[str], row: Row, other: Row) -> list[list[str]]:
        """Question, expected answers, what the row said and what the other said."""
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

    def missing(self, what: str, sense: str) -> str:
        return f"Not in this study: {sense}. python eval.py study={self.study.name} {what} adds it."

    def _compared(self, against: str) -> list[str]:
        return [name for name in differences(self.rows) if name.rpartition("vs ")[2] == against]

    def _first(self, selector: str) -> Row | None:
        return next((row for row in self.rows if row["selector"] == selector), None)


def signed(points: float) -> str:
    """With a true minus sign, which no line breaks after."""
    return f"{points:+.1f}".replace("-", "\u2212")


NAME = "deck.pptx"
BENCHMARKS = ("chartqa", "docvqa", "vqav2", "entitygrid")
MOST_ROWS = 14
MOST_SHOTS = 3
NARROW = 5
"""Columns of a table that leave room for intervals."""


def write_slides(study: Path, rows: Sequence[Row], drawn: Sequence[ReportFigure]) -> Path:
    """Writes the deck beside the page; the study must have a finished row."""
    story = DeckFacts(study, rows)
    slides = Slides(story.summary)
    figures = {one.name: one for one in drawn}
    motivation(slides, story)
    upper_bound(slides, story, figures)
    landscape(slides, story)
    method(slides, story)
    results(slides, story)
    efficiency(slides, story, figures)
    ablations(slides, story, figures)
    failures(slides, story)
    roadmap(slides, story)
    return slides.save(study / NAME)


def motivation(slides: Slides, story: DeckFacts) -> None:
    points = ["A diffusion language model reads one prefix cache in every step: its vision tokens are chosen once."]
    if story.pooled:
        before = f" of {story.full['visual tokens mean']:.0f}" if story.full else ""
        count = f"{story.pooled['visual tokens mean']:.0f}{before}"
        points.append(f"{BASELINE} hands on {count} tokens, as many for a margin as for a legend.")
    points.append("At the same number of tokens: which ones should be kept?")
    slide = slides.add("Chosen once, read in every step", points)
    rows = [row for row in (story.pooled, story.ours) if row]
    shots = [story.shots(row) for row in rows]
    common = next((i for i in (shots[-1] if shots else ()) if all(i in drawn for drawn in shots)), None)
    if common is None:
        slide.remark("This study drew no samples; shots=8 draws some.")
        return
    pictures = [("the picture", shots[0][common].picture)]
    pictures += [(f"kept by {story.name(row)}", drawn[common].overlay) for row, drawn in zip(rows, shots, strict=True)]
    question = printable(shots[0][common].record["question"], LONGEST_QUESTION)
    slide.pictures([(image, f"{caption}\nquestion: {question}") for caption, image in pictures])


def upper_bound(slides: Slides, story: DeckFacts, figures: Mapping[str, ReportFigure]) -> None:
    title = "What every token gives, and costs"
    if not story.full:
        slides.add(title, [story.missing("selector=full", "all tokens")]).remark("No row selector=full in this study.")
        return
    full, pooled = story.full, story.pooled
    points = [f"{story.name(full)}, {full['visual tokens mean']:.0f} tokens: {story.against_baseline(full)}."]
    if pooled and pooled.get("total ms") and full.get("total ms"):
        tokens, time = (full[key] / pooled[key] for key in ("visual tokens mean", "total ms"))
        points.append(f"Price: {tokens:.1f} times the tokens, {time:.1f} times the time for a sample.")
    points.append("Not trained on long prefixes it need not be a bound: compare rows trained alike.")
    _with_figure(slides, title, points, figures, "pareto_tokens")


def landscape(slides: Slides, story: DeckFacts) -> None:
    table = []
    for row, name in zip(story.rows, story.names, strict=True):
        sources = story.result(row)["tokens"]["by_source"]
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
        f"{len({row['selector'] for row in story.rows})} ways to choose, {len(story.rows)} systems.",
        "All choose before the prefix is cached; nothing changes it afterwards.",
        "random at the same budget is the bar that a choice has to clear.",
    ]
    head = ["system", "tokens it hands on", "reads question", "trained", "select ms"]
    slides.add("The landscape", points).table(head, table[:MOST_ROWS])


def method(slides: Slides, story: DeckFacts) -> None:
    if not story.ours:
        slide = slides.add("SHIRG", [story.missing("selector=shirg", "the method")])
        slide.remark("No row selector=shirg in this study.")
        return
    row, result = story.ours, story.result(story.ours)
    weights = {name: weight for name, weight in result["config"]["selector"].get("weights", {}).items() if weight}
    sources = {name: count for name, count in result["tokens"]["by_source"].items() if count}
    steps = [
        ("Views", "up to five views of the picture, each a grid of tokens"),
        ("Score", ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "as its config says"),
        ("Keep", f"the best at a fixed budget: {', '.join(f'{n:.0f} {name}' for name, n in sources.items())}"),
        ("Project, cache", "in reading order; keys and values are written once"),
        ("Denoise", "every step reads the same prefix"),
    ]
    points = ["Score each token once, keep the best, add a coarse scaffold so that no region goes blank."]
    trained = row["trainable parameters"]
    share = f"{trained:,} trained parameters, {trained / result['model']['parameters']:.2%} of the model."
    points.append(share if trained else "Nothing is trained in this row.")
    if row.get("select ms") is not None and row.get("total ms"):
        points.append(f"Choosing takes {row['select ms']:.2f} of {row['total ms']:.2f} ms for a sample.")
    slides.add(f"SHIRG: {story.name(row)}", points).flow(steps, accent=1)


def results(slides: Slides, story: DeckFacts) -> None:
    kinds = ("score", "difference")
    shown = [c for c in columns(story.rows) if c.kind in kinds or c.title == "visual tokens"]
    shown = [c for c in shown if c.title != "recall" and not c.title.endswith(f"vs {UNABLATED}")]
    whole = len(shown) < NARROW
    cells = [c.texts if whole else [text.split(" [")[0] for text in c.texts] for c in shown]
    table = [[name, *values] for name, *values in zip(story.names, *cells, strict=True)]
    told = [(row, story.against_baseline(row)) for row in (story.ours, story.full) if row]
    points = [f"{story.name(row)}: {text}." for row, text in told if text]
    points.append("Scores in %, differences in points on the same samples; intervals: report.html, table.tex.")
    bold = [i for i, row in enumerate(story.rows) if row is story.ours]
    slides.add("Results", points).table(["system", *(c.title for c in shown)], table[:MOST_ROWS], bold)


def efficiency(slides: Slides, story: DeckFacts, figures: Mapping[str, ReportFigure]) -> None:
    points = []
    if story.ours and story.pooled and story.ours.get("total ms") and story.pooled.get("total ms"):
        ours, theirs = (f"{row['total ms']:.2f} ms" for row in (story.ours, story.pooled))
        points.append(f"{story.name(story.ours)}: {ours} for a sample; {story.name(story.pooled)}: {theirs}.")
    points.append(f"On {story.rows[0]['env device']}, {story.rows[0]['env dtype']}: medians over batches.")
    if "memory" not in figures:
        points.append("No accelerator memory: this ran on a CPU; device=cuda measures it.")
    _with_figure(slides, "Where the time goes", points, figures, "latency", "memory")


def ablations(slides: Slides, story: DeckFacts, figures: Mapping[str, ReportFigure]) -> None:
    if "ablations" in figures:
        points = ["Each row takes one part away; differences to the whole method.", *story.extremes(UNABLATED)]
        _with_figure(slides, "Ablations", points, figures, "ablations")
        return
    points = ["No ablations in this study; instead, all differences.", *story.extremes(BASELINE)]
    _with_figure(slides, f"Differences to {BASELINE}", points, figures, "differences")


def failures(slides: Slides, story: DeckFacts) -> None:
    title = "Where it fails"
    if not (story.ours and story.pooled):
        slide = slides.add(title, [story.missing("selector=pooled,shirg", "a pair to compare")])
        slide.remark("There is no pair of systems to compare.")
        return
    ours, theirs = story.right(story.ours), story.right(story.pooled)
    both = ours.keys() & theirs.keys()
    broken = sorted(i for i in both if theirs[i] and not ours[i])
    fixed = sum(ours[i] and not theirs[i] for i in both)
    names = f"{story.name(story.ours)} against {story.name(story.pooled)}"
    points = [f"{names}: {fixed} answers fixed, {len(broken)} broken of {len(both)}."]
    recall = story.recall(story.ours)
    lost = [recall[i] for i in broken if i in recall]
    if lost:
        points.append(f"Evidence kept where broken: {sum(lost) / len(lost):.0%}, n = {len(lost)}.")
        points.append(f"Evidence kept in all: {sum(recall.values()) / len(recall):.0%}, n = {len(recall)}.")
    slide = slides.add(title, points)
    drawn = [shot for i, shot in story.shots(story.ours).items() if i in broken][:MOST_SHOTS]
    if drawn:
        slide.pictures([(shot.overlay, _answered(shot.record)) for shot in drawn])
    elif broken:
        rows = story.said(broken[:MOST_ROWS], story.ours, story.pooled)
        slide.table(["question", "expected", "said", f"{BASELINE} said"], rows)
    else:
        slide.remark("Nothing was broken.")


def roadmap(slides: Slides, story: DeckFacts) -> None:
    seeds = min(len(row["seeds"].split()) for row in story.rows)
    sets = {row["dataset"] for row in story.rows}
    trained = all(story.result(row)["model"]["trained"] for row in story.rows)
    size = story.detectable()
    table = [
        *([f"data: {name}", "in this study" if name in sets else "not in this study"] for name in BENCHMARKS),
        ["other data", ", ".join(sorted(sets - set(BENCHMARKS))) or "none"],
        ["seeds for each system", str(seeds)],
        ["difference that may be missed", "-" if size is None else f"{size:.1f} points"],
        ["rows at another budget", str(sum(unequal(row) for row in story.rows))],
        ["weights", "trained" if trained else "random: answers mean nothing"],
        ["device", story.rows[0]["env device"]],
    ]
    known = "Intervals hold for a new training seed." if seeds > 2 else "Three seeds and more of each training."
    points = [
        "First what the table on the right lacks.",
        known,
        "Then with a shorter cache: cache=... cuts what is kept.",
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
    said = printable(str(record["prediction"])) or "(empty)"
    return f"{printable(str(record['question']), LONGEST_QUESTION)}\nexpected {expected}\nsaid {said}"
