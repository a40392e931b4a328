"""deck.pptx: slides about a study, filled with its rows, figures and examples. What it does not have gets no slide."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.analysis.columns import columns, cost_cell
from experiments.analysis.paired import BASELINE, UNABLATED, other_name
from experiments.analysis.rows import Row, leading, unequal
from experiments.analysis.table import records
from experiments.jobs.sample_rows import RECALL
from experiments.measured_times import is_busy
from experiments.report.answer_browser import RIGHT
from experiments.report.figure_style import ReportFigure
from experiments.report.slide_facts import StudyFacts, share
from experiments.report.slide_graphics import Pictures, SlideTable, Steps
from experiments.report.slide_layout import Slides
from experiments.report.verdict import verdict
from experiments.viz.examples import ExampleRecord, printable

NAME = "deck.pptx"
LONGEST_QUESTION = 60
BENCHMARKS = ("chartqa", "docvqa", "vqav2", "entitygrid")
MOST_ROWS = 12
MOST_PICTURES = 3
MOST_FAILURES = 6
"""Rows of a table of failures."""
ENOUGH_SEEDS = 3


def write_slides(study: Path, frame: pd.DataFrame, drawn: Sequence[ReportFigure]) -> Path:
    """Writes the slides beside the page; the study must have a finished row."""
    facts = StudyFacts(study, records(frame))
    slides = Slides(facts.summary)
    figures = {one.name: one for one in drawn}
    beginning(slides, facts)
    motivation(slides, facts)
    upper_bound(slides, facts, figures)
    selectors(slides, facts)
    method(slides, facts)
    results(slides, facts)
    scores(slides, figures)
    effects(slides, facts, figures)
    efficiency(slides, facts, figures)
    token_maps(slides, figures)
    failures(slides, facts)
    roadmap(slides, facts)
    return slides.save(study / NAME)


def beginning(slides: Slides, facts: StudyFacts) -> None:
    row = facts.ours or facts.rows[0]
    lines = [*facts.identity(), verdict(facts.rows)]
    examples = list(facts.examples(row).values())
    slides.begin(f"Which vision tokens to keep: {facts.study.name}", lines, examples[0].overlay if examples else None)


def motivation(slides: Slides, facts: StudyFacts) -> None:
    rows = [row for row in (facts.pooled, facts.ours) if row]
    examples = [facts.examples(row) for row in rows]
    common = next((i for i in (examples[-1] if examples else ()) if all(i in of_row for of_row in examples)), None)
    if common is None:
        return
    points = ["A diffusion language model reads one prefix cache in every step: its vision tokens are selected once."]
    if facts.pooled:
        before = f" of {facts.full['visual tokens mean']:.0f}" if facts.full else ""
        count = f"{facts.pooled['visual tokens mean']:.0f}{before}"
        points.append(
            f"{BASELINE} passes on {count} tokens, spread evenly over the picture. Which ones should be kept?"
        )
    question = printable(examples[0][common].record["question"], LONGEST_QUESTION)
    images, captions = [examples[0][common].picture], [f"The picture. Question: {question}"]
    for row, of_row in zip(rows, examples, strict=True):
        example = of_row[common]
        images.append(example.overlay)
        captions.append(f"Kept by {facts.name(row)}: {example.record['n_visual']} tokens\n{_answer(example.record)}")
    slides.add("Selected once, read in every step", points, Pictures(images, captions))


def upper_bound(slides: Slides, facts: StudyFacts, figures: Mapping[str, ReportFigure]) -> None:
    full, pooled = facts.full, facts.pooled
    if not full:
        return
    count = f"{facts.name(full)}: {full['visual tokens mean']:.0f} tokens"
    found = facts.against_baseline(full)
    points = [f"{count}; against {BASELINE}, points: {found}." if found else f"{count}."]
    if pooled and pooled.get("total ms") and full.get("total ms"):
        tokens, time = (full[key] / pooled[key] for key in ("visual tokens mean", "total ms"))
        points.append(f"Cost: {tokens:.1f} times the tokens, {time:.1f} times the time for a sample.")
    points.append("Without training on long prefixes this need not be an upper bound: compare rows trained alike.")
    _add_figures(slides, "All tokens: quality and cost", points, figures, "pareto_tokens")


def selectors(slides: Slides, facts: StudyFacts) -> None:
    shown = leading(facts.rows, MOST_ROWS)
    if len(shown) < 2:
        return
    table = []
    for row in shown:
        sources = facts.result(row)["tokens"]["by_source"]
        trained = row["trainable parameters"]
        table.append(
            [
                facts.name(row),
                ", ".join(f"{count:.0f} {source}" for source, count in sources.items() if count),
                "yes" if row.get("relevance ms") else "no",
                f"{trained:,}" if trained else "-",
                _ms(row, "select"),
            ]
        )
    points = [
        f"{len({row['selector'] for row in facts.rows})} selectors, {len(facts.rows)} systems{_some(shown, facts)}.",
        "All select before the prefix is cached; the prefix does not change afterwards.",
    ]
    head = ["system", "tokens passed on", "reads question", "trained parameters", "select ms"]
    slides.add("Selectors compared", points, SlideTable(head, table, _numbers(shown, facts.ours)).turned())


def method(slides: Slides, facts: StudyFacts) -> None:
    if not facts.ours:
        return
    row, result = facts.ours, facts.result(facts.ours)
    sources = {name: count for name, count in result["tokens"]["by_source"].items() if count}
    steps = [
        ("Views", "up to five views of the picture, each a grid of tokens"),
        ("Score", ", ".join(terms_in_use(result["config"]["selector"])) or "see its config"),
        ("Keep", f"the best at a fixed budget: {', '.join(f'{n:.0f} {name}' for name, n in sources.items())}"),
        ("Project, cache", "in reading order; keys and values are written once"),
        ("Denoise", "every step reads the same prefix"),
    ]
    points = ["Score each token once, keep the best, add coarse scaffold tokens so that no region is left out."]
    trained, whole = row["trainable parameters"], result["model"]["parameters"]
    points.append(
        f"An adapter of {trained:,} parameters was trained for it; the model that it belongs to has {whole:,}."
        if trained
        else f"Nothing was trained for it; the model has {whole:,} parameters."
    )
    if row.get("select ms") is not None and row.get("total ms"):
        points.append(f"Selection takes {_ms(row, 'select')} of {_ms(row, 'total')} ms for a sample.")
    slides.add(f"SHIRG: {facts.name(row)}", points, Steps(steps, accent=1))


def terms_in_use(selector: Mapping[str, Any]) -> list[str]:
    """The terms of SHIRG's score that count, with their weights: a weight alone does not turn on the crop term."""
    return [
        f"{name} {weight:g}"
        for name, weight in selector.get("weights", {}).items()
        if weight and not (name == "crop" and selector["crop_term"] == "none")
    ]


