"""LaViDa: picture and question to a prefix, prefix to an answer, examples to a loss.

The module tree carries the names of the published checkpoint, so that weights, LoRA targets and adapters need no map.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from lavida_adapter.config import LavidaConfig
from lavida_adapter.denoise import DecodeConfig, Generation, denoise, start
from lavida_adapter.llada import Llada
from lavida_adapter.objective import (
    ObjectiveConfig,
    extra_padding,
    mask_probability,
    masked_cross_entropy,
    masked_targets,
    pad_answers,
    sample_times,
)
from lavida_adapter.prefix import Prefix, picture_block, splice
from lavida_adapter.projector import build_projector
from lavida_adapter.prompt import IGNORE, encode_text, prompt_ids, training_example
from lavida_adapter.relevance import Context, Relevance
from lavida_adapter.views import Views, layout_on, make_views
from lavida_adapter.vision import VisionTower
from shirg import Selection, Selector, VisionFeatures


class Timer(Protocol):
    """Measures the stages views, tower, relevance, select, project, prefill and denoise."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...


class _NoTimer:
    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class TrainBatch:
    """Examples to learn from; pictures that are the same object are encoded once."""

    images: Sequence[Image.Image]
    questions: Sequence[str]
    answers: Sequence[str]
    ids: Sequence[str]
    prompts: Sequence[str] | None = None
    """The questions with the dataset's suffix; the questions themselves when None."""


class _Body(nn.Module):
    """The four parts of the model, under the names of the published checkpoint."""

    def __init__(self, config: LavidaConfig) -> None:
        super().__init__()
        self.transformer = Llada(config.lm)
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = build_projector(config.vision.hidden_size, config.lm.d_model)
        self.image_newline = nn.Parameter(torch.randn(config.lm.d_model) * config.lm.d_model**-0.5)


