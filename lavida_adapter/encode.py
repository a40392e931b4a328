"""From pictures to the tokens that the language model reads: views, tower, relevance, selector, projector.

Pictures of one canvas kind form a group and go through the selector together; a picture that several prompts ask about
is encoded once.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn

from lavida_adapter.modules import LavidaModules
from lavida_adapter.prefix import picture_block
from lavida_adapter.prompt import encode_text
from lavida_adapter.relevance import NoRelevance, Relevance, RelevanceContext
from lavida_adapter.timing import Timer
from lavida_adapter.views import Views, layout_on, patch_pixels, ready
from shirg import Selection, Selector, VisionFeatures

Boxes = Sequence[tuple[float, float, float, float]]


def picture_blocks(
    model: LavidaModules,
    images: Sequence[Image.Image | Views],
    questions: Sequence[str],
    ids: Sequence[str],
    selector: Selector,
    relevance: Relevance | None,
    timer: Timer,
    boxes: Sequence[Boxes] | None = None,
) -> tuple[list[Tensor], tuple[Selection, ...]]:
    """Each prompt's picture tokens [n, D] in the language model's space, and the selections (B = 1) behind them."""
    distinct = list({id(image): image for image in images}.values())
    with timer.stage("views"):
        views = [ready(image, model.config, selector.geometry) for image in distinct]
    with timer.stage("tower"):
        states, taps = run_tower(model, views, selector.needs - {"encoder", "pixels"})
    picture_at = {id(image): i for i, image in enumerate(distinct)}
    picture_of = [picture_at[id(image)] for image in images]
    blocks: dict[int, Tensor] = {}
    selections: dict[int, Selection] = {}
    for layout in {id(v.layout): v.layout for v in views}.values():
        rows = [i for i, picture in enumerate(picture_of) if views[picture].layout is layout]
        shown = list(dict.fromkeys(picture_of[i] for i in rows))
        place = [shown.index(picture_of[i]) for i in rows]
        # One selection serves every prompt about a picture, if nothing that it depends on is the prompt's own.
        asking = [rows[place.index(e)] for e in range(len(shown))] if is_shared(selector, relevance) else rows
        group = PictureGroup(
            [views[i] for i in shown],
            torch.stack([states[i] for i in shown]),
            [shown.index(picture_of[i]) for i in asking],
            model.model.mm_projector,
        )
        recorded = {name: torch.stack([tensors[i] for i in shown]) for name, tensors in taps.items()}
        if "pixels" in selector.needs:
            recorded["pixels"] = torch.stack([patch_pixels(views[i].pixels_V3SS, layout) for i in shown]).to(
                model.device
            )
        features = group.features(tuple(ids[i] for i in asking), recorded)
        if boxes is not None:
            features = replace(features, boxes=tuple(tuple(boxes[i]) for i in asking))
        if relevance is not None and selector.uses_relevance:
            with timer.stage("relevance"):
                texts = [questions[i].strip() for i in asking]
                asked = [encode_text(model.tokenizer, text) for text in texts]
                asked_Q = [torch.tensor(q, dtype=torch.int64, device=model.device) for q in asked]
                context = RelevanceContext(group.projected, asked_Q, model.lm.wte, texts, model.model.vision_tower)
                features = replace(features, relevance_BN=relevance(features, context))
        selection, tokens_BTD = select(features, group, selector, timer)
        for at, i in enumerate(rows):
            j = place[at] if len(asking) < len(rows) else at
            selections[i] = _row(selection, j)
            blocks[i] = picture_block(selections[i], tokens_BTD[j], model.model.image_newline)
    return [blocks[i] for i in range(len(images))], tuple(selections[i] for i in range(len(images)))


def is_shared(selector: Selector, relevance: Relevance | None) -> bool:
    """Whether a selection depends on the picture alone, and not on who asks what about it."""
    ranks_alone = not selector.uses_relevance or isinstance(relevance, NoRelevance)
    return ranks_alone and not selector.reads_sample


def run_tower(
    model: LavidaModules, views: Sequence[Views], taps: frozenset[str]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Tower states [N, D] and recordings [N, ...] of each picture, all views in one batch; no graph when frozen."""
    tower = model.model.vision_tower
    pixels = torch.cat([v.pixels_V3SS for v in views]).to(model.device, model.dtype)
    counts = [len(v.pixels_V3SS) for v in views]
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learns):
        states, recorded = tower(pixels, taps)
    return (
        [x.flatten(0, 1) for x in states.split(counts)],
        {name: [x.flatten(0, 1) for x in tensor.split(counts)] for name, tensor in recorded.items()},
    )


