"""LaViDa: picture and question -> prefix, prefix -> answer, examples -> loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from lavida_adapter.attention import AttentionHook
from lavida_adapter.cache_compression.compressor import CachePacker, CacheSelector
from lavida_adapter.captured_steps import GraphCache
from lavida_adapter.checkpoint import load, save
from lavida_adapter.config import LavidaConfig
from lavida_adapter.decode_config import DecodeConfig, Engine
from lavida_adapter.encode import Boxes, PictureEncoder, PicturePrompts
from lavida_adapter.engine import CachedSteps, CompiledEngine, DecodeEngine, EagerEngine
from lavida_adapter.families import FAMILIES
from lavida_adapter.fused_layers import store_apart
from lavida_adapter.generate import Generation, denoise, filling_steps, masks_left, start
from lavida_adapter.infill import INFILL, Infilled, make_draft, text_of
from lavida_adapter.joined_prompts import Batching
from lavida_adapter.kv_cache import PrefixCache, StoredPrefix
from lavida_adapter.language_model import pick
from lavida_adapter.loss import TrainBatch, batch_loss
from lavida_adapter.modules import LavidaModules
from lavida_adapter.objective import SINGLE, ObjectiveConfig, Shard, Tally
from lavida_adapter.prefix import Prefix, splice
from lavida_adapter.prompt import prompt_ids
from lavida_adapter.relevance import Relevance
from lavida_adapter.sampling import LogitsFn
from lavida_adapter.timing import NoTimer, Pausing, Timer
from lavida_adapter.views import Views, pooled_count
from shirg import Selector, UserError, send


class Lavida(LavidaModules):
    """A diffusion vision-language model with a pluggable token selector."""

    def __init__(self, config: LavidaConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._engines: dict[tuple[Engine, str], DecodeEngine] = {}
        self.batchings: set[Batching] = set()
        """How the prompts of the batches so far were put together."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        vision_path: str | Path | None = None,
        prepare: Callable[[Self], None] | None = None,
    ) -> Self:
        """Loads a folder or hub repository in the published layout; see `lavida_adapter.checkpoint`.

        `revision` pins a version on the hub; `vision_path` is a SigLIP for a checkpoint stored without its tower;
        `prepare` is called before weights are read, and may split them over processes (`lavida_adapter.sharding`).
        """
        device = torch.device(device)
        return load(
            cls, source, dtype=dtype, device=device, revision=revision, vision_path=vision_path, prepare=prepare
        )

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Writes the published layout: config.json, safetensors weights in one file or shards, tokenizer."""
        save(self, Path(folder), max_shard_size=max_shard_size)

    def encode(
        self,
        images: Sequence[Image.Image | Views],
        questions: Sequence[str],
        selector: Selector,
        *,
        relevance: Relevance | None = None,
        ids: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        boxes: Sequence[Boxes] | None = None,
        timer: Timer | None = None,
    ) -> Prefix:
        """Pictures and questions -> a prefix.

        The relevance provider reads the question; the language model answers the prompt (question + suffix).
        `histories`: the turns before each prompt, the user's and the assistant's alternating, which the language model
        reads, too. `boxes`: where each question's evidence is, as fractions of its picture; only an oracle selector
        reads them.

        Raises:
            UserError: when the numbers of pictures, questions, ids, prompts and histories differ, or are 0; for a
                history that does not end with the assistant.
        """
        timer = timer or NoTimer()
        names = ids or ()
        ids = [str(i) for i in range(len(images))] if ids is None else ids
        prompts = questions if prompts is None else prompts
        given: dict[str, Sequence[Any]] = {"pictures": images, "questions": questions, "ids": ids, "prompts": prompts}
        given |= {} if histories is None else {"histories": histories}
        given |= {} if boxes is None else {"lists of boxes": boxes}
        if len({len(things) for things in given.values()}) > 1 or not images:
            counts = ", ".join(f"{len(things)} {name}" for name, things in given.items())
            raise UserError(f"encode got {counts}: give one of each per prompt, and at least one prompt")
        encoder = PictureEncoder(self, selector, relevance, timer)
        blocks, selections = encoder.blocks(PicturePrompts(images, questions, ids, boxes))
        before = [()] * len(prompts) if histories is None else histories
        rows = [
            prompt_ids(self.tokenizer, prompt, self.config, history=turns)
            for prompt, turns in zip(prompts, before, strict=True)
        ]
        with timer.stage("project"):
            most = self.config.tokenizer_model_max_length
            prefix, _ = splice(rows, blocks, self.lm.embedding, max_length=most, names=names)
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
        drafts: Sequence[Sequence[int]] = (),
        generator: torch.Generator | None = None,
        timer: Timer | None = None,
    ) -> Generation:
        """Answers for a prefix. The prefix cache is written once; with `decode.prefix_cache=False` there is none.

        A `cache_selector` shortens the cache once, after the prefill or after the first step; a `cache_packer` stores
        it in less memory. `drafts` (one for each prompt) fill the beginning of the answers: their tokens are fixed,
        and masks in them are filled.

        Raises:
            UserError: when prompt and answer exceed the model's context, for drafts that do not fit, for a cache method
                that cannot work, or for decoding options that the language model's sampler does not have.
        """
        timer = Pausing(timer or NoTimer())
        sampler = FAMILIES[self.config.lm.family].sampler
        sampler.check(decode)
        longest = prefix.embeds_BPD.shape[1] + decode.max_new_tokens
        if longest > self.config.lm.max_sequence_length:
            name = prefix.name_of(max(range(len(prefix.n_tokens)), key=prefix.n_tokens.__getitem__))
            raise UserError(
                f"{name} and its answer need {longest} positions, the model has {self.config.lm.max_sequence_length}: "
                "lower the budget or decode.max_new_tokens"
            )
        if cache_selector is not None and cache_packer is not None:
            raise UserError("give cache_selector or cache_packer, not both: a prefix cache is shortened or packed")
        mask_id, eos_id = self.config.lm.mask_token_id, self.config.lm.eos_token_id
        blank_BA = start(prefix.embeds_BPD.shape[0], decode, mask_id, drafts)
        n_masks = self._masks_left(blank_BA, decode)
        for method in (cache_selector, cache_packer):
            if method is not None:
                method.check(prefix, decode)
                method.check_steps(prefix, filling_steps(n_masks, decode, sampler))
        answer_BA = send(blank_BA, self.device)
        cached = None
        if decode.prefix_cache:
            with timer.stage("prefill"):
                hook = None if cache_packer is None else cache_packer.hook(prefix)
                n_answer = decode.max_new_tokens if cache_packer is None else 0
                cache: StoredPrefix = self.prefill(prefix, n_answer, hook, decode.engine)
                assert isinstance(cache, PrefixCache)
                if cache.last_BD is not None:
                    answer_BA = self._from_prompt(answer_BA, cache.last_BD, decode)
            if cache_packer is not None:
                with timer.stage("cache"):
                    cache = cache_packer(cache, prefix, hook)
            engine = self._engine(decode.engine)
            cached = CachedSteps(self.lm, prefix, cache, decode.max_new_tokens, cache_selector, timer, engine)
        with timer.stage("denoise"):
            logits_of: LogitsFn = cached or partial(self._logits_whole, prefix)
            # The first answer may end before a step, or hold a mask that the prompt predicts.
            known = not (decode.early_stop or decode.allow_mask_token)
            sure: list[Tensor] | None = [] if decode.keep_history else None
            ids_BA, forwards, steps, history = denoise(
                logits_of,
                answer_BA,
                decode,
                mask_id,
                generator,
                sampler=sampler,
                eos_id=eos_id,
                # On a GPU a step with more slots costs the same, and a captured graph needs constant shapes.
                # torch.compile treats a dimension of size 1 as another kind of shape.
                least_slots=decode.block if self.device.type == "cuda" else 1 + (decode.engine == "compile"),
                n_masks=n_masks if known else None,
                sure=sure,
            )
        return Generation(
            ids_BA,
            tuple(text_of(ids, self.tokenizer, self.config) for ids in ids_BA.tolist()),
            forwards,
            tuple(steps),
            tuple(history),
            tuple(sure or ()),
            None if cached is None else cached.read_BP(steps),
            None if cached is None else cached.cache,
        )

    @torch.inference_mode()
    def infill(
        self,
        image: Image.Image | Views,
        template: str,
        selector: Selector,
        *,
        question: str = "Describe the image.",
        decode: DecodeConfig = INFILL,
        relevance: Relevance | None = None,
        generator: torch.Generator | None = None,
    ) -> Infilled:
        """Fills the gaps of a text about a picture; `lavida_adapter.infill` has the syntax.

        Args:
            question: the user's message that the text answers.

        Raises:
            UserError: a text without a gap or with a wrong one, or one longer than `decode.max_new_tokens`.
        """
        draft = make_draft(template, self.tokenizer, self.config)
        prefix = self.encode([image], [question], selector, relevance=relevance)
        generation = self.generate(prefix, decode, drafts=[draft.ids], generator=generator)
        return draft.filled(generation.ids_BA[0].tolist(), self.tokenizer, self.config)

    def prefill(
        self, prefix: Prefix, n_answer: int = 0, hook: AttentionHook | None = None, engine: Engine = "eager"
    ) -> PrefixCache:
        """The prefix cache of a prefix, under the model's prefix attention, with `n_answer` free slots behind it."""
        visual_BP, lengths = self.visual(prefix.visual_BP), None
        if prefix.padding is None:
            self.batchings.add("equal")
        elif visual_BP is None and hook is None:
            self.batchings.add("joined")
            lengths = prefix.n_tokens
        else:
            self.batchings.add("padded")
        prefill = self._engine(engine).prefill
        return prefill(prefix.embeds_BPD, prefix.padding, visual_BP, n_answer, hook, lengths)

    def _engine(self, engine: Engine) -> DecodeEngine:
        """The engine that runs prefill and steps, with what it has compiled or captured before.

        Raises:
            UserError: for CUDA graphs on a CPU, and for `compile` on a machine without a compiler.
        """
        if engine == "eager":
            return EagerEngine(self.lm)
        if engine == "graph" and self.device.type != "cuda":
            raise UserError("decode.engine=graph replays CUDA graphs: use decode.engine=compile or eager on a CPU")
        key = engine, self.device.type
        found = self._engines.get(key)
        if found is not None and found.lm is self.lm:
            return found
        if self.device.type == "cuda":
            made: DecodeEngine = GraphCache(self.lm, compiled=engine == "compile")
        else:
            made = CompiledEngine(self.lm)
        self._engines[key] = made
        return made

    def release_engines(self) -> None:
        """Frees what the engines other than `eager` keep: graphs, and memory for the longest prompts they have seen.

        The weights that they have joined or reordered are stored again as they were loaded.
        """
        if self._engines:
            self._engines.clear()
            store_apart(self.lm)

    def _masks_left(self, blank_BA: Tensor, decode: DecodeConfig) -> list[list[int]]:
        """How many masks each row has in each block when the first step begins; if the prompt may predict the mask
        token, the most that it can have."""
        if self.lm.shift and decode.prefix_cache and not decode.allow_mask_token:
            blank_BA = blank_BA.clone()
            blank_BA[:, 0] = self.config.lm.eos_token_id  # whatever the prompt predicts is no mask
        return masks_left(blank_BA, self.config.lm.mask_token_id, decode.block)

    def _from_prompt(self, answer_BA: Tensor, last_BD: Tensor, decode: DecodeConfig) -> Tensor:
        """The answer with the token that the prompt predicts, if the first slot is masked."""
        mask_id = self.config.lm.mask_token_id
        logits_BW = self.lm.logits(last_BD).float()
        if not decode.allow_mask_token:
            logits_BW[:, mask_id] = float("-inf")
        first_B = torch.where(answer_BA[:, 0] == mask_id, logits_BW.argmax(-1), answer_BA[:, 0])
        return torch.cat([first_B[:, None], answer_BA[:, 1:]], dim=1)

    def _logits_whole(self, prefix: Prefix, ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        states_BAD = self.forward_whole(prefix, self.lm.embedding(ids_BA))
        return self.lm.logits(states_BAD if want_BM is None else pick(states_BAD, want_BM))

    def forward_whole(self, prefix: Prefix, answer_BAD: Tensor) -> Tensor:
        """States [B, A, D] that predict the answer, in one pass over prompt and answer, without a cache.

        The prompt sees the answer. A state that predicts a slot is its own, or with a shift that of the token before.

        With `prefix_attention="image_first"` picture tokens see picture tokens only, as in the cache.
        """
        b, a = answer_BAD.shape[:2]
        p = prefix.embeds_BPD.shape[1]
        answer_BA = torch.ones(b, a, dtype=torch.bool, device=answer_BAD.device)
        mask_BL, positions_BL = None, None
        self.batchings.add("equal" if prefix.padding is None else "padded")
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
        if not self.lm.shift:
            return states_BLD[:, p:]
        at_BA = (p - self.lm.shift + torch.arange(a, device=self.device)).expand(b, a)
        behind_B1 = p - prefix.mask_BP.sum(-1, keepdim=True)
        return pick(states_BLD, torch.where(at_BA < p, at_BA - behind_B1, at_BA))

    def loss(
        self,
        batch: TrainBatch,
        selector: Selector,
        objective: ObjectiveConfig,
        generator: torch.Generator,
        *,
        relevance: Relevance | None = None,
        shard: Shard = SINGLE,
        tally: Tally | None = None,
    ) -> Tensor:
        """Masked-diffusion loss of a batch, differentiable; each picture is encoded once for both masked copies.

        For one process's `shard` of a global batch, the mean of this loss over the processes is the loss of the global
        batch. `tally` is filled with counts.
        """
        return batch_loss(self, batch, selector, objective, generator, relevance=relevance, shard=shard, tally=tally)
