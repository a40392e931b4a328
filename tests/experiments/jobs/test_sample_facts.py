"""Data that changes under a job: answers belong to the samples that they were given to, and intervals to pictures."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.analysis.aggregate import summarise
from experiments.analysis.stats import cluster_bootstrap
from experiments.build import build_dataset, compose_eval
from experiments.data.folder import Folder
from experiments.data.synthetic.entitygrid.entitygrid_files import digests
from experiments.jobs.sample_facts import changes, content_of, describe, facts_of
from experiments.jobs.sample_rows import SampleColumns, digests_of, read_scores
from tests.data import official
from tests.experiments.conftest import journaled, lasting, result_of, rows_of
from tests.experiments.planting import plant

Eval = Callable[..., Path]
Folders = Callable[..., Path]
WORDS = ("data=folder", "selector=pooled", "shots=2", "study=s")


def lines_of(data: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]


def write_lines(data: Path, lines: list[dict[str, object]]) -> None:
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_line(data: Path, number: int, **fields: object) -> None:
    lines = lines_of(data)
    lines[number] |= fields
    write_lines(data, lines)


def replace_picture(data: Path) -> None:
    Image.new("RGB", (90, 60), "red").save(data / "1.png")


def remove_line(data: Path) -> None:
    write_lines(data, lines_of(data)[:-1])


def add_line(data: Path) -> None:
    write_lines(data, [*lines_of(data), lines_of(data)[0] | {"id": "more"}])


CHANGES = {
    "answers": (lambda data: change_line(data, 2, answers=["two"]), "2.png#0 has another answers;"),
    "question": (lambda data: change_line(data, 0, question="why?"), "0.png#0 has another question and prompt;"),
    "a picture": (replace_picture, "1.png#0 has another picture;"),
    "a sample less": (remove_line, "3.png#0 is gone;"),
    "a sample more": (add_line, "more is new;"),
    "all": (
        lambda data: write_lines(data, [line | {"answers": ["new"]} for line in lines_of(data)]),
        "0.png#0 has another answers; 1.png#0 has another answers; 2.png#0 has another answers; 4 samples in all;",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_finished_job_is_not_skipped_when_its_data_has_changed(
    kind: str, picture_folder: Folders, eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    data = picture_folder("data", ["what?"] * 4)
    words = (*WORDS, f"data.root={data}")
    job = eval_here(*words)
    eval_here(*words, "resume=true")
    assert "finished already\n" in capfd.readouterr().out
    change, sentence = CHANGES[kind]
    change(data)
    eval_here(*words, "resume=true", ok=False)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"the data has changed since this job answered it: {sentence}" in line and "overwrite=true answers" in line
    eval_here(*words, "overwrite=true")
    eval_here(*words, "resume=true")
    assert len(rows_of(job)) == len(lines_of(data))


def test_a_finished_job_without_its_data_is_skipped_with_a_word(
    picture_folder: Folders, eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    data = picture_folder("data", ["what?"] * 4)
    words = (*WORDS, f"data.root={data}")
    eval_here(*words)
    data.rename(data.with_name("elsewhere"))
    eval_here(*words, "resume=true")
    assert "finished already; its data cannot be compared (data folder" in capfd.readouterr().out


@pytest.mark.parametrize("kind", CHANGES)
def test_a_stopped_job_ends_as_an_undisturbed_one_on_the_data_of_now(
    kind: str, picture_folder: Folders, eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last picture cannot be read; the job stops there, and everything else changes before it goes on."""
    data = picture_folder("data", ["what?"] * 4)
    whole = (data / "3.png").read_bytes()
    words = (*WORDS, f"data.root={data}", "batch_size=1")
    (data / "3.png").write_bytes(b"broken")
    job = eval_here(*words, ok=False)
    assert len(journaled(job / "journal.arrow")) == 3
    (data / "3.png").write_bytes(whole)
    CHANGES[kind][0](data)
    capfd.readouterr()
    eval_here(*words, "resume=true")
    kept = {"answers": 2, "question": 2, "a picture": 2, "all": 0}.get(kind)
    said = f"{kept} of its 3 answers are kept" in capfd.readouterr().out
    assert said is (kept is not None)
    calm = eval_here(*words, "study=calm")
    assert rows_of(job) == rows_of(calm)
    ours, theirs = (lasting(result_of(folder)) for folder in (job, calm))
    assert {**ours, "study": "", "command": "", "overrides": [], "config": {}} == {
        **theirs,
        **{"study": "", "command": "", "overrides": [], "config": {}},
    }