class Lavida(nn.Module):
    """A diffusion vision-language model with a pluggable token selector."""

    def __init__(self, config: LavidaConfig, tokenizer: Any) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.model = _Body(config)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fresh weights as the config says; where it says nothing, torch's own (tiny models need those)."""
        config = self.config
        nn.init.normal_(self.lm.wte.weight, std=config.lm.emb_std)
        if config.lm.init_std is not None:
            for module in self.lm.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=config.lm.init_std)
        positions = self.model.vision_tower.vision_tower.vision_model.embeddings.position_embedding
        nn.init.normal_(positions.weight, std=config.vision.hidden_size**-0.5)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
    ) -> Self:
        """Loads a folder or hub repository in the published layout; see `lavida_adapter.checkpoint`."""
        from lavida_adapter.checkpoint import load

        return load(cls, source, dtype=dtype, device=torch.device(device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the published layout: config.json, safetensors weights, tokenizer."""
        from lavida_adapter.checkpoint import save

        save(self, Path(folder))

    @property
    def lm(self) -> Llada:
        return self.model.transformer

    @property
    def device(self) -> torch.device:
        return self.model.image_newline.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.image_newline.dtype

    def encode(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        selector: Selector,
        *,
        relevance: Relevance | None = None,
        ids: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        timer: Timer | None = None,
    ) -> Prefix:
        """Pictures and questions to a prefix. The question ranks tokens, the prompt (question + suffix) is answered."""
        timer = timer or _NoTimer()
        blocks, selections = self._picture_blocks(images, questions, selector, relevance, ids, timer)
        rows = [prompt_ids(self.tokenizer, prompt, self.config) for prompt in (prompts or questions)]
        with timer.stage("project"):
            prefix, _ = splice(rows, blocks, self.lm.wte, max_length=self.config.tokenizer_model_max_length)
        return replace(prefix, selections=selections)

    @torch.inference_mode()
    def generate(
        self,
        prefix: Prefix,
        decode: DecodeConfig,
        *,
        draft: Sequence[int] = (),
        generator: torch.Generator | None = None,
        timer: Timer | None = None,
    ) -> Generation:
        """Answers for a prefix. The cache is written once; with `decode.prefix_cache=False` there is none.

        Raises:
            ValueError: when prompt and answer together exceed the model's context.
        """
        timer = timer or _NoTimer()
        longest = prefix.embeds_BPD.shape[1] + decode.max_new_tokens
        if longest > self.config.lm.max_sequence_length:
            raise ValueError(
                f"prompt and answer need {longest} positions, the model has {self.config.lm.max_sequence_length}: "
                "lower the budget or decode.max_new_tokens"
            )
        mask_id = self.config.lm.mask_token_id
        answer_BA = start(prefix.embeds_BPD.shape[0], decode, mask_id, draft, self.device)
        if decode.prefix_cache:
            with timer.stage("prefill"):
                cache = self.prefill(prefix)

            def logits_of(ids_BA: Tensor) -> Tensor:
                return self.lm.logits(self.lm.decode(self.lm.wte(ids_BA), cache))
        else:

            def logits_of(ids_BA: Tensor) -> Tensor:
                return self.lm.logits(self._forward_whole(prefix, self.lm.wte(ids_BA)))

        with timer.stage("denoise"):
            ids_BA, forwards, history = denoise(logits_of, answer_BA, decode, mask_id, generator)
        texts = self.tokenizer.batch_decode(ids_BA.tolist(), skip_special_tokens=True)
        return Generation(ids_BA, tuple(text.strip() for text in texts), forwards, tuple(history))

    def prefill(self, prefix: Prefix) -> Any:
        """The prefix cache of a prefix, under the model's prefix attention."""
        visual = prefix.visual_BP if self.config.prefix_attention == "image_first" else None
        return self.lm.prefill(prefix.embeds_BPD, prefix.padding, visual)

    def _forward_whole(self, prefix: Prefix, answer_BAD: Tensor) -> Tensor:
        """States [B, A, D] of the answer in one bidirectional pass over prompt and answer, without a cache."""
        b, a = answer_BAD.shape[:2]
        mask_BL, positions_BL = None, None
        p = prefix.embeds_BPD.shape[1]
        if prefix.padding is not None:
            mask_BL = torch.cat([prefix.mask_BP, prefix.mask_BP.new_ones(b, a)], dim=1)
            answer_position = prefix.mask_BP.sum(-1, keepdim=True) + torch.arange(a, device=self.device)
            positions_BL = torch.cat([torch.arange(p, device=self.device).expand(b, p), answer_position], dim=1)
        embeds = torch.cat([prefix.embeds_BPD, answer_BAD], dim=1)
        return self.lm(embeds, mask_BL=mask_BL, positions_BL=positions_BL)[:, p:]

    def loss(
        self,
        batch: TrainBatch,
        selector: Selector,
        objective: ObjectiveConfig,
        generator: torch.Generator,
        *,
        relevance: Relevance | None = None,
    ) -> Tensor:
        """Masked-diffusion loss of a batch, differentiable; the picture is encoded once for both copies."""
        blocks, _ = self._picture_blocks(batch.images, batch.questions, selector, relevance, batch.ids, _NoTimer())
        examples = [
            training_example(self.tokenizer, prompt, answer, self.config)
            for prompt, answer in zip(batch.prompts or batch.questions, batch.answers, strict=True)
        ]
        rows, labels = pad_answers(
            [e.prompt for e in examples],
            [e.answer for e in examples],
            eos=self.config.lm.eos_token_id,
            extra=extra_padding(objective, max(len(e.answer) for e in examples), generator),
        )
        return self.loss_of_rows(rows, labels, blocks, objective, generator)

    def loss_of_rows(
        self,
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        blocks: Sequence[Tensor],
        objective: ObjectiveConfig,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss of token rows with one picture block each."""
        whole, labels_BL = splice(
            rows, blocks, self.lm.wte, max_length=self.config.tokenizer_model_max_length, labels=labels
        )
        b, length = labels_BL.shape
        t_B = sample_times(b, objective.time, generator, self.device)
        u_BL = torch.rand(b, length, generator=generator, device=self.device)
        masked_BL, complement_BL = masked_targets(labels_BL != IGNORE, t_B, u_BL)
        copies = [masked_BL, complement_BL] if objective.complementary else [masked_BL]
        p_B = mask_probability(t_B)
        weight_CB = torch.stack([p_B, 1 - p_B][: len(copies)]).clamp_min(1e-3).reciprocal() / len(copies)
        masked = torch.cat(copies)
        states = self._states_of_copies(whole, labels_BL, masked, objective.prefix_mask)
        weight = None
        if objective.weighting == "inverse_time":
            weight = weight_CB.reshape(-1, 1).expand_as(masked)[masked]
        return masked_cross_entropy(self.lm.logits(states[masked]), labels_BL.repeat(len(copies), 1)[masked], weight)

    def _states_of_copies(self, whole: Prefix, labels_BL: Tensor, masked_CL: Tensor, prefix_mask: bool) -> Tensor:
        """States [C*B, L, D] of the copies of a batch in which the `masked` positions hold the mask embedding."""
        mask_D = self.lm.wte(torch.tensor(self.config.lm.mask_token_id, device=self.device))
        n = len(masked_CL) // len(labels_BL)
        embeds = torch.where(masked_CL[..., None], mask_D.to(whole.embeds_BPD.dtype), whole.embeds_BPD.repeat(n, 1, 1))
        if not prefix_mask:
            mask = None if whole.padding is None else whole.mask_BP.repeat(n, 1)
            return self.lm(embeds, mask_BL=mask)
        return self._states_behind_prefix(whole, labels_BL, embeds, n)

    def _states_behind_prefix(self, whole: Prefix, labels_BL: Tensor, embeds: Tensor, n: int) -> Tensor:
        """The same with a prompt that does not see the answer: one prefill, then all copies decode against it."""
        b, length = labels_BL.shape
        begin_B = (labels_BL != IGNORE).to(torch.int64).argmax(-1)
        length_B1 = whole.mask_BP.sum(-1, keepdim=True)
        p, a = int(begin_B.max()), int((length_B1[:, 0] - begin_B).max())
        prompt_BP = torch.arange(p, device=self.device) < begin_B[:, None]
        cache = self.prefill(Prefix(whole.embeds_BPD[:, :p], prompt_BP, whole.visual_BP[:, :p]))
        index_BA = begin_B[:, None] + torch.arange(a, device=self.device)
        real_CA = (index_BA < length_B1).repeat(n, 1)
        # Slots behind a shorter row's end read position 0, are masked, and write to a spare position that is cut off.
        read = index_BA.repeat(n, 1).masked_fill(~real_CA, 0)[..., None].expand(-1, -1, embeds.shape[-1])
        write = index_BA.repeat(n, 1).masked_fill(~real_CA, length)[..., None].expand_as(read)
        states_CAD = self.lm.decode(embeds.gather(1, read), cache.repeat(n), None if real_CA.all() else real_CA)
        return embeds.new_zeros(n * b, length + 1, embeds.shape[-1]).scatter(1, write, states_CAD)[:, :length]

    def _picture_blocks(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        selector: Selector,
        relevance: Relevance | None,
        ids: Sequence[str] | None,
        timer: Timer,
    ) -> tuple[list[Tensor], tuple[Selection, ...]]:
        """Each prompt's picture tokens [n, D] in the language model's space, and the selections behind them."""
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} pictures for {len(questions)} questions: give one picture per question")
        ids = [str(i) for i in range(len(images))] if ids is None else list(ids)
        distinct = list({id(image): image for image in images}.values())
        with timer.stage("views"):
            views = [make_views(image, self.config) for image in distinct]
        with timer.stage("tower"):
            states, taps = self._run_tower(views, selector.needs - {"encoder"})
        view_of = {id(image): i for i, image in enumerate(distinct)}
        picture_of = [view_of[id(image)] for image in images]
        question_ids = [
            torch.tensor(encode_text(self.tokenizer, q.strip()), dtype=torch.int64, device=self.device)
            for q in questions
        ]
        blocks: dict[int, Tensor] = {}
        selections: dict[int, Selection] = {}
        for layout in {id(v.layout): v.layout for v in views}.values():
            rows = [i for i, picture in enumerate(picture_of) if views[picture].layout is layout]
            shown = list(dict.fromkeys(picture_of[i] for i in rows))
            place = torch.tensor([shown.index(picture_of[i]) for i in rows], device=self.device)
            group = _Group(
                [views[i] for i in shown], torch.stack([states[i] for i in shown]), place, self.model.mm_projector
            )
            features = group.features(
                tuple(ids[i] for i in rows), {k: torch.stack([v[i] for i in shown]) for k, v in taps.items()}
            )
            if relevance is not None and selector.uses_relevance:
                with timer.stage("relevance"):
                    context = Context(group.projected, [question_ids[i] for i in rows], self.lm.wte)
                    features = replace(features, relevance_BN=relevance(features, context))
            selection, tokens_BTD = self._select(features, group, selector, timer)
            for j, i in enumerate(rows):
                selections[i] = _row(selection, j)
                blocks[i] = picture_block(selections[i], tokens_BTD[j], self.model.image_newline)
        return [blocks[i] for i in range(len(images))], tuple(selections[i] for i in range(len(images)))

    def _select(
        self, features: VisionFeatures, group: "_Group", selector: Selector, timer: Timer
    ) -> tuple[Selection, Tensor]:
        """Selection and its tokens in the language model's space: project before or after, as the selector's stage says."""
        if selector.stage == "post":
            with timer.stage("project"):
                taps = {**features.taps, **({"encoder": features.tokens_BND} if "encoder" in selector.needs else {})}
                features = replace(features, tokens_BND=group.projected(), taps=taps)
        with timer.stage("select"):
            selection = selector(features)
        if selector.stage == "post":
            return selection, selection.tokens_BTD
        with timer.stage("project"):
            return selection, self.model.mm_projector(selection.tokens_BTD)

    def _run_tower(self, views: Sequence[Views], taps: frozenset[str]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Tower states [N, D] and recordings [N, ...] of each picture, all views in one batch; no graph when frozen."""
        pixels = torch.cat([v.pixels_V3SS for v in views]).to(self.device, self.dtype)
        counts = [len(v.pixels_V3SS) for v in views]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.vision_tower.parameters())
        with torch.set_grad_enabled(learns):
            states, recorded = self.model.vision_tower(pixels, taps)
        return (
            [x.flatten(0, 1) for x in states.split(counts)],
            {name: [x.flatten(0, 1) for x in tensor.split(counts)] for name, tensor in recorded.items()},
        )


class _Group:
    """Pictures that share a canvas, and the prompts that ask about them; projects each picture at most once."""

    def __init__(self, views: Sequence[Views], states_END: Tensor, place_B: Tensor, projector: nn.Module) -> None:
        self.views, self.states_END, self.place_B, self.projector = views, states_END, place_B, projector
        self._projected: Tensor | None = None

    def projected(self) -> Tensor:
        """Projected tokens [B, N, D] of every prompt's picture."""
        if self._projected is None:
            self._projected = self.projector(self.states_END)
        return self._projected[self.place_B]

    def features(self, ids: tuple[str, ...], taps: dict[str, Tensor]) -> VisionFeatures:
        device, place = self.states_END.device, self.place_B
        valid_EN = torch.stack([v.valid_N for v in self.views])
        n_valid = valid_EN.sum(-1).tolist()
        return VisionFeatures(
            tokens_BND=self.states_END[place],
            layout=layout_on(self.views[0].layout, device),
            valid_BN=valid_EN.to(device)[place],
            picture_B4=torch.tensor([v.picture_4 for v in self.views], device=device)[place],
            size_B2=torch.tensor([v.size for v in self.views], device=device)[place],
            ids=ids,
            n_valid=tuple(n_valid[i] for i in place.tolist()),
            taps={name: tensor[place] for name, tensor in taps.items()},
        )


def _row(selection: Selection, b: int) -> Selection:
    row = {f: getattr(selection, f)[b : b + 1] for f in ("tokens_BTD", "index_BT", "source_BT", "box_BT4", "mask_BT")}
    scores = None if selection.scores_BN is None else selection.scores_BN[b : b + 1]
    return Selection(**row, scores_BN=scores)
