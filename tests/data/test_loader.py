"""Streams, mixtures and batches: they depend on the step alone, whoever draws them and however many share them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from experiments import build
from experiments.data.folder import Folder
from experiments.data.loader import ROUND, Batches, Mixture, Shuffled, collate
from experiments.data.synthetic.glyphs import SynthGlyphs
from tests.experiments.test_configs import composed


def glyphs(n: int = 24, per_picture: int = 3) -> SynthGlyphs:
    return SynthGlyphs(split="train", n=n, density="train", qa_per_image=per_picture)


def order(seed: int = 0, n: int = 24, *, n_positions: int = 72, first: int = 0) -> list[int]:
    shuffled = Shuffled(glyphs(n), seed)
    return [shuffled.index(position)[1] for position in range(first, n_positions)]


def test_a_position_has_one_sample_wherever_one_starts() -> None:
    assert order(1, first=40) == order(1)[40:]
    assert order(2) != order(1)


def test_two_folders_of_one_name_keep_their_pictures(tmp_path: Path) -> None:
    """chart/train and doc/train both have 0.png: a batch of a mixture must not show one for the other."""
    samples = []
    for place, colour in (("chart", "red"), ("doc", "blue")):
        folder = tmp_path / place / "train"
        folder.mkdir(parents=True)
        Image.new("RGB", (30, 30), colour).save(folder / "0.png")
        line = {"file_name": "0.png", "question": "which colour?", "answers": [colour]}
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        samples.append(Folder(root=folder)[0])
    assert samples[0].dataset == samples[1].dataset and samples[0].id == samples[1].id
    batch = collate([*samples, samples[0]])
    seen = [image.getpixel((15, 15)) for image in batch.images if isinstance(image, Image.Image)]
    assert seen == [(255, 0, 0), (0, 0, 255), (255, 0, 0)] and batch.answers == ["red", "blue", "red"]
    assert batch.images[0] is batch.images[2]


def test_every_epoch_holds_every_sample_once_in_a_new_order() -> None:
    found = order()
    epochs = [found[24 * e : 24 * (e + 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_questions_of_a_picture_stay_together_and_share_its_object() -> None:
    found = order()
    assert [i // 3 for i in found[::3]] == [i // 3 for i in found[2::3]]
    batch = Batches(Shuffled(glyphs(), 0), 6)(0)
    assert len({id(image) for image in batch.images}) == 2
    assert len(set(batch.ids)) == 6


def test_a_last_picture_with_fewer_questions_does_not_break_an_epoch() -> None:
    assert set(order(n=10, n_positions=15)) == set(range(10))


def test_processes_share_the_batch_of_one() -> None:
    stream = Shuffled(glyphs(), 0)
    whole = Batches(stream, 6)
    for world in (2, 3):
        parts = [Batches(stream, 6, rank=rank, world=world) for rank in range(world)]
        for step in range(6):
            assert [position for part in parts for position in part.positions(step)] == list(whole.positions(step))


def test_collate_takes_the_first_answer_and_the_prompt_with_its_suffix() -> None:
    dataset = SynthGlyphs(split="train", n=3, density="train", qa_per_image=3, suffix=" now")
    batch = collate([dataset[i] for i in range(3)])
    assert batch.prompts == [f"{question} now" for question in batch.questions]
    assert list(batch.answers) == [dataset[i].answers[0] for i in range(3)]


def mixture(weights: dict[str, float], seed: int = 0) -> Mixture:
    return Mixture(parts={name: glyphs(30) for name in weights}, weights=weights, seed=seed)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"a": 1, "b": 3}, {"a": 2500, "b": 7500}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 3334, "b": 3333, "c": 3333}),
        ({"a": 0.2}, {"a": ROUND}),
        ({"a": 558_000, "b": 1}, {"a": 10_000}),
    ],
)
def test_every_round_has_the_shares(weights: dict[str, float], counts: dict[str, int]) -> None:
    mixed = mixture(weights)
    for number in (0, 3):
        found = [mixed.origin(position)[0] for position in range(number * ROUND, (number + 1) * ROUND)]
        assert Counter(found) == counts
        assert len(counts) == 1 or len(set(found[:50])) > 1, "shares must be spread over the round"


def test_parts_go_through_their_own_epochs() -> None:
    """Across the end of a round no position of a part is taken twice or left out."""
    mixed = mixture({"a": 1, "b": 3})
    positions: dict[str, list[int]] = {"a": [], "b": []}
    for position in range(ROUND - 400, ROUND + 400):
        name, own = mixed.origin(position)
        positions[name].append(own)
    for found in positions.values():
        assert found == list(range(found[0], found[0] + len(found)))


def test_a_mixture_has_one_sample_at_a_position() -> None:
    first, second = mixture({"a": 1, "b": 2}), mixture({"a": 1, "b": 2})
    later = [second(position).id for position in range(ROUND + 5, ROUND + 25)]
    assert [first(position).id for position in range(ROUND + 25)][-20:] == later
    other = mixture({"a": 1, "b": 2}, seed=1)
    assert [other.origin(p)[0] for p in range(50)] != [first.origin(p)[0] for p in range(50)]


def test_a_part_without_weight_need_not_exist() -> None:
    cfg = composed("train", "data=mixture", "data.weights.own=0", "data.parts.own.root=nowhere")
    parts = build.build_parts(cfg)
    assert list(parts) == ["glyphs"]
    assert build.build_stream(cfg, parts)(0).dataset == "synth_glyphs"