def results(slides: Slides, facts: StudyFacts) -> None:
    shown = leading(facts.rows, MOST_ROWS)
    found = columns(shown, facts.rows)
    tokens = [column for column in found if column.title == "visual tokens"]
    deltas = [column for column in found if column.kind == "difference" and other_name(column.title) != UNABLATED]
    # Ratios and scores of cleaned answers have no interval: they stay in the table's files.
    scores = [column for column in found if column.kind == "score" and any(cell.interval for cell in column.cells)]
    wanted = [*tokens, *deltas, *scores]
    head = ["system", *(column.title for column in wanted)]
    rows = [[facts.name(row), *(_in_two_lines(column.texts[i]) for column in wanted)] for i, row in enumerate(shown)]
    table = SlideTable(head, rows, _numbers(shown, facts.ours)).narrowed()
    starred = any(cell.tail for column in deltas for cell in column.cells)
    meaning = "; *: p < 0.05 after Holm's correction" if starred else ""
    points = [f"Scores in %, differences in points on the same samples{meaning}{_some(shown, facts)}."]
    if hidden := len(head) - len(table.head):
        points.append(f"{hidden} more columns are in table.csv.")
    slides.add("Results", points, table.turned())


def scores(slides: Slides, figures: Mapping[str, ReportFigure]) -> None:
    if "scores" in figures:
        _add_figures(slides, figures["scores"].title, [figures["scores"].caption], figures, "scores")


def effects(slides: Slides, facts: StudyFacts, figures: Mapping[str, ReportFigure]) -> None:
    """What each part contributes; without ablations, how the systems differ from the baseline."""
    if "ablations" in figures:
        points = ["Each row removes one part; differences to the whole method.", *facts.extremes(UNABLATED)]
        _add_figures(slides, "Ablations", points, figures, "ablations")
    else:
        points = [f"On the same samples; the largest differences to {BASELINE}:", *facts.extremes(BASELINE)]
        _add_figures(slides, f"Differences to {BASELINE}", points, figures, "differences")


