"""The dataset `synth_glyphs` and its config."""

from collections import Counter
from hashlib import sha256
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.data.sample import Dataset
from experiments.data.synthetic.glyphs import SynthGlyphs, ask, draw_scene
from experiments.data.synthetic.glyphs.scene import COLOUR_RGB
from experiments.data.synthetic.synthetic_dataset import BUCKETS
from experiments.metrics import METRICS

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


def test_the_shipped_config_is_large_enough_to_compare_selectors() -> None:
    data = hydra.utils.instantiate(OmegaConf.load(CONF / "synth_glyphs.yaml"))
    assert isinstance(data, Dataset)
    assert set(data.metric_names) <= set(METRICS) and data.metric_names[0] == "exact_match"
    samples = [data[i] for i in range(len(data))]
    assert len({s.id for s in samples}) == len(samples) == 1536
    groups = Counter((s.meta["density"], s.meta["group"]) for s in samples)
    assert groups == {
        ("sparse", "fine"): 512,
        ("sparse", "guard"): 256,
        ("dense", "fine"): 512,
        ("dense", "guard"): 256,
    }
    assert Counter(s.subtask for s in samples) == {"digit": 512, "letter": 512, "shape_kind": 256, "shape_colour": 256}
    assert all(n == 6 for n in Counter(s.meta["picture"] for s in samples).values())
    assert {s.split for s in samples} == {"test"}


def test_a_sample() -> None:
    sample = SynthGlyphs(split="val", n=3, density="hard", seed=4, suffix="\nOne word.")[0]
    assert sample.id.startswith("val-4-hard-00000-digit-")
    assert sample.dataset == "synth_glyphs"
    assert sample.prompt == sample.question + "\nOne word."
    assert len(sample.boxes) == len(sample.answers) == 1
    picture = sample.load_image()
    assert picture.mode == "RGB" and picture.size == sample.size == (128, 128)


def test_ids_mean_the_same_sample_whatever_else_is_in_the_set() -> None:
    alone = SynthGlyphs(split="test", n=30, density="dense")
    mixed = SynthGlyphs(split="test", n=60, density=["sparse", "dense"])
    by_id = {mixed[i].id: mixed[i] for i in range(60)}
    for i in range(30):
        assert by_id[alone[i].id].answers == alone[i].answers
        assert by_id[alone[i].id].load_image().tobytes() == alone[i].load_image().tobytes()


def test_the_box_is_where_the_evidence_is() -> None:
    """The colour that is asked for, or answered, fills part of the box."""
    data = SynthGlyphs(split="test", n=60, density="sparse")
    for sample in (data[i] for i in range(60)):
        if sample.subtask == "shape_kind":
            continue
        name = sample.question.split()[1] if sample.subtask == "digit" else sample.answers[0]
        picture = np.asarray(sample.load_image()) / 255
        x0, y0, x1, y1 = (round(128 * edge) for edge in sample.boxes[0])
        wanted = np.array(COLOUR_RGB[name]) * (0.45 if sample.subtask == "shape_colour" else 1)
        near = (abs(picture[y0:y1, x0:x1] - wanted) < 0.2).all(axis=-1)
        assert near.mean() > (0.1 if sample.meta["group"] == "fine" else 0.3)


def test_tasks_choose_what_is_asked() -> None:
    data = SynthGlyphs(split="test", n=12, density="sparse", tasks=("shape",), qa_per_image=2)
    assert {data[i].meta["group"] for i in range(12)} == {"guard"}


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="noise"):
        SynthGlyphs(split="test", n=6, density="sparse", noise=1)  # type: ignore[call-arg]


TODAY = "651c74222b903cc1"
"""Digest of samples from before questions could leave words out."""


def facts(data: SynthGlyphs, pixels: bool = False) -> str:
    """A digest of ids, questions, answers and boxes, and of every picture if wanted."""
    digest = sha256()
    for sample in (data[i] for i in range(len(data))):
        digest.update(repr((sample.id, sample.prompt, sample.answers, sample.boxes, sample.meta)).encode())
        if pixels:
            digest.update(sample.load_image().tobytes())
    return digest.hexdigest()[:16]


def test_without_words_left_out_samples_are_what_they_were() -> None:
    plain = SynthGlyphs(split="val", n=72, density="sparse,dense,hard", leave_out=[], only=[])
    assert facts(plain, pixels=True) == TODAY


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_words_are_left_out_of_questions_and_asked_alone(split: str) -> None:
    """As many samples as before, of scenes that are in their split alone; the words can still be answers."""
    densities = "sparse,dense,hard"
    words = {"red", "K"}
    rest = SynthGlyphs(split=split, n=240, density=densities, leave_out=["red", "K"])
    asked = [rest[i] for i in range(240)]
    assert len({s.id for s in asked}) == 240 and not words & {s.question.split()[1] for s in asked}
    assert "red" in {s.answers[0] for s in asked}
    plain = SynthGlyphs(split=split, n=240, density=densities)
    assert [s.meta["picture"] for s in asked] == [plain[i].meta["picture"] for i in range(240)]

    only = SynthGlyphs(split=split, n=120, density=densities, only=["red", "K"], qa_per_image=2)
    held = [only[i] for i in range(120)]
    assert len({s.id for s in held}) == 120
    assert [s.question for s in held] == ["digit red", "letter K"] * 60
    assert facts(only) == facts(SynthGlyphs(split=split, n=120, density=densities, only=["K", "red"], qa_per_image=2))
    for sample, key in ((s, only._scene(i // 2)) for i, s in enumerate(held)):
        scene = draw_scene(*key)
        assert scene.digest % 100 in BUCKETS[split]
        assert ask(scene, *sample.question.split()).answer == sample.answers[0]
    ranks = sorted(range(120), key=lambda i: held[i].id)
    assert [only.at_rank(rank) for rank in range(120)] == ranks


def test_a_hard_picture_drawn_for_its_letters_has_another_name() -> None:
    only = SynthGlyphs(split="val", n=20, density="hard", only=["K"], qa_per_image=1)
    plain = SynthGlyphs(split="val", n=20, density="hard", tasks=["letter"], qa_per_image=1)
    assert only[0].meta["picture"] == "val-0-hard-00000-1ofK"
    assert not {only[i].meta["picture"] for i in range(20)} & {plain[i].meta["picture"] for i in range(20)}
    most = SynthGlyphs(split="val", n=20, density="hard", tasks=["letter"], qa_per_image=1, leave_out=["K", "L"])
    assert most[0].meta["picture"] == plain[0].meta["picture"]  # ten of its twelve letters are left at least
