"""Which samples of a dataset a job answers, and that no others are drawn."""

import pickle

import pytest

from experiments.build import build_dataset, compose_eval
from experiments.data.chosen_samples import choose_samples, shard_of
from experiments.data.sample import draw_ids
from experiments.data.synthetic.glyphs import SynthGlyphs, glyph_dataset
from experiments.data.synthetic.grid import SynthGrid
from experiments.data.synthetic.synthetic_dataset import SyntheticDataset
from shirg import UserError

OPTIONS = {
    "synth_glyphs": ["data.n=100"],
    "synth_chart": ["data.n=51", "data.qa_per_image=4"],
    "synth_doc": ["data.n=41", "data.density=sparse"],
    "synth_grid": ["data.n=30"],
    "synth_shapes": ["data.n=7", "data.tasks=[any]"],
    "synth_mix_train": ["data.n=77", "data.split=train"],
}


def synthetic(name: str) -> SyntheticDataset:
    dataset = build_dataset(compose_eval(f"data={name}", *OPTIONS[name]))
    assert isinstance(dataset, SyntheticDataset)
    return dataset


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_are_those_of_the_sorted_ids(name: str) -> None:
    dataset = synthetic(name)
    ids = [dataset[i].id for i in range(len(dataset))]
    assert [dataset.at_rank(rank) for rank in range(len(ids))] == sorted(range(len(ids)), key=ids.__getitem__)


@pytest.mark.parametrize("name", ["synth_glyphs", "synth_mix_train"])
@pytest.mark.parametrize(("limit", "seed"), [(1, 0), (8, 3), (60, 1), (None, 0), (1000, 0)])
def test_the_samples_are_those_that_all_ids_give(name: str, limit: int | None, seed: int) -> None:
    dataset = synthetic(name)
    everything = [dataset[i].id for i in range(len(dataset))]
    drawn = draw_ids(everything, limit, seed)
    chosen = choose_samples(dataset, limit, seed)
    assert list(chosen.ids) == [name for name in everything if name in drawn] == [sample.id for sample in chosen]


def test_numbers_of_pictures_may_have_more_digits() -> None:
    dataset = SynthGlyphs(split="train", n=100_001, density="sparse", qa_per_image=1)
    last = dataset.picture_id(100_000)
    rank = next(r for r in range(len(dataset)) if dataset.picture_id(dataset._pictures[r]) == last)
    assert sorted(f"{dataset.picture_id(i)}-" for i in range(len(dataset)))[rank] == f"{last}-"
    assert dataset.at_rank(rank) == 100_000


def test_a_limit_draws_its_own_scenes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, rendered = [], []
    draw, render = glyph_dataset.draw_scene, glyph_dataset.to_image
    monkeypatch.setattr(glyph_dataset, "scene_of", lambda *scene: (drawn.append(scene), draw(*scene))[1])
    monkeypatch.setattr(glyph_dataset, "to_image", lambda scene: (rendered.append(scene), render(scene))[1])
    glyph_dataset._asked.cache_clear()
    samples = list(choose_samples(SynthGlyphs(split="test", n=20_000, density=["sparse", "dense"]), 8, 0))
    # One scene for each sample, and the first, which the dataset checks its options with.
    assert len(samples) == 8
    assert len(set(drawn)) <= 9
    assert not rendered
    samples[0].load_image()
    assert len(rendered) == 1


def test_a_sample_holds_no_scene() -> None:
    for name in ("synth_glyphs", "synth_grid"):
        assert len(pickle.dumps(synthetic(name)[0])) < 1000


def test_shards_share_the_samples() -> None:
    chosen = choose_samples(synthetic("synth_glyphs"), 20, 0)
    shards = [shard_of(chosen, i, 3) for i in range(3)]
    assert [sample.id for sample in shards[1]] == list(shards[1].ids) == chosen.ids[1::3]
    assert sorted(name for shard in shards for name in shard.ids) == sorted(chosen.ids)


def test_another_process_gets_the_samples_alone() -> None:
    chosen = choose_samples(synthetic("synth_glyphs"), 3, 0)
    received = pickle.loads(pickle.dumps(chosen))
    assert [sample.id for sample in received] == list(chosen.ids)
    assert received[2].load_image().tobytes() == chosen[2].load_image().tobytes()


def test_two_questions_with_one_id_are_refused() -> None:
    dataset = SynthGrid(split="test", n=40, density="sparse", tasks=["where", "where"], qa_per_image=2)
    for limit in (None, 3):
        with pytest.raises(UserError, match="synth_grid has two samples with the same id"):
            choose_samples(dataset, limit, 0)
