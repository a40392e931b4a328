"""LaViDa: picture and question to a prefix, prefix to an answer, examples to a loss.

The module tree carries the names of the published checkpoint, so that weights, LoRA targets and adapters need no map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from lavida_adapter.attention import Watch
from lavida_adapter.auxiliary import adaptive_k_loss, alignment, row_losses
from lavida_adapter.cache import PrefixCache, StoredPrefix
from lavida_adapter.cache_pack import CachePacker
from lavida_adapter.cache_select import CacheSelector
from lavida_adapter.config import LavidaConfig
from lavida_adapter.copies import states_of_copies
from lavida_adapter.denoise import DecodeConfig, Engine, Generation, LogitsFn, denoise, start
from lavida_adapter.engine import pick
from lavida_adapter.llada import Llada
from lavida_adapter.objective import (
    ObjectiveConfig,
    Tally,
    extra_padding,
    mask_probability,
    masked_cross_entropy,
    masked_targets,
    pad_answers,
    sample_times,
)
from lavida_adapter.pictures import Boxes, picture_blocks
from lavida_adapter.prefix import Prefix, splice
from lavida_adapter.projector import build_projector
from lavida_adapter.prompt import IGNORE, prompt_ids, training_example
from lavida_adapter.relevance import Relevance
from lavida_adapter.replay import Recorder
from lavida_adapter.share import ALONE, Share
from lavida_adapter.steps import CachedSteps
from lavida_adapter.timer import NoTimer, Pausing, Timer
from lavida_adapter.views import Views, pooled_count
from lavida_adapter.vision import VisionTower
from shirg import Selector


@dataclass(frozen=True)
class TrainBatch:
    """Examples to learn from; pictures that are the same object are encoded once."""

    images: Sequence[Image.Image | Views]
    """Pictures, or what `geometries.cut` made of them for the selector of the step."""
    questions: Sequence[str]
    answers: Sequence[str]
    ids: Sequence[str]
    prompts: Sequence[str] | None = None
    """The questions with the dataset's suffix; the questions themselves when None."""
    boxes: Sequence[Boxes] | None = None
    """Where each example's evidence is, as fractions of its picture; only an oracle looks."""
    histories: Sequence[Sequence[str]] | None = None
    """The turns before each question, the user's and the assistant's alternating."""


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
        self._recorders: dict[str, Recorder] = {}
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

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Writes the published layout: config.json, safetensors weights in one file or shards, tokenizer."""
        from lavida_adapter.checkpoint import save

        save(self, Path(folder), max_shard_size=max_shard_size)

    @property
    def lm(self) -> Llada:
        return self.model.transformer

    @property
    def device(self) -> torch.device:
        return self.model.image_newline.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the base; what is trained may be wider."""
        return self.lm.wte.weight.dtype

    def checkpoint_gradients(self, on: bool) -> None:
        """Blocks of tower and language model run again in the backward pass: less memory, a third more time."""
        self.lm.recompute = self.model.vision_tower.recompute = on

    def encode(
        self,
        images: Sequence[Image.Image | Views],
        questions: Sequence[str],
        selector: Selector,
        *,
        relevance: Relevance | None = None,
        ids: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        boxes: Sequence[Boxes] | None = None,
        timer: Timer | None = None,
    ) -> Prefix:
        """Pictures and questions to a prefix. The question ranks tokens, the prompt (question + suffix) is answered.

        `boxes` says where each question's evidence is, as fractions of its picture; only an oracle looks.

        Raises:
            ValueError: when there are not as many pictures, questions, ids and prompts, or none at all.
        """
        timer = timer or NoTimer()
        ids = [str(i) for i in range(len(images))] if ids is None else ids
        prompts = questions if prompts is None else prompts
        given: dict[str, Sequence[Any]] = {"pictures": images, "questions": questions, "ids": ids, "prompts": prompts}
        given |= {} if boxes is None else {"lists of boxes": boxes}
        if len({len(things) for things in given.values()}) > 1 or not images:
            counts = ", ".join(f"{len(things)} {name}" for name, things in given.items())
            raise ValueError(f"encode got {counts}: give one of each per prompt, and at least one prompt")
        blocks, selections = picture_blocks(self, images, questions, ids, selector, relevance, timer, boxes)
        rows = [prompt_ids(self.tokenizer, prompt, self.config) for prompt in prompts]
        with timer.stage("project"):
            prefix, _ = splice(rows, blocks, self.lm.wte, max_length=self.config.tokenizer_model_max_length)
        n_matched = tuple(pooled_count(image.size, self.config) for image in images)
        return replace(prefix, selections=selections, n_matched=n_matched)

    @torch.inference_mode()
    def generate(
        self,
        prefix: Prefix,
        decode: DecodeConfig,
        *,
        cache_selector: CacheSelector | None = None,
        cache_packer: CachePacker | None = None,
        draft: Sequence[int] = (),
        generator: torch.Generator | None = None,
        timer: Timer | None = None,
    ) -> Generation:
        """Answers for a prefix. The cache is written once; with `decode.prefix_cache=False` there is none.

        A `cache_selector` cuts the cache once, after the prefill or after the first step; a `cache_packer` stores it in
        less memory.

        Raises:
            ValueError: when prompt and answer together exceed the model's context, or the cache cannot be treated so.
        """
        timer = Pausing(timer or NoTimer())
        longest = prefix.embeds_BPD.shape[1] + decode.max_new_tokens
        if longest > self.config.lm.max_sequence_length:
            raise ValueError(
                f"prompt and answer need {longest} positions, the model has {self.config.lm.max_sequence_length}: "
                "lower the budget or decode.max_new_tokens"
            )
        if cache_selector is not None and cache_packer is not None:
            raise ValueError("a prefix cache can be cut or packed: give cache_selector or cache_packer")
        for treatment in (cache_selector, cache_packer):
            if treatment is not None:
                treatment.check(prefix, decode)
        mask_id = self.config.lm.mask_token_id
        answer_BA = start(prefix.embeds_BPD.shape[0], decode, mask_id, draft, self.device)
        cached = None
        if decode.prefix_cache:
            with timer.stage("prefill"):
                watch = None if cache_packer is None else cache_packer.watch(prefix)
                cache: StoredPrefix = self.prefill(prefix, decode.max_new_tokens if cache_packer is None else 0, watch)
            if cache_packer is not None:
                assert isinstance(cache, PrefixCache)
                with timer.stage("cache"):
                    cache = cache_packer(cache, prefix, watch)
            recorder = None if decode.engine == "eager" else self._recorder(decode.engine)
            cached = CachedSteps(self.lm, prefix, cache, decode.max_new_tokens, cache_selector, timer, recorder)
        with timer.stage("denoise"):
            logits_of: LogitsFn = cached or partial(self._logits_whole, prefix)
            eos_id = self.config.lm.eos_token_id
            ids_BA, forwards, steps, history = denoise(
                logits_of,
                answer_BA,
                decode,
                mask_id,
                generator,
                eos_id=eos_id,
                # Shapes that stay the same; on a GPU the wider step costs nothing, its weights do.
                all_slots=decode.engine != "eager" or self.device.type == "cuda",
            )
        texts = self.tokenizer.batch_decode(ids_BA.tolist(), skip_special_tokens=True)
        return Generation(
            ids_BA,
            tuple(text.strip() for text in texts),
            forwards,
            tuple(steps),
            tuple(history),
            None if cached is None else cached.cached_BP,
            None if cached is None else cached.cache,
        )

    def prefill(self, prefix: Prefix, room: int = 0, watch: Watch | None = None) -> PrefixCache:
        """The prefix cache of a prefix, under the model's prefix attention, with room for so many answer tokens."""
        return self.lm.prefill(prefix.embeds_BPD, prefix.padding, self.visual(prefix.visual_BP), room, watch)

    def _recorder(self, engine: Engine) -> Recorder:
        """The recorder of this model's steps, with what it has recorded already.

        Raises:
            ValueError: for CUDA graphs on a CPU.
        """
        assert engine != "eager"
        if engine == "graph" and self.device.type != "cuda":
            raise ValueError("decode.engine=graph replays CUDA graphs: use decode.engine=compile or eager on a CPU")
        if self._recorders.get(engine) is None or self._recorders[engine].lm is not self.lm:
            self._recorders[engine] = Recorder(self.lm, engine)
        return self._recorders[engine]

    def _logits_whole(self, prefix: Prefix, ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        states_BAD = self.forward_whole(prefix, self.lm.wte(ids_BA))
        return self.lm.logits(states_BAD if want_BM is None else pick(states_BAD, want_BM))

    def forward_whole(self, prefix: Prefix, answer_BAD: Tensor) -> Tensor:
        """States [B, A, D] of the answer in one pass over prompt and answer, without a cache: the prompt sees it too.

        With `prefix_attention="image_first"` picture tokens see the picture alone, here as in the cache.
        """
        b, a = answer_BAD.shape[:2]
        p = prefix.embeds_BPD.shape[1]
        answer_BA = torch.ones(b, a, dtype=torch.bool, device=answer_BAD.device)
        mask_BL, positions_BL = None, None
        if prefix.padding is not None:
            mask_BL = torch.cat([prefix.mask_BP, answer_BA], dim=1)
            answer_position = prefix.mask_BP.sum(-1, keepdim=True) + torch.arange(a, device=self.device)
            positions_BL = torch.cat([torch.arange(p, device=self.device).expand(b, p), answer_position], dim=1)
        states_BLD = self.lm(
            torch.cat([prefix.embeds_BPD, answer_BAD], dim=1),
            mask_BL=mask_BL,
            visual_BL=self.visual(torch.cat([prefix.visual_BP, ~answer_BA], dim=1)),
            positions_BL=positions_BL,
        )
        return states_BLD[:, p:]

    def visual(self, visual_BL: Tensor) -> Tensor | None:
        """The picture's places for a model whose picture tokens see the picture alone."""
        return visual_BL if self.config.prefix_attention == "image_first" else None

    def loss(
        self,
        batch: TrainBatch,
        selector: Selector,
        objective: ObjectiveConfig,
        generator: torch.Generator,
        *,
        relevance: Relevance | None = None,
        share: Share = ALONE,
        tally: Tally | None = None,
    ) -> Tensor:
        """Masked-diffusion loss of a batch, differentiable; the picture is encoded once for both copies.

        A batch that is one process's `share` of a global one gets a loss whose mean over the processes is the global
        batch's. `tally` is filled in.
        """
        timer, tally = NoTimer(), tally or Tally()
        blocks, selections = picture_blocks(
            self, batch.images, batch.questions, batch.ids, selector, relevance, timer, batch.boxes
        )
        prompts = batch.questions if batch.prompts is None else batch.prompts
        histories = [()] * len(prompts) if batch.histories is None else batch.histories
        examples = [
            training_example(self.tokenizer, prompt, answer, self.config, history=history)
            for prompt, answer, history in zip(prompts, batch.answers, histories, strict=True)
        ]
        rows, labels = pad_answers(
            [e.prompt for e in examples],
            [e.answer for e in examples],
            eos=self.config.lm.eos_token_id,
            extra=extra_padding(objective, generator),
            least=objective.answer_tokens or 0,
            agree=share.largest,
        )
        loss = self.loss_of_rows(rows, labels, blocks, objective, generator, share=share, tally=tally)
        if objective.alignment:
            tally.terms["alignment"] = alignment(self, batch, blocks, selections)
            loss = loss + objective.alignment * tally.terms["alignment"]
        if objective.adaptive_k and tally.row_loss_B is not None:
            tally.terms["adaptive_k"] = adaptive_k_loss(selections, tally.row_loss_B)
            loss = loss + objective.adaptive_k * tally.terms["adaptive_k"]
        return loss

    def loss_of_rows(
        self,
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        blocks: Sequence[Tensor],
        objective: ObjectiveConfig,
        generator: torch.Generator,
        *,
        share: Share = ALONE,
        tally: Tally | None = None,
    ) -> Tensor:
        """The loss of token rows with one picture block each; what exceeds the model's context is cut off on the right.

        Raises:
            ValueError: for a row without a target: it would teach nothing.
        """
        max_length = self.config.tokenizer_model_max_length
        room = [max_length - len(block) + 1 for block in blocks]
        rows = [row[:n] for row, n in zip(rows, room, strict=True)]
        labels = [label[:n] for label, n in zip(labels, room, strict=True)]
        for i, label in enumerate(labels):
            if all(token == IGNORE for token in label):
                raise ValueError(f"training row {i} has no target token: its answer was empty or cut away")
        whole, labels_BL = splice(rows, blocks, self.lm.wte, max_length=max_length, labels=labels)
        b, length = labels_BL.shape
        whole_b, longest = b * share.world, share.largest(length)
        t_B = share.rows(sample_times(whole_b, objective.time, generator, self.device))
        u_BL = share.rows(torch.rand(whole_b, longest, generator=generator, device=self.device))
        if tally is not None:
            tally.tokens = sum(len(row) - 1 + len(block) for row, block in zip(rows, blocks, strict=True))
        return self.loss_of_draw(whole, labels_BL, t_B, u_BL, objective, share=share, tally=tally)

    def loss_of_draw(
        self,
        whole: Prefix,
        labels_BL: Tensor,
        t_B: Tensor,
        u_BL: Tensor,
        objective: ObjectiveConfig,
        *,
        share: Share = ALONE,
        tally: Tally | None = None,
    ) -> Tensor:
        """The loss of spliced rows at noise levels `t_B`, with one uniform draw `u_BL` per position.

        Draws beyond a row's end count for its minimum alone.
        """
        target_BL = labels_BL != IGNORE
        masked_BL, complement_BL = masked_targets(target_BL, t_B, u_BL[:, : labels_BL.shape[1]], u_BL.amin(-1))
        copies = [masked_BL, complement_BL] if objective.complementary else [masked_BL]
        masked_CL = torch.cat(copies)
        states = states_of_copies(self, whole, labels_BL, masked_CL, prefix_mask=objective.prefix_mask)
        logits_MW, labels_M = self.lm.logits(states[masked_CL]), labels_BL.repeat(len(copies), 1)[masked_CL]
        if tally is not None:
            tally.masked, tally.right = len(labels_M), (logits_MW.detach().argmax(-1) == labels_M).sum()
            if objective.adaptive_k:
                row_M = masked_CL.nonzero()[:, 0] % len(labels_BL)
                tally.row_loss_B = row_losses(logits_MW, labels_M, row_M, len(labels_BL))
        if objective.weighting == "none":
            return masked_cross_entropy(logits_MW, labels_M, n_targets=max(1.0, share.mean(len(labels_M))))
        p_B = mask_probability(t_B)
        # Either copy alone estimates the same loss without bias: together they are averaged.
        weight_C = torch.cat([p_B, 1 - p_B][: len(copies)]).clamp_min(1e-3).reciprocal() / len(copies)
        weight_M = weight_C[:, None].expand_as(masked_CL)[masked_CL]
        return masked_cross_entropy(logits_MW, labels_M, weight_M, n_targets=share.mean(int(target_BL.sum())))