class PictureGroup:
    """Pictures (E of them) that share a canvas, and the B prompts that ask about them."""

    def __init__(self, views: Sequence[Views], states_END: Tensor, places: Sequence[int], projector: nn.Module) -> None:
        """`places`: the picture of each prompt."""
        self.views, self.states_END, self.places, self.projector = views, states_END, list(places), projector
        self._projected: Tensor | None = None
        self._has_graph = False

    def projected(self) -> Tensor:
        """Projected tokens [B, N, D] of every prompt's picture, computed once.

        In training a provider of relevance may have asked first, without a graph; what is learned needs one.
        """
        learns = torch.is_grad_enabled()
        if self._projected is None or (learns and not self._has_graph):
            self._projected, self._has_graph = self.projector(self.states_END), learns
        return self._by_prompt(self._projected)

    def features(self, ids: tuple[str, ...], taps: dict[str, Tensor]) -> VisionFeatures:
        """What a selector of stage "pre" sees; `taps` are those of the pictures, [E, N, ...]."""
        device = self.states_END.device
        valid_EN = torch.stack([v.valid_N for v in self.views])
        n_valid = valid_EN.sum(-1).tolist()
        base = [v.base_count for v in self.views]
        return VisionFeatures(
            tokens_BND=self._by_prompt(self.states_END),
            layout=layout_on(self.views[0].layout, device),
            valid_BN=self._by_prompt(valid_EN.to(device)),
            picture_B4=self._by_prompt(torch.tensor([v.picture_4 for v in self.views], device=device)),
            size_B2=self._by_prompt(torch.tensor([v.size for v in self.views], device=device)),
            ids=ids,
            n_valid=tuple(n_valid[i] for i in self.places),
            picture_at=tuple(self.places),
            base_count_B=None if None in base else self._by_prompt(torch.tensor(base, device=device)),
            taps={name: self._by_prompt(tensor) for name, tensor in taps.items()},
        )

    def _by_prompt(self, values_E: Tensor) -> Tensor:
        """Values of pictures [E, ...] by prompt [B, ...]: no copy where each prompt has a picture of its own."""
        if self.places == list(range(len(self.views))):
            return values_E
        return values_E[torch.tensor(self.places, device=values_E.device)]


def select(features: VisionFeatures, group: PictureGroup, selector: Selector, timer: Timer) -> tuple[Selection, Tensor]:
    """Selection and its tokens in the language model's space; the selector's stage says what is projected first."""
    if selector.stage == "post":
        with timer.stage("project"):
            taps = {**features.taps, **({"encoder": features.tokens_BND} if "encoder" in selector.needs else {})}
            features = replace(features, tokens_BND=group.projected(), taps=taps)
    with timer.stage("select"):
        selection: Selection = selector(features)
    if selector.stage == "post":
        return selection, selection.tokens_BTD
    with timer.stage("project"):
        return selection, group.projector(selection.tokens_BTD)


def _row(selection: Selection, b: int) -> Selection:
    row = {f: getattr(selection, f)[b : b + 1] for f in ("tokens_BTD", "index_BT", "source_BT", "box_BT4", "mask_BT")}
    scores = None if selection.scores_BN is None else selection.scores_BN[b : b + 1]
    expected = None if selection.expected_B is None else selection.expected_B[b : b + 1]
    return Selection(**row, scores_BN=scores, expected_B=expected)
