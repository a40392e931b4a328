"""From pictures to the tokens that the language model reads: views, vision tower, relevance, selector, projector.

Pictures with one layout form a group and go through the selector together. A picture that several prompts ask about is
encoded once.

Shape letters: B prompts, E distinct pictures, N source tokens of a picture, T selected tokens, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from lavida_adapter.modules import LavidaModules
from lavida_adapter.prefix import picture_rows
from lavida_adapter.prompt import encode_text
from lavida_adapter.relevance import NoRelevance, Relevance, RelevanceContext
from lavida_adapter.timing import Pausing, Timer
from lavida_adapter.views import Views, layout_on, patch_pixels, ready
from lavida_adapter.vision import in_own_dtype
from shirg import Selection, Selector, VisionFeatures, picture_counts, send

Boxes = Sequence[tuple[float, float, float, float]]
"""Boxes (x0, y0, x1, y1) in a picture, as fractions of its width and height."""


@dataclass(frozen=True)
class PicturePrompts:
    """B prompts about one picture each. Images that are the same object are one picture."""

    images: Sequence[Image.Image | Views]
    questions: Sequence[str]
    ids: Sequence[str]
    boxes: Sequence[Boxes] | None = None
    """Where each question's evidence is; only an oracle selector reads it."""


@dataclass(frozen=True)
class EncodedPicture:
    """A picture behind the vision tower."""

    views: Views
    states_ND: Tensor
    taps: dict[str, Tensor]
    """Recordings [N, ...] by name."""


@dataclass(frozen=True)
class SelectedGroup:
    """Prompts whose pictures have one layout, behind the selector and the projector."""

    rows: Sequence[int]
    """The prompts."""
    selected: Sequence[int]
    """For each prompt its row of the selection."""
    selection: Selection
    picture_BTD: Tensor
    """The picture tokens of each row of the selection, unused slots at the end."""


class PictureEncoder:
    """Turns the pictures of prompts into tokens for the language model, with one selector."""

    def __init__(self, model: LavidaModules, selector: Selector, relevance: Relevance | None, timer: Timer) -> None:
        self.model, self.selector, self.relevance, self.timer = model, selector, relevance, timer

    def blocks(self, prompts: PicturePrompts) -> tuple[list[Tensor], tuple[Selection, ...]]:
        """Each prompt's picture tokens [n, D] in the language model's space, and the selection (B = 1) of each."""
        distinct = list({id(image): image for image in prompts.images}.values())
        number = {id(image): e for e, image in enumerate(distinct)}
        picture_of = [number[id(image)] for image in prompts.images]
        encoded = self._encode(distinct)
        groups = [self._group_rows(prompts, encoded, picture_of, rows) for rows in rows_by_layout(encoded, picture_of)]
        # The only wait of a batch: how many tokens each picture uses.
        used = iter(torch.cat([group.selection.mask_BT.sum(-1) for group in groups]).tolist())
        blocks: dict[int, Tensor] = {}
        selections: dict[int, Selection] = {}
        for group in groups:
            n_used = [next(used) for _ in group.picture_BTD]
            for i, j in zip(group.rows, group.selected, strict=True):
                blocks[i], selections[i] = group.picture_BTD[j, : n_used[j]], _row(group.selection, j)
        return [blocks[i] for i in range(len(blocks))], tuple(selections[i] for i in range(len(blocks)))

    def _encode(self, images: Sequence[Image.Image | Views]) -> list[EncodedPicture]:
        """Views and tower, all pictures in one batch."""
        with self.timer.stage("views"):
            views = [ready(image, self.model.config, self.selector.geometry) for image in images]
        with self.timer.stage("tower"):
            return run_tower(self.model, views, self.selector.needs - {"encoder", "pixels"})

    def _group_rows(
        self, prompts: PicturePrompts, encoded: Sequence[EncodedPicture], picture_of: Sequence[int], rows: list[int]
    ) -> "SelectedGroup":
        """Picture tokens and selection of the prompts `rows`, whose pictures have one layout."""
        pictures = list(dict.fromkeys(picture_of[i] for i in rows))
        picture_at = [pictures.index(picture_of[i]) for i in rows]
        # One selection serves all prompts about a picture, if it depends on nothing else of the prompt.
        shared = is_shared(self.selector, self.relevance)
        asking = [rows[picture_at.index(e)] for e in range(len(pictures))] if shared else rows
        asked_about = [pictures.index(picture_of[i]) for i in asking]
        group = PictureGroup([encoded[e] for e in pictures], asked_about, self.model.model.mm_projector)
        features = self._features(group, prompts, asking)
        selection, tokens_BTD = select(features, group, self.selector, self.timer)
        picture_BTD = picture_rows(selection, tokens_BTD, self.model.model.image_newline)
        return SelectedGroup(rows, picture_at if shared else range(len(rows)), selection, picture_BTD)

    def _features(self, group: "PictureGroup", prompts: PicturePrompts, asking: Sequence[int]) -> VisionFeatures:
        """What the selector sees of the prompts `asking`, in the tower's space."""
        features = group.features(tuple(prompts.ids[i] for i in asking), pixels="pixels" in self.selector.needs)
        if prompts.boxes is not None:
            features = replace(features, boxes=tuple(tuple(prompts.boxes[i]) for i in asking))
        if self.relevance is None or not self.selector.uses_relevance:
            return features
        timer = Pausing(self.timer)
        with timer.stage("relevance"):
            context = self._context(group, [prompts.questions[i].strip() for i in asking], timer)
            with in_own_dtype(features.tokens_BND.device):
                return replace(features, relevance_BN=self.relevance(features, context))

    def _context(self, group: "PictureGroup", questions: list[str], timer: Timer) -> RelevanceContext:
        """What a provider may read; the time of projecting all tokens counts as such, as for selectors that do it."""
        model = self.model
        ids = [encode_text(model.tokenizer, question) for question in questions]
        ids_Q = [send(torch.tensor(q, dtype=torch.int64), model.device) for q in ids]

        def timed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
            project = in_precision_of_now(call, model.device)

            def projected() -> Tensor:
                with timer.stage("project"):
                    return project()

            return projected

        base = model.base_projector
        return RelevanceContext(
            timed(group.projected),
            ids_Q,
            model.lm.embedding,
            questions,
            model.model.vision_tower,
            None if base is model.model.mm_projector else timed(partial(group.projected_by, base)),
        )


