"""From a batch to rows: what is fed is what the selector owes, on every shape of picture."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from experiments.jobs.sample_rows import SampleRow
from experiments.lmms_eval.lmms_results import sample as exported_sample
from experiments.token_stats import TokenGeometry, check_counts
from lavida_adapter import Lavida, LavidaConfig, Prefix
from lavida_adapter.prompt import IMAGE, training_example
from tests.experiments.conftest import result_of, rows_of

Eval = Callable[..., Path]
SHAPES = {"square": (900, 900), "page": (850, 1100), "wide": (1600, 900), "icon": (90, 90), "tall": (80, 700)}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    folder.mkdir()
    lines = []
    for name, size in SHAPES.items():
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
        lines.append(f'{{"file_name": "{name}.png", "question": "what?", "answers": ["it"], "id": "{name}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("model", ["small", "small_dream"])
def test_true_geometry_on_pictures_of_all_shapes(model: str, eval_here: Eval, shapes: Path) -> None:
    """By hand: 196 pooled tokens of the base view, then rows x (columns + newline) of the mosaic without padding."""
    common = (f"model={model}", "data=folder", f"data.root={shapes}", "batch_size=3", "data.max_new_tokens=2")
    jobs = {
        name: eval_here(*common, *overrides)
        for name, overrides in {
            "pooled": ["selector=pooled"],
            "matched": ["selector=random", "budget=matched"],
            "base": ["selector=shirg"],
            "full": ["selector=full"],
        }.items()
    }
    counts = {
        name: {r["id"]: r["n_visual"] for r in pq.read_table(job / "samples.parquet").to_pylist()}
        for name, job in jobs.items()
    }
    assert counts["pooled"]["square"] == 196 + 28 * 29
    assert counts["pooled"]["page"] == 196 + 28 * 23
    assert counts["pooled"]["wide"] == 196 + 16 * 29
    assert counts["pooled"]["icon"] == 196 + 14 * 15
    assert counts["matched"] == counts["pooled"]
    assert set(counts["base"].values()) == {980}
    assert counts["full"]["square"] == 729 + 54 * 55
    assert result_of(jobs["base"])["tokens"]["by_source"]["scaffold"] == 64
    shown = [Image.open(path).size for path in sorted((jobs["base"] / "shots").glob("*_kept.jpg"))]
    assert len(shown) == len(SHAPES)


def test_a_prompt_that_is_too_long_is_found_before_any_answer(
    eval_here: Eval, picture_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """A character is a token of the tiny model, whose context has 4,096."""

    def words(*lengths: int) -> list[str]:
        folder = picture_folder("-".join(map(str, lengths)), ["a" * length for length in lengths])
        return ["data=folder", f"data.root={folder}", "batch_size=1", "data.max_new_tokens=4"]

    def refused(length: int) -> int:
        """Refuses the second of two questions; returns how many tokens it has beyond the context."""
        job = eval_here(*words(3, length), ok=False)
        (line,) = capfd.readouterr().err.splitlines()
        found = re.search(
            r"1.png#0: (\d+) tokens of text, at least 80 of the picture and 4 of the answer do not fit", line
        )
        assert found and not list(job.glob("*.arrow*")) and not (job / "samples.parquet").exists()
        return int(found[1]) + 80 + 4 - 4096

    surplus = refused(4090)
    assert refused(4090 - surplus + 1) == 1
    (row,) = rows_of(eval_here(*words(4090 - surplus)))
    assert row["n_prefix"] == 4096 - 4


def test_a_count_that_is_not_owed_stops_the_job() -> None:
    from baselines import Pooled, Random

    geometry = TokenGeometry(LavidaConfig())
    good = {"kept": 980, "scaffold": 0, "newline": 0}
    check_counts(Random(budget=980), good, 980, geometry, (900, 900), "s")
    with pytest.raises(RuntimeError, match="the selector gave 980 tokens, the prefix has 979"):
        check_counts(Random(budget=980), good, 979, geometry, (900, 900), "s")
    with pytest.raises(RuntimeError, match="kept 979 tokens, expected 980 \\(budget=980\\)"):
        check_counts(Random(budget=980), good | {"kept": 979}, 979, geometry, (900, 900), "s")
    with pytest.raises(RuntimeError, match="kept 980 tokens, expected 1008 \\(budget=matched\\)"):
        check_counts(Random(budget="matched"), good, 980, geometry, (900, 900), "s")
    check_counts(Pooled(), good, 980, geometry, (900, 900), "s")


def test_geometry_knows_the_finest_token_and_leaves_padding_out() -> None:
    """A 16:9 picture on the 2 x 2 canvas is 768 pixels wide there, 432 high, and a cell is 14 pixels."""
    placed = TokenGeometry(LavidaConfig())((1600, 900))
    assert placed.layout.canvas == (54, 54)
    box = placed.box_N4[placed.eligible_N]
    assert float(box.min()) > -0.04 and float(box.max()) < 1.04
    assert placed.fine_area == pytest.approx(14 / 768 * 14 / 432, rel=1e-3)
    assert 54 * 30 <= int(placed.eligible_N.sum()) <= 54 * 32


def test_random_remasking_and_temperature_give_the_same_answers_twice(eval_here: Eval, tmp_path: Path) -> None:
    overrides = ("selector=full", "data.n=12", "decode.remasking=random", "decode.temperature=1.0")
    answers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        job = eval_here(*overrides, f"seed={seed}", root=tmp_path / name)
        answers.append(np.array(pq.read_table(job / "samples.parquet")["prediction"].to_pylist()))
    assert (answers[0] == answers[1]).all()
    assert (answers[0] != answers[2]).any()


def test_a_run_may_change_the_model_s_switches(eval_here: Eval) -> None:
    """The newline behind the picture is one token more."""
    common = ("data.n=6", "selector=pooled", "study=switches")
    folders = [
        eval_here(*common),
        eval_here(*common, "model.drop_token_after_image=false"),
        eval_here(*common, "model.prefix_attention=image_first"),
    ]
    lost, kept, first = (pq.read_table(folder / "samples.parquet").to_pylist() for folder in folders)
    assert [b["n_prefix"] - a["n_prefix"] for a, b in zip(lost, kept, strict=True)] == [1] * 6
    assert [row["n_prefix"] for row in first] == [row["n_prefix"] for row in lost]


ROUNDS = (("What is it?", "A small thing."), ("And how many are there?", "Seven or so."), ("Sure?", "Yes."))


@pytest.fixture
def talks(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes conversations about one picture each; returns the overrides that read all their rounds."""

    def write(*conversations: tuple[tuple[str, str], ...], history: bool) -> list[str]:
        (tmp_path / "images").mkdir(exist_ok=True)
        entries = []
        for i, rounds in enumerate(conversations):
            if not (picture := tmp_path / "images" / f"{i}.png").exists():
                Image.effect_noise((60, 40), 60).convert("RGB").save(picture)
            said = [(who, text) for asked, answer in rounds for who, text in (("human", asked), ("gpt", answer))]
            turns = [{"from": who, "value": text} for who, text in said]
            entries.append({"id": i, "image": f"{i}.png", "conversations": turns})
        (tmp_path / "talks.json").write_text(json.dumps(entries))
        words = ["data=llava", f"data.json={tmp_path / 'talks.json'}", f"data.images={tmp_path / 'images'}"]
        return [*words, "data.rounds=all", f"data.history={str(history).lower()}", "data.max_new_tokens=4", "shots=0"]

    return write


