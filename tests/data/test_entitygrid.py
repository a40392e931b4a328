"""EntityGrid-style questions: where entities are, what is balanced, what is written to files."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.data.sample import Dataset, Sample
from experiments.data.synthetic.entitygrid import EntityGrid
from experiments.data.synthetic.entitygrid.draw import mask_of
from experiments.data.synthetic.entitygrid.entities import FAMILIES, ICONS, SHAPES, SPLITS, Entity, family_of, foils
from experiments.data.synthetic.entitygrid.entitygrid_files import digests, write
from experiments.data.synthetic.entitygrid.placement import Canvas, anchors
from experiments.metrics import entity_match
from experiments.schema import CONF
from shirg import UserError


def grid(**options: Any) -> EntityGrid:
    file = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "entitygrid.yaml"))
    assert isinstance(file, dict)
    return EntityGrid(**{str(k): v for k, v in (file | options).items() if k != "_target_"})


def samples(data: Dataset) -> list[Sample]:
    return [data[i] for i in range(len(data))]


def ink(sample: Sample) -> np.ndarray:
    """Which pixels [H, W] are drawn on."""
    return (np.asarray(sample.load_image()) < 250).any(axis=2)


def test_nine_anchors_of_two_by_two() -> None:
    found = anchors(Canvas(768, 768, 2, 2))
    assert [(a.x, a.y) for a in found] == [(x, y) for y in (192, 384, 576) for x in (192, 384, 576)]
    assert [a.place[0] for a in found] == list("cecejecec")


@pytest.mark.parametrize(
    ("canvas", "places"),
    [
        (Canvas(768, 384, 1, 2), {"centre": 2, "edge": 1}),
        (Canvas(384, 768, 2, 1), {"centre": 2, "edge": 1}),
        (Canvas(1152, 384, 1, 3), {"centre": 3, "edge": 2}),
        (Canvas(300, 200, 2, 3), {"centre": 6, "edge": 7, "junction": 2}),
    ],
)
def test_any_canvas(canvas: Canvas, places: dict[str, int]) -> None:
    assert Counter(a.place for a in anchors(canvas)) == places
    data = grid(canvas=[canvas.width, canvas.height], grid=[canvas.rows, canvas.cols], sizes=[28], entities=4)
    assert {s.size for s in samples(data)} == {(canvas.width, canvas.height)}
    assert data[0].load_image().size == (canvas.width, canvas.height)


def test_questions_are_balanced() -> None:
    every = samples(grid())
    assert len(every) == 16 * 4 * 9 * 4
    assert set(Counter(s.subtask for s in every).values()) == {16 * 4 * 9}
    per_place = Counter(s.meta["place"] for s in every)
    assert per_place == {"centre": 1024, "edge": 1024, "junction": 256}
    position = Counter(s.answers[0] for s in every if s.subtask == "position")
    assert len(position) == 9 and set(position.values()) == {64}
    letters = Counter(s.answers[0] for s in every if s.subtask == "choice")
    assert len(letters) == 4 and set(letters.values()) == {144}
    counts = Counter(s.answers[0] for s in every if s.subtask == "counting")
    assert set(counts) == {"0", "1", "2"} and max(counts.values()) - min(counts.values()) <= 9
    assert len({s.id for s in every}) == len(every)


def test_nothing_but_the_place_tells_the_answer_apart() -> None:
    """Of one entity in one size all questions but the position have the same answer at every place."""
    answers: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for s in samples(grid()):
        if s.subtask != "position":
            size = re.search(r"-(\d+)-[\d.]+x[\d.]+-", s.id)
            assert size is not None
            answers.setdefault((s.meta["entity"], size[1], s.subtask), set()).add(s.answers)
    assert len(answers) == 16 * 4 * 3
    assert all(len(found) == 1 for found in answers.values())
    families = Counter((s.answers[0], len(s.meta["entity"]) == 1) for s in samples(grid()) if s.subtask == "choice")
    assert len(families) == 8, "every letter is right for characters and for others"


def test_entities_are_where_their_boxes_say() -> None:
    for s in samples(grid(sizes=[28, 70], entities=4)):
        if s.subtask == "counting":
            continue
        ys, xs = np.nonzero(ink(s))
        x0, y0, x1, y1 = (round(768 * edge) for edge in s.boxes[0])
        assert x0 <= xs.min() and xs.max() < x1 and y0 <= ys.min() and ys.max() < y1
        cut = [((384 - a) / (b - a), a, b) for a, b in ((x0, x1), (y0, y1))]
        shares = [share for share, a, b in cut if a < 384 < b]
        assert len(shares) == ("centre", "edge", "junction").index(s.meta["place"])
        assert all(0.35 <= share <= 0.65 for share in shares)


def test_jitter_moves_entities_off_the_cut() -> None:
    data = grid(jitters=[0, 7, 28], sizes=[28], entities=4, tasks=["identification"])
    places = Counter((s.meta["place"], s.id.split("+")[1].split("-")[0] if "+" in s.id else "0") for s in samples(data))
    edges, junctions = 4 * 4, 4
    assert places[("centre", "0")] == 4 * 4 and ("centre", "7") not in places
    assert places[("edge", "0")] == edges and places[("junction", "0")] == junctions
    # 7 of 28 pixels leave a quarter on one side.
    assert places[("near", "7")] == places[("near", "28")] == edges + junctions


def test_counting_pictures_show_the_number() -> None:
    for s in samples(grid(tasks=["counting"], entities=4, sizes=[42])):
        n = int(s.answers[0])
        assert len(s.boxes) == max(n, 1)
        drawn = ink(s)
        shown = 0
        for a, b in [
            (192, 192),
            (576, 192),
            (192, 576),
            (576, 576),
            (384, 384),
            (384, 192),
            (192, 384),
            (576, 384),
            (384, 576),
        ]:
            shown += bool(drawn[b - 21 : b + 21, a - 21 : a + 21].any())
        assert shown == 3, "three entities, whatever the answer"


def test_splits_share_no_entity_and_seeds_no_order() -> None:
    for family in FAMILIES:
        parts = [set(family_of(split, family)) for split in SPLITS]
        assert all(len(part) >= 4 for part in parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert len(set.union(*(set(family_of(split, "shape")) for split in SPLITS))) == 12 * 8
    for split in SPLITS:
        shown = {
            s.meta["entity"] for s in samples(grid(split=split, entities=12, sizes=[42], tasks=["identification"]))
        }
        own = {e.name for family in FAMILIES for e in family_of(split, family)}
        assert len(shown) == 12 and shown <= own
        for family in FAMILIES:
            entity = family_of(split, family)[0]
            assert set(foils(entity, split, 3)) <= set(family_of(split, family)) - {entity}
    first, other = ([s.id for s in samples(grid(entities=8, seed=seed))] for seed in (0, 1))
    assert first != other and first == [s.id for s in samples(grid(entities=8))]


def test_drawings_differ_and_fill_their_box() -> None:
    entities = [Entity("shape", kind, "red") for kind in SHAPES] + [Entity("icon", kind) for kind in ICONS]
    entities += list(family_of("test", "character"))
    masks = [np.asarray(mask_of(entity, 42)) for entity in entities]
    for i, mask in enumerate(masks):
        rows, columns = np.nonzero(mask > 127)
        assert np.ptp(rows) >= 0.4 * 42 and np.ptp(columns) >= 0.25 * 42, entities[i]
        for j in range(i):
            if masks[j].shape == mask.shape:
                assert (np.abs(mask.astype(int) - masks[j]) > 127).mean() > 0.01, (entities[i], entities[j])
    for entity in family_of("test", "string"):
        assert mask_of(entity, 28).height >= 7 and mask_of(entity, 112).width <= 1.6 * 112


def test_blank_pictures_ask_the_same() -> None:
    plain, blank = grid(entities=4, sizes=[42]), grid(entities=4, sizes=[42], blank=True)
    assert [s.prompt for s in samples(plain)] == [s.prompt for s in samples(blank)]
    assert not any(ink(s).any() for s in samples(blank)[:40])
    assert all(ink(s).any() for s in samples(plain)[:40])


def test_noise_is_that_of_the_seed() -> None:
    first, again = (grid(entities=4, sizes=[42], noise=10.0)[0].load_image() for _ in range(2))
    assert first.tobytes() == again.tobytes()
    levels = np.asarray(first, dtype=float)
    assert (levels[..., 0] == levels[..., 1]).mean() > 0.9 and 3 < levels.std() < 30


def test_answers_match_themselves() -> None:
    for s in samples(grid(entities=24, sizes=[42])):
        assert entity_match(prediction=f"The {s.answers[0]}.", references=s.answers) == 1, s.answers
        assert entity_match(prediction="", references=s.answers) == 0


def test_written_pictures_are_checked(tmp_path: Path) -> None:
    data = grid(entities=4, sizes=[42], tasks=["identification", "counting"])
    folder = write(data, tmp_path)
    assert folder == tmp_path / "test"
    assert json.loads((folder / "manifest.json").read_text()).keys() >= digests(folder).keys()
    again = grid(source="disk", root=str(tmp_path))
    assert [(s.id, s.answers, s.boxes, s.subtask) for s in samples(again)] == [
        (s.id, s.answers, s.boxes, s.subtask) for s in samples(data)
    ]
    assert [again[i].load_image().tobytes() for i in (0, 1)] == [data[i].load_image().tobytes() for i in (0, 1)]
    assert {again[0].meta[key] == data[0].meta[key] for key in ("place", "entity")} == {True}
    with pytest.raises(UserError, match="exists already: remove it"):
        write(data, tmp_path)
    rows = folder / "metadata.jsonl"
    rows.write_text(rows.read_text().replace("centre", "edge", 1))
    with pytest.raises(ValueError, match="is not what its manifest.json says"):
        grid(source="disk", root=str(tmp_path))
    assert len(grid(source="folder", root=str(tmp_path))) == len(data)