def in_precision_of_now(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The call under the autocast of the caller, wherever it is made: trained parameters may be float32."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def run() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=enabled):
            return call()

    return run


def rows_by_layout(encoded: Sequence[EncodedPicture], picture_of: Sequence[int]) -> list[list[int]]:
    """The prompts of each layout, by the picture of each prompt."""
    layouts = {id(picture.views.layout): picture.views.layout for picture in encoded}.values()
    return [[i for i, e in enumerate(picture_of) if encoded[e].views.layout is layout] for layout in layouts]


def is_shared(selector: Selector, relevance: Relevance | None) -> bool:
    """Whether a selection depends on the picture alone: neither on the question nor on the sample."""
    ranks_alone = not selector.uses_relevance or isinstance(relevance, NoRelevance)
    return ranks_alone and not selector.reads_sample


def run_tower(model: LavidaModules, views: Sequence[Views], taps: frozenset[str]) -> list[EncodedPicture]:
    """Tower states and recordings of each picture, all views in one batch; without a graph when the tower is frozen."""
    tower = model.model.vision_tower
    pixels = send_pixels(views, model.device, model.dtype)
    counts = [len(v.pixels_V3SS) for v in views]
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learns):
        states, recorded = tower(pixels, taps)
    # Of each picture: [V, n, ...] -> [N, ...].
    states_END = [x.flatten(0, 1) for x in states.split(counts)]
    taps_E = {name: [x.flatten(0, 1) for x in tensor.split(counts)] for name, tensor in recorded.items()}
    return [
        EncodedPicture(v, states_END[e], {name: tensors[e] for name, tensors in taps_E.items()})
        for e, v in enumerate(views)
    ]