def test_turns_before_a_question_are_asked_as_in_training(
    eval_here: Eval, talks: Callable[..., list[str]], tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is fed for each round is the trained prompt, but for the line break that is lost behind a picture.

    The tokens of the picture are those that the question alone ranks highest.
    """
    fed: list[Prefix] = []
    encode = Lavida.encode
    monkeypatch.setattr(Lavida, "encode", lambda *a, **k: fed.append(encode(*a, **k)) or fed[-1])
    jobs = [eval_here(*talks(ROUNDS, history=history), "selector=shirg") for history in (False, True)]
    alone, told = map(rows_of, jobs)
    model = Lavida.from_pretrained(tiny_weights)
    for i, row in enumerate(told):
        assert row["history"] == [text for pair in ROUNDS[:i] for text in pair]
        asked, answer = ROUNDS[i]
        example = training_example(model.tokenizer, asked, answer, model.config, history=row["history"])
        at = example.prompt.index(IMAGE)
        ids = torch.tensor((*example.prompt[:at], *example.prompt[at + 2 :]))
        text = fed[1].embeds_BPD[i][fed[1].mask_BP[i] & ~fed[1].visual_BP[i]]
        assert torch.equal(text, model.lm.embedding(ids))
        assert row["n_prefix"] == len(ids) + row["n_visual"]
        assert row["kept"] == alone[i]["kept"] and row["kept"]
        exported = exported_sample(i, {**SampleRow(**row), "scores": {}})  # type: ignore[typeddict-item]
        assert exported["input"] == "\n\n".join([*row["history"], asked])
    # The first round is 25 letters, which are a token each, and the headers and ends of two turns.
    assert [row["n_prefix"] - other["n_prefix"] for row, other in zip(told, alone, strict=True)] == [0, 25 + 4, 64]


def test_jobs_with_and_without_the_turns_before_are_told_apart(
    eval_here: Eval, talks: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where a finished job is from a time when evaluation left the turns out: its record has the other digest."""
    words = {history: talks(ROUNDS[:2], history=history) for history in (False, True)}
    alone, told = (eval_here(*words[history]) for history in (False, True))
    plain, prompt = (result_of(job)["data"]["prompt"] for job in (alone, told))
    assert plain != prompt
    for history in (False, True):
        eval_here(*words[history], "resume=true")
    result = result_of(told)
    result["data"]["prompt"] = plain
    (told / "result.json").write_text(json.dumps(result))
    capfd.readouterr()
    eval_here(*words[True], "resume=true", ok=False)
    assert "this job's prompts were made in another way than now; overwrite=true" in capfd.readouterr().err
    eval_here(*words[True], "overwrite=true")
    assert result_of(told)["data"]["prompt"] == prompt


def test_turns_before_a_question_count_where_a_prompt_is_too_long(
    eval_here: Eval, talks: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """The last round that fits fills the context of 4,096 tokens; one letter more in its history is refused."""

    def words(n: int) -> list[str]:
        return talks(((("a" * 2000), "b" * n), ("c", "d")), history=True)

    eval_here(*talks((("a" * 2000, "b" * 3000), ("c", "d")), history=False))
    eval_here(*words(3000), ok=False)
    (line,) = capfd.readouterr().err.splitlines()
    found = re.search(r"0:0#1: (\d+) tokens of text, .* shorten the question or leave out the turns before it", line)
    assert found
    surplus = int(found[1]) + 80 + 4 - 4096
    eval_here(*words(3000 - surplus + 1), ok=False)
    row = rows_of(eval_here(*words(3000 - surplus), "overwrite=true"))[1]
    assert row["n_prefix"] == 4096 - 4
