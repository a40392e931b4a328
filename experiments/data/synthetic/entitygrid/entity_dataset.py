"""EntityGrid-style questions as a dataset. Call results "EntityGrid-style": the data of EntityGrid-QA is not public.

After the description of EntityGrid-QA in HiRes-LLaVA (Huang et al., CVPR 2025): an entity is pasted at one of nine
places of a picture that is cut into four slices, and the same questions are asked at each place.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from experiments.data.benchmarks.benchmark import read, samples
from experiments.data.sample import Sample, SampleList
from experiments.data.synthetic.entitygrid.draw import WIDEST_STRING
from experiments.data.synthetic.entitygrid.entities import FAMILIES, SPLITS, Entity, choose, foils
from experiments.data.synthetic.entitygrid.entitygrid_files import Entitygrid
from experiments.data.synthetic.entitygrid.placement import (
    COLS,
    ROWS,
    Anchor,
    Canvas,
    EntityScene,
    alone,
    anchors,
    cell_of,
    counted,
    fraction,
    place_of,
    put,
    render,
)
from shirg import UserError

TASKS = ("identification", "choice", "position", "counting")
CELLS = tuple(" ".join(dict.fromkeys((row, column))) for row in ROWS for column in COLS)
SMALLEST = 7
"""Pixels; fewer cannot show a character."""


class EntityGrid(SampleList):
    """Questions about entities at every anchor of a canvas; each entity is shown at each place in each size.

    Args:
        split: "train", "val" or "test"; no entity is in two of them.
        source: "generate" draws; "disk" reads what `python -m experiments.data.synthetic.entitygrid` wrote and checks
            it; "folder" and "hub" read rows of the same form from anywhere.
        canvas: (width, height) in pixels; one of the model's canvases, so that its cuts fall where they should.
        grid: (rows, cols) of slices.
        entities: how many.
        sizes: heights of an entity in pixels.
        jitters: pixels by which an entity at a boundary is moved off it, for a curve; 0 is on it.
        tasks: which of "identification", "choice", "position" and "counting" are asked.
        noise: standard deviation of gray noise, in levels of 255.
        blank: show empty pictures with the same questions, to measure what can be answered without seeing.
        seed: other seeds draw other entities, and other neighbours for counting.
        root, hub, streaming, suffix, max_new_tokens, metrics: as for `experiments.data.benchmarks.Benchmark`.
    """

    name = "synth_entitygrid"

    def __init__(
        self,
        *,
        split: str,
        suffix: str,
        max_new_tokens: int,
        metrics: Sequence[str],
        source: Literal["generate", "hub", "disk", "folder"] = "generate",
        root: str | None = None,
        hub: Any = (),
        streaming: bool = True,
        canvas: Sequence[int] = (768, 768),
        grid: Sequence[int] = (2, 2),
        entities: int = 16,
        sizes: Sequence[int] = (28, 42, 70, 112),
        jitters: Sequence[int] = (0,),
        tasks: Sequence[str] = TASKS,
        noise: float = 0.0,
        blank: bool = False,
        seed: int = 0,
    ) -> None:
        split = "val" if split == "validation" else split
        self.split = split
        self.metric_names = tuple(metrics)
        self.max_new_tokens = max_new_tokens
        self.provenance = {"source": str(source)}
        if source != "generate":
            reader = Entitygrid()
            raws, found = read(reader, "entitygrid", source, split, root, hub, streaming)
            self.provenance = dict(found)
            items = [reader.item(raw) for raw in raws]
            super().__init__(samples(self.name, split, raws, items, suffix=suffix))
            return
        if split not in SPLITS:
            raise UserError(f"data.split={split} does not exist: choose one of {', '.join(SPLITS)}")
        if unknown := set(tasks).difference(TASKS):
            raise UserError(f"data.tasks: there is no {min(unknown)}; choose from {', '.join(TASKS)}")
        if len(canvas) != 2 or len(grid) != 2 or min(*canvas, *grid) < 1:
            raise UserError("data.canvas must be [width, height] and data.grid [rows, cols], of positive numbers")
        self._canvas = Canvas(canvas[0], canvas[1], grid[0], grid[1])
        largest = int(min(self._canvas.slice_px) / WIDEST_STRING)
        if not sizes or not SMALLEST <= min(sizes) <= max(sizes) <= largest:
            raise UserError(f"data.sizes={list(sizes)}: entities have {SMALLEST} to {largest} pixels on this canvas")
        if not jitters or not 0 <= min(jitters) <= max(jitters) <= largest // 2:
            raise UserError(f"data.jitters={list(jitters)}: give numbers of pixels from 0 to {largest // 2}")
        self._tasks = tuple(task for task in TASKS if task in tasks)
        self._noise, self._blank, self._seed, self._suffix = noise, blank, seed, suffix
        asked = [
            sample
            for number, entity in enumerate(choose(split, entities, seed))
            for place, size in enumerate(sizes)
            for jitter in jitters
            for anchor in anchors(self._canvas)
            # At the centre of a slice there is no boundary, so jitter is not used.
            if anchor.place != "centre" or jitter == jitters[0]
            for sample in self._ask(entity, number, size, number + place, anchor, jitter)
        ]
        if not asked:
            raise UserError(f"data.tasks={list(tasks)}: nothing can be asked on this canvas")
        super().__init__(asked)

    def _ask(self, entity: Entity, number: int, size: int, turn: int, anchor: Anchor, jitter: int) -> Iterator[Sample]:
        """The questions about one entity at one anchor; they differ between entities, not between anchors."""
        canvas, split = self._canvas, self.split
        at = f"{anchor.x:g}x{anchor.y:g}" + (f"+{jitter}" if jitter else "")
        key = f"{split}-{self._seed}-{entity.name.replace(' ', '-')}-{size}-{at}"
        scene = alone(canvas, entity, size, anchor, jitter, self._noise, key)
        make = partial(self._sample, key=key, entity=entity, size=size, anchor=anchor, jitter=jitter)
        if "identification" in self._tasks:
            yield make("identification", "What is shown in the image?", entity.answers, scene=scene)
        if "choice" in self._tasks:
            # Families alternate, and so do the letters within each.
            right = (number + number // len(FAMILIES)) % 4
            options = foils(entity, split, 3)
            options.insert(right, entity)
            listed = "".join(f"\n{letter}. {o.name}" for letter, o in zip("ABCD", options, strict=True))
            question = f"Which of these is shown in the image? Answer with its letter.{listed}"
            yield make("choice", question, ("ABCD"[right],), scene=scene)
        if "position" in self._tasks and (cell := cell_of(anchor, canvas)):
            question = f"Which cell of a 3x3 grid contains the {entity.phrase}: {', '.join(CELLS[:-1])} or {CELLS[-1]}?"
            yield make("position", question, (cell,), scene=scene)
        if "counting" in self._tasks:
            count = turn % 3
            crowd = counted(canvas, entity, count, split, size, anchor, jitter, self._noise, f"{key}-counting")
            yield make("counting", entity.counted, (str(count),), scene=crowd)

    def _sample(
        self,
        task: str,
        question: str,
        answers: tuple[str, ...],
        *,
        key: str,
        entity: Entity,
        size: int,
        anchor: Anchor,
        jitter: int,
        scene: EntityScene,
    ) -> Sample:
        canvas = scene.canvas
        # If the count is 0, the entity at the anchor is the evidence.
        shown = [p.box for p in scene.placed if p.entity == entity] or [scene.placed[0].box]
        drawn = EntityScene(canvas, (), scene.noise, scene.look) if self._blank else scene
        return Sample(
            id=f"{key}-{task}",
            dataset=self.name,
            split=self.split,
            load_image=partial(render, drawn),
            size=(canvas.width, canvas.height),
            question=question,
            prompt=question + self._suffix,
            answers=answers,
            subtask=task,
            boxes=tuple(fraction(box, canvas) for box in shown),
            meta={
                "picture": f"{key}-counting" if task == "counting" else key,
                "place": place_of(put(scene.placed[0].entity, size, anchor, jitter), anchor),
                "entity": entity.name,
            },
        )
