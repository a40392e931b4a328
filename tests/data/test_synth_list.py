"""`data=synth_list`: several glyphs in one answer, each with its box."""

from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from experiments.data.sample import Dataset
from experiments.data.synthetic.glyphs import SynthGlyphs, SynthList, ask, draw_scene
from experiments.data.synthetic.synthetic_dataset import BUCKETS
from experiments.data.synthetic.tokenizer import build_tokenizer
from experiments.metrics import METRICS

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pieces_are_those_of_single_questions_in_the_order_of_the_question(split: str) -> None:
    data = SynthList(split=split, n=120, density="sparse,dense,hard", pieces=6)
    samples = [data[i] for i in range(120)]
    assert len({s.id for s in samples}) == 120 and {s.split for s in samples} == {split}
    for i, sample in enumerate(samples):
        task, listed = sample.question.split()
        words = listed.split(",")
        pieces = sample.answers[0].split()
        assert len(words) == len(set(words)) == len(pieces) == len(sample.boxes) == 6
        assert sample.subtask == f"{task}s" == ("digits", "letters")[i % 2]
        scene = draw_scene(*data._scene(i // 4))
        assert scene.digest % 100 in BUCKETS[split]
        for word, piece, box in zip(words, pieces, sample.boxes, strict=True):
            question = ask(scene, task, word)
            assert (question.answer, question.box) == (piece, box)


def test_pictures_are_those_of_single_questions() -> None:
    lists = SynthList(split="val", n=24, density="sparse,hard", qa_per_image=2)
    single = SynthGlyphs(split="val", n=24, density="sparse,hard", qa_per_image=2)
    for i in range(24):
        assert lists[i].meta["picture"] == single[i].meta["picture"]
        assert lists[i].load_image().tobytes() == single[i].load_image().tobytes()


@pytest.mark.parametrize("name", ["synth_list", "synth_list_train"])
def test_an_answer_has_eight_to_sixteen_tokens_and_fits(name: str) -> None:
    data = hydra.utils.instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), {"seed": 0}))
    assert isinstance(data, Dataset) and set(data.metric_names) <= set(METRICS)
    tokenizer = build_tokenizer()
    for sample in (data[i] for i in range(12)):
        assert len(tokenizer.encode(sample.answers[0], add_special_tokens=False)) == 11 < data.max_new_tokens
        assert len(tokenizer.encode(sample.question, add_special_tokens=False)) == 12


@pytest.mark.parametrize("pieces", [4, 8])
def test_more_or_fewer_pieces(pieces: int) -> None:
    data = SynthList(split="val", n=8, density="hard", pieces=pieces)
    assert {len(data[i].answers[0].split()) for i in range(8)} == {pieces}