def efficiency(slides: Slides, facts: StudyFacts, figures: Mapping[str, ReportFigure]) -> None:
    points = []
    if facts.ours and facts.pooled and facts.ours.get("total ms") and facts.pooled.get("total ms"):
        ours, theirs = (f"{facts.name(row)}: {_ms(row, 'total')} ms" for row in (facts.ours, facts.pooled))
        points.append(f"For a sample: {ours}; {theirs}.")
    machine = f"{facts.rows[0]['env device']}, {facts.rows[0]['env dtype']}"
    spread = " (quartiles)" if any(row.get("total ms q1") is not None for row in facts.rows) else ""
    points.append(f"On {machine}: medians{spread} over batches after warm-up.")
    if any(is_busy(row.get("waited")) for row in facts.rows):
        points.append("The machine was busy while some of these were timed: their times are too long.")
    _add_figures(slides, "Where the time goes", points, figures, "latency", "memory")


def token_maps(slides: Slides, figures: Mapping[str, ReportFigure]) -> None:
    if "tokens" in figures:
        _add_figures(slides, "Which tokens are kept", [figures["tokens"].caption], figures, "tokens")


def failures(slides: Slides, facts: StudyFacts) -> None:
    """Wrong answers of different kinds: with their pictures where the job drew some, otherwise as a table."""
    if not (facts.ours and facts.pooled):
        return
    scores, others = (facts.scores(row, row["metric"]) for row in (facts.ours, facts.pooled))
    ours, theirs = ({i: score.value >= RIGHT for i, score in found.items()} for found in (scores, others))
    both = sorted(ours.keys() & theirs.keys())
    broken = {i: float(theirs[i] and not ours[i]) for i in both}
    fixed = {i: float(ours[i] and not theirs[i]) for i in both}
    answers, their_answers = facts.answers(facts.ours), facts.answers(facts.pooled)
    examples = facts.examples(facts.ours)
    wrong = [i for i in both if not ours[i]]
    pictured = varied([answers[i] for i in wrong if i in examples], MOST_PICTURES, first=broken)
    listed = varied({_as_read(answers[i]): answers[i] for i in both if broken[i]}.values(), MOST_FAILURES)
    if not (pictured or listed):
        return
    kinds = Counter(answers[i]["subtask"] or "all" for i in both if broken[i])
    names = f"{facts.name(facts.ours)} against {facts.name(facts.pooled)}"
    points = [f"{names}: {share(fixed, scores)} fixed, {share(broken, scores)} broken, of {len(both)} answers."]
    if kinds:
        by_kind = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
        points.append(f"{sum(fixed.values()):.0f} answers fixed, {kinds.total()} broken: {by_kind}.")
    recall = {i: score.value for i, score in facts.scores(facts.ours, RECALL).items()}
    lost = {i: recall[i] for i in both if i in recall and broken[i]}
    if lost:
        points.append(f"Evidence kept where broken: {share(lost, scores)}; in all: {share(recall, scores)}.")
    if pictured:
        slides.add("Where it fails", points, _pictures_of_failures(facts, pictured, theirs))
        return
    rows = [_failed_row(one, their_answers[one["id"]], recall) for one in listed]
    head = ["question", "kind", "expected", "answer", f"answer of {BASELINE}", "evidence kept"]
    slides.add("Where it fails", points, SlideTable(head, rows))


def _pictures_of_failures(
    facts: StudyFacts, failed: Sequence[Mapping[str, Any]], theirs: Mapping[str, bool]
) -> Pictures:
    """What was kept of each picture; of a single one also the picture itself, and what the baseline kept."""
    assert facts.ours and facts.pooled
    examples, others, answers = facts.examples(facts.ours), facts.examples(facts.pooled), facts.answers(facts.pooled)
    images, captions = [], []
    if len(failed) == 1 and failed[0]["id"] in others:
        other = others[failed[0]["id"]]
        images += [other.picture, other.overlay]
        captions += ["The picture; in the box: the evidence", f"Kept by {facts.name(facts.pooled)}"]
    for one in failed:
        images.append(examples[one["id"]].overlay)
        captions.append(_failure(examples[one["id"]], answers[one["id"]], is_right=theirs[one["id"]]))
    return Pictures(images, captions)