def send_pixels(views: Sequence[Views], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pixels [V, 3, S, S] of all pictures on the device; a GPU fetches them from pinned memory, without a wait."""
    parts = [v.pixels_V3SS for v in views]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    joined = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    return torch.cat(parts, out=joined).to(device, non_blocking=True)


class PictureGroup:
    """Pictures (E of them) that share a layout, and the B prompts that ask about them."""

    def __init__(self, pictures: Sequence[EncodedPicture], picture_of: Sequence[int], projector: nn.Module) -> None:
        """`picture_of`: the picture of each prompt."""
        self.pictures, self.picture_of, self.projector = pictures, list(picture_of), projector
        self.states_END = torch.stack([picture.states_ND for picture in pictures])
        self._projected: Tensor | None = None
        self._has_graph = False

    def projected(self) -> Tensor:
        """Projected tokens [B, N, D] of every prompt's picture, computed once.

        In training a relevance provider may have asked first, without a graph; then they are computed again with one.
        """
        learns = torch.is_grad_enabled()
        if self._projected is None or (learns and not self._has_graph):
            self._projected, self._has_graph = self.projector(self.states_END), learns
        return self._by_prompt(self._projected)

    def projected_by(self, projector: nn.Module) -> Tensor:
        """Tokens [B, N, D] of every prompt's picture by another projector, each picture projected once."""
        return self._by_prompt(projector(self.states_END))

    def features(self, ids: tuple[str, ...], *, pixels: bool = False) -> VisionFeatures:
        """What a selector of stage "pre" sees; with `pixels` also the pixels of every token as a tap."""
        device = self.states_END.device
        views = [picture.views for picture in self.pictures]
        valid_EN = torch.stack([v.valid_N for v in views])
        n_valid = valid_EN.sum(-1).tolist()
        base = [v.base_count for v in views]
        counts = picture_counts(views[0].layout, valid_EN, [v.matched_count for v in views])
        return VisionFeatures(
            tokens_BND=self._by_prompt(self.states_END),
            layout=layout_on(views[0].layout, device),
            valid_BN=self._by_prompt(send(valid_EN, device)),
            picture_B4=self._by_prompt(send(torch.tensor([v.picture_4 for v in views]), device)),
            size_B2=self._by_prompt(send(torch.tensor([v.size for v in views]), device)),
            ids=ids,
            n_valid=tuple(n_valid[i] for i in self.picture_of),
            counts=tuple(counts[i] for i in self.picture_of),
            picture_at=tuple(self.picture_of),
            base_count_B=None if None in base else self._by_prompt(send(torch.tensor(base), device)),
            taps={name: self._by_prompt(tensor) for name, tensor in self._taps(pixels).items()},
        )

    def _taps(self, pixels: bool) -> dict[str, Tensor]:
        """Recordings of the pictures, [E, N, ...] each."""
        names = self.pictures[0].taps
        taps = {name: torch.stack([picture.taps[name] for picture in self.pictures]) for name in names}
        if pixels:
            patches = [patch_pixels(p.views.pixels_V3SS, p.views.layout) for p in self.pictures]
            taps["pixels"] = send(torch.stack(patches), self.states_END.device)
        return taps

    def _by_prompt(self, values_E: Tensor) -> Tensor:
        """Values of pictures [E, ...] by prompt [B, ...]: no copy where each prompt has a picture of its own."""
        if self.picture_of == list(range(len(self.pictures))):
            return values_E
        return values_E[send(torch.tensor(self.picture_of), values_E.device)]


def select(features: VisionFeatures, group: PictureGroup, selector: Selector, timer: Timer) -> tuple[Selection, Tensor]:
    """The selection, and its tokens [B, T, D] in the language model's space.

    A selector of stage "post" sees projected tokens; after one of stage "pre" the selected tokens are projected.
    """
    if selector.stage == "post":
        with timer.stage("project"):
            taps = {**features.taps, **({"encoder": features.tokens_BND} if "encoder" in selector.needs else {})}
            features = replace(features, tokens_BND=group.projected(), taps=taps)
    with timer.stage("select"), in_own_dtype(features.tokens_BND.device):
        selection: Selection = selector(features)
    if selector.stage == "post":
        return selection, selection.tokens_BTD
    with timer.stage("project"):
        return selection, group.projector(selection.tokens_BTD)


def _row(selection: Selection, b: int) -> Selection:
    """The selection (B = 1) of one row."""
    row = {f: getattr(selection, f)[b : b + 1] for f in ("tokens_BTD", "index_BT", "source_BT", "box_BT4", "mask_BT")}
    scores = None if selection.scores_BN is None else selection.scores_BN[b : b + 1]
    expected = None if selection.expected_B is None else selection.expected_B[b : b + 1]
    return Selection(**row, scores_BN=scores, expected_B=expected)