def test_a_removed_row_leaves_no_undrawn_answer(
    picture_folder: Folders, eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    """With limit= another sample is drawn for the one that is gone, and batches shift."""
    data = picture_folder("data", ["what?"] * 20)
    words = (*WORDS, f"data.root={data}", "limit=12", "batch_size=4")
    drawn = [row["id"] for row in rows_of(eval_here(*words, "study=before"))]
    bad = drawn[9].partition("#")[0]
    whole = (data / bad).read_bytes()
    (data / bad).write_bytes(b"broken")
    job = eval_here(*words, ok=False)
    assert f"{bad}: cannot be read as a picture" in capfd.readouterr().err
    write_lines(data, [line for line in lines_of(data) if line["file_name"] != bad])
    (data / bad).write_bytes(whole)
    eval_here(*words, "resume=true")
    calm = eval_here(*words, "study=calm")
    assert rows_of(job) == rows_of(calm) and len(rows_of(job)) == 12
    assert result_of(job)["data"] == result_of(calm)["data"]
    assert bad not in {row["picture"] for row in rows_of(job)}


def test_pictures_without_names_are_told_apart_by_content(tmp_path: Path, eval_here: Eval) -> None:
    """ChartQA from the hub: 24 questions about 4 pictures, none of which has a name."""
    columns = {
        "query": [f"what is {i}?" for i in range(24)],
        "label": [["1"]] * 24,
        "human_or_machine": [0] * 24,
        "image": [official.picture(2 * (i % 4)) for i in range(24)],
    }
    root = official.hub("chartqa", tmp_path / "hub", "test", 24, columns)
    job = eval_here("data=chartqa", f"data.hub={root}", "selector=pooled", "study=s", "shots=0")
    assert len({row["picture"] for row in rows_of(job)}) == 24
    digests = [row["picture_digest"] for row in rows_of(job)]
    assert digests[:4] * 6 == digests and len(set(digests)) == 4
    plant(job, lambda i: i % 4 == 0)
    score = summarise(SampleColumns(job / "samples.parquet"), ("exact_match",), {})["quality"]["metrics"]["exact_match"]
    values = np.asarray([float(i % 4 == 0) for i in range(24)])
    assert (score["low"], score["high"]) == cluster_bootstrap(values, [i % 4 for i in range(24)])
    assert {s.picture for s in read_scores(job / "samples.parquet", "exact_match").values()} == set(digests)


def test_another_draft_is_another_sample(picture_folder: Folders) -> None:
    one = Folder(root=picture_folder("data", ["what?"], draft="A [MASK:1]"))[0]
    other = replace(one, draft="B [MASK:1]")
    ours, theirs = digests_of([facts_of(one)]), digests_of([facts_of(other)])
    assert [kind for kind, value in ours.items() if value != theirs[kind]] == ["drafts"]
    assert describe(changes([dict(facts_of(one))], [other])) == "0.png#0 has another draft"
    assert changes([{k: v for k, v in facts_of(one).items() if k != "draft"}], [other]) == [], "not known then"


@pytest.mark.parametrize("source", official.SOURCES)
@pytest.mark.parametrize("name", (*official.BENCHMARKS, "entitygrid"))
def test_the_content_of_a_benchmark_is_that_of_its_files(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files elsewhere are the same data; one other answer, or a picture of another size, is not."""

    def content(folder: str) -> str | None:
        if name == "entitygrid":
            return content_of(build_dataset(compose_eval(*_probe(source, tmp_path / folder))))
        return content_of(build_dataset(compose_eval(*official.write(name, source, tmp_path / folder))))

    before = content("a")
    assert before is not None and re.fullmatch("[0-9a-f]{16}", before) and content("b") == before
    given = official.answers
    monkeypatch.setattr(official, "answers", lambda n, i: given(n, 0) if i == 5 else given(n, i))
    assert content("c") != before
    monkeypatch.setattr(official, "answers", given)
    monkeypatch.setattr(official, "picture", lambda i: Image.effect_noise((40, 31), 60).convert("RGBA"))
    assert content("d") != before


def _probe(source: str, root: Path) -> list[str]:
    """Writes rows of the probe's form, with the questions and pictures of the other benchmarks."""
    words = ["data=entitygrid", f"data.source={source}", "data.split=val"]
    columns = official.table("docvqa", 4)
    rows = [
        {"id": str(i), "question": official.question(i), "answers": official.answers("docvqa", i + 3)} for i in range(4)
    ]
    if source == "hub":
        given = {key: [row[key] for row in rows] for key in rows[0]} | {"image": columns["image"]}
        return [*words, f"data.hub={official.hub('entitygrid', root, 'val', 4, given)}"]
    (root / "val" / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        columns["image"][i].save(root / "val" / "images" / f"{i}.png")
        row["file_name"] = f"images/{i}.png"
    write_lines(root / "val", rows)
    (root / "val" / "manifest.json").write_text(json.dumps(digests(root / "val")))
    return [*words, f"data.root={root}"]


def test_what_a_row_does_not_tell_is_no_change(picture_folder: Folders) -> None:
    """Rows of older studies have neither boxes nor sizes nor digests."""
    data = Folder(root=picture_folder("data", ["what?"] * 2))
    samples = [data[0], data[1]]
    old = [{"id": sample.id, "question": sample.question, "answers": list(sample.answers)} for sample in samples]
    assert changes(old, samples) == []
    assert changes(list(map(facts_of, samples)), samples) == []
    assert describe(changes([old[0] | {"question": "?"}], samples)) == "0.png#0 has another question; 1.png#0 is new"