def varied(samples: Iterable[Mapping[str, Any]], most: int, first: Mapping[str, float] = {}) -> list[Mapping[str, Any]]:
    """At most so many samples, of kinds and with questions that were not chosen yet where there are some.

    Args:
        first: by id, which samples are taken before all others: those with the largest numbers.
    """
    left, chosen = list(samples), list[Mapping[str, Any]]()
    seen: Counter[tuple[str, str]] = Counter()

    def place(one: Mapping[str, Any]) -> tuple[float, int, int]:
        return -first.get(one["id"], 0.0), seen["kind", one["subtask"]], seen["question", one["question"]]

    while left and len(chosen) < most:
        chosen.append(best := min(left, key=place))
        left.remove(best)
        seen.update((("kind", best["subtask"]), ("question", best["question"])))
    return chosen


def roadmap(slides: Slides, facts: StudyFacts) -> None:
    """How far the study's evidence goes, and what it lacks."""
    seeds = min(1 if row["seeds equal"] else len(row["seeds"].split()) for row in facts.rows)
    sets = {row["dataset"] for row in facts.rows}
    trained = all(facts.result(row)["model"]["trained"] for row in facts.rows)
    size = facts.detectable()
    missing = [name for name in BENCHMARKS if name not in sets]
    table = [
        ["data", ", ".join(sorted(sets))],
        ["benchmarks that are not in it", ", ".join(missing) or "none"],
        ["questions for each system", facts.size],
        ["seeds for each system", str(seeds)],
        ["systems at another budget", str(sum(unequal(row) for row in facts.rows))],
        ["weights", "trained" if trained else "random: answers carry no information"],
        ["device", ", ".join(sorted({row["env device"] for row in facts.rows}))],
    ]
    if size is not None:
        table.insert(4, ["smallest detectable difference", f"{size:.1f} points"])
    points = [f"Intervals are for new pictures{' and a new training seed' if seeds >= ENOUGH_SEEDS else ''}."]
    if seeds < ENOUGH_SEEDS and any(row["trainable parameters"] for row in facts.rows):
        points.append(f"Next: at least {ENOUGH_SEEDS} seeds of each training, so that they are for a new one, too.")
    if not any(row["selector"] == "random" for row in facts.rows):
        points.append("Next: selector=random at the same budget; a selector is useful only if it beats it.")
    slides.add("What is known, what is next", points, SlideTable(["evidence", "state"], table))


def _add_figures(
    slides: Slides, title: str, points: Sequence[str], figures: Mapping[str, ReportFigure], *names: str
) -> None:
    """A slide with those of the figures that the study has; none without any."""
    drawn = [figures[name] for name in names if name in figures]
    if drawn:
        slides.add(title, points, Pictures([one.png for one in drawn]), notes="\n".join(one.caption for one in drawn))


def _some(shown: Sequence[Row], facts: StudyFacts) -> str:
    return f"; the leading {len(shown)} of {len(facts.rows)} systems" if len(shown) < len(facts.rows) else ""


def _numbers(rows: Sequence[Row], wanted: Row | None) -> list[int]:
    return [i for i, row in enumerate(rows) if row is wanted]


def _ms(row: Row, stage: str) -> str:
    """A time as the table has it: the median, and its quartiles where they are known."""
    return cost_cell(row, f"{stage} ms", fine=True).brief


def _in_two_lines(text: str) -> str:
    """A mean, and below it its interval."""
    return text.replace(" [", "\n[")


def _answer(record: Mapping[str, Any]) -> str:
    expected = printable(" | ".join(record["answers"]))
    return f"expected {expected}; answered {printable(record['prediction']) or '(empty)'}"


def _failure(example: ExampleRecord, other: Mapping[str, Any], *, is_right: bool) -> str:
    record = example.record
    kept = f"; evidence kept: {record['recall']:.0%}" if record["recall"] is not None else ""
    theirs = f"{printable(other['prediction']) or '(empty)'} ({'right' if is_right else 'wrong, too'})"
    return f"{printable(record['question'], LONGEST_QUESTION)}{kept}\n{_answer(record)}\n{BASELINE}: {theirs}"


def _as_read(sample: Mapping[str, Any]) -> tuple[str, ...]:
    """What people see of an answer: two that are equal in this are shown once."""
    return sample["question"], sample["subtask"], sample["prediction"], *sample["answers"]


def _failed_row(ours: Mapping[str, Any], other: Mapping[str, Any], recall: Mapping[str, float]) -> list[str]:
    return [
        printable(ours["question"], LONGEST_QUESTION),
        ours["subtask"] or "-",
        printable(" | ".join(ours["answers"])),
        printable(ours["prediction"]) or "(empty)",
        printable(other["prediction"]) or "(empty)",
        f"{recall[ours['id']]:.0%}" if ours["id"] in recall else "-",
    ]
