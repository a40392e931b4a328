"""Denoising steps as CUDA graphs: one recording for prompts of every length, over slots that all recordings share.

docs/lavida.md, "Engine". A graph reads fixed addresses, so prompts are written to one place: the prefill stores its
keys and values there directly. The memory of an engine is that of one cache, whatever it has recorded.

Shape letters: B batch, P prefix slots, S slots of the arena for a row, A answer slots, M wanted slots, W vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavida_adapter.attention import AttentionHook
from lavida_adapter.cache_compression.compressor import PackedPrefix
from lavida_adapter.engine import answer_angles
from lavida_adapter.fused_layers import step_layers, storage_of
from lavida_adapter.kv_cache import PrefixCache, Slots, StoredPrefix
from lavida_adapter.language_model import LanguageModel, StepLayer, pick
from lavida_adapter.prefix_attention import PromptSlots, attend_prompt
from shirg import UserError

ROUND = 128
"""Slots of a row are rounded up to a multiple of this, so that the arena seldom has to grow."""
MOST_SHAPES = 64
"""How many shapes of a batch torch compiles before it is an error."""


class Arena:
    """Slots for the keys and values of one batch of prompts at a time."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._storage: Tensor | None = None
        self.tenant: ArenaSlots | None = None
        """The slots that were reserved last; those before them are overwritten."""

    @property
    def n_slots(self) -> int:
        """Slots of all rows together."""
        return 0 if self._storage is None else self._storage.shape[2]

    def row_slots(self, batch: int, n: int) -> int:
        """Slots of each row for prompts of `n` tokens: all that the storage has for the batch, or what it must have."""
        most = -(-self._lm.config.max_sequence_length // ROUND)
        return max(-(-n // ROUND), min(self.n_slots // batch // ROUND, most)) * ROUND

    def must_grow(self, batch: int, n: int) -> bool:
        return self.row_slots(batch, n) * batch > self.n_slots

    def reserve(self, batch: int, n: int) -> "ArenaSlots":
        """Slots for prompts of `n` tokens. What was stored before is overwritten."""
        config, weight = self._lm.config, self._lm.embedding.weight
        each = self.row_slots(batch, n)
        if self.must_grow(batch, n):
            self.tenant = self._storage = None  # freed before the larger one is allocated
            shape = (config.n_layers, 2, batch * each, config.n_kv_heads * config.head_dim)
            # Zeros, because a slot that is not used has an attention weight of 0, and 0 * NaN would be NaN.
            with torch.inference_mode(False):
                self._storage = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        assert self._storage is not None
        of_batch = self._storage[:, :, : batch * each]
        both = of_batch.view(config.n_layers, 2, batch, config.n_kv_heads, each, config.head_dim)
        self.tenant = ArenaSlots(self, both)
        return self.tenant

    def holds(self, slots: Slots | None) -> bool:
        return slots is not None and self.tenant is slots


class ArenaSlots(Slots):
    """One reservation [B, H, S, Dh] of each layer, without room for the answer."""

    def __init__(self, arena: Arena, both_L2BHSD: Tensor) -> None:
        super().__init__([pair[0] for pair in both_L2BHSD], [pair[1] for pair in both_L2BHSD], 0)
        self._arena = arena

    def write(self, layer: int, keys_BHPD: Tensor, values_BHPD: Tensor) -> tuple[Tensor, Tensor]:
        """Copies a prefix to the first slots of a layer; returns views of it there."""
        n = keys_BHPD.shape[2]
        keys, values = self.keys[layer][:, :, :n], self.values[layer][:, :, :n]
        return keys.copy_(keys_BHPD), values.copy_(values_BHPD)

    @property
    def is_current(self) -> bool:
        return self._arena.holds(self)


@dataclass
class Recording:
    """One recorded step and the tensors that it reads and writes."""

    slots: ArenaSlots
    used: PromptSlots
    ids_BA: Tensor
    want_BM: Tensor | None
    cos: Tensor
    sin: Tensor
    logits_BMW: Tensor | None = None
    graph: "torch.cuda.CUDAGraph | None" = None


_Key = tuple[int, int, int, int]


class GraphCache:
    """Captures the steps of one language model as CUDA graphs and keeps them by the shape of the batch.

    On a CPU the same function runs without a graph, which the tests use.
    """

    def __init__(self, lm: LanguageModel, *, compiled: bool = False) -> None:
        """`compiled`: torch compiles what a layer does before and after attention, once for all layers."""
        self.lm, self._compiled = lm, compiled
        self._pieces = Pieces(project, finish)
        self._prefill_pieces = Pieces(project_prompt, finish_prompt)
        if compiled:
            self._pieces = self._pieces.compiled(dynamic=False)
            self._prefill_pieces = self._prefill_pieces.compiled()
        self.arena = Arena(lm)
        self._recorded: dict[_Key, Recording] = {}
        self._pool: Any = None
        self._layers: Sequence[StepLayer] = ()
        self._weights: tuple[int, ...] = ()
        self._find_weights()

    def prefill(
        self,
        embeds_BPD: Tensor,
        mask_BP: Tensor | None = None,
        visual_BP: Tensor | None = None,
        n_answer: int = 0,
        hook: AttentionHook | None = None,
        lengths: Sequence[int] | None = None,
    ) -> PrefixCache:
        """`LanguageModel.prefill` straight into the arena; the cache holds until the next prefill of this engine.

        With `lengths` it is `prefill_joined`.
        """
        self._find_weights()
        slots = self._reserve(*embeds_BPD.shape[:2])
        layers = [PromptLayer(layer, self._prefill_pieces, self._compiled) for layer in self._layers]
        with _compile_limit() if self._compiled else nullcontext():
            if lengths is None:
                return self.lm.prefill(embeds_BPD, mask_BP, visual_BP, 0, hook, slots=slots, layers=layers)
            assert mask_BP is not None and visual_BP is None and hook is None
            return self.lm.prefill_joined(embeds_BPD, mask_BP, lengths, slots=slots, layers=layers)

    def steps(self, cache: StoredPrefix, n_answer: int) -> "ReplayedSteps":
        return ReplayedSteps(self, cache)

    def recording(self, cache: StoredPrefix, ids_BA: Tensor, want_BM: Tensor | None) -> Recording:
        """The recording for these shapes, with the prefix in its slots.

        Raises:
            UserError: for a cache that is packed, longer in one layer than in another, or overwritten.
        """
        self._find_weights()
        slots, n = self._placed(cache), cache.n_slots(0)
        (b, a), m = ids_BA.shape, -1 if want_BM is None else want_BM.shape[1]
        each = slots.keys[0].shape[2]
        key = (b, a, m, each)
        found = self._recorded.get(key)
        if found is None:
            cos, sin = (t.expand(b, -1, -1, -1).clone() for t in answer_angles(self.lm, cache, a))
            used = PromptSlots.blank(b, each, ids_BA.device)
            want = None if want_BM is None else want_BM.clone()
            found = self._recorded[key] = Recording(slots, used, ids_BA.clone(), want, cos, sin)
        found.slots = slots  # the same addresses under the current reservation
        found.used.fill(n, cache.mask(0))
        for target, source in zip((found.cos, found.sin), answer_angles(self.lm, cache, a), strict=True):
            target.copy_(source.expand_as(target))
        return found

    def replay(self, recording: Recording) -> Tensor:
        """Runs the step on the current contents of the recording's tensors; on CUDA the first call captures it."""
        if recording.graph is not None:
            with torch.cuda.device(recording.ids_BA.device):
                recording.graph.replay()
        elif recording.ids_BA.is_cuda:
            self._capture(recording)
        else:
            recording.logits_BMW = self._logits(recording)
        assert recording.logits_BMW is not None
        return recording.logits_BMW

    def _logits(self, r: Recording) -> Tensor:
        """The step that is captured: logits [B, M, W]."""
        lm, backend = self.lm, self.lm.backend
        row_BM = lm.source_rows(r.want_BM, r.ids_BA)
        x = lm.embedding(r.ids_BA)
        for i, layer in enumerate(self._layers):
            q, k, v = self._pieces.project(layer, x, r.cos, r.sin)
            if row_BM is not None and i + 1 == len(self._layers):
                q = q.gather(2, row_BM[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1]))
                x = pick(x, row_BM)
            heads = attend_prompt(q, (r.slots.keys[i], r.slots.values[i]), r.used, (k, v), backend)
            x = self._pieces.finish(layer, x, heads.flatten(-2))
        return lm.logits(lm.final_norm(x))

    def _capture(self, recording: Recording) -> None:
        """Runs the step twice on a side stream, as CUDA requires, then captures and replays it."""
        device = recording.ids_BA.device
        with torch.cuda.device(device), _compile_limit() if self._compiled else nullcontext():
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._logits(recording)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                recording.logits_BMW = self._logits(recording)
            recording.graph = graph
            graph.replay()

    def _find_weights(self) -> None:
        """Joins the weights again, and forgets what was recorded, where they have moved or been replaced."""
        if storage_of(self.lm) != self._weights:
            self._forget()
            self._layers = step_layers(self.lm)
            self._weights = storage_of(self.lm)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the old storage lies in pieces that are too small for anything else

    def _placed(self, cache: StoredPrefix) -> ArenaSlots:
        """The slots that hold a cache; it is copied to the arena where the prefill did not store it there."""
        if isinstance(cache, PrefixCache) and isinstance(cache.slots, ArenaSlots):
            if self.arena.holds(cache.slots):
                return cache.slots
            if not cache.slots.is_current:
                raise UserError(
                    "the prefix cache of an earlier prompt was overwritten by a later prefill of the same engine: "
                    "finish an answer before the next prefill, or use decode.engine=eager"
                )
        layers, n = len(self.lm.layers), cache.n_slots(0)
        if isinstance(cache, PackedPrefix) or any(cache.n_slots(i) != n for i in range(layers)):
            raise UserError(
                "decode.engine=graph and compile need an unpacked cache of one length in all layers: choose "
                "decode.engine=eager or cache=none"
            )
        slots = self._reserve(len(cache.layer(0)[0]), n)
        for i in range(layers):
            slots.write(i, *cache.layer(i))
        return slots

    def _reserve(self, batch: int, n: int) -> ArenaSlots:
        if self.arena.must_grow(batch, n):
            self._forget()
        return self.arena.reserve(batch, n)

    def _forget(self) -> None:
        """Drops all recordings; the memory pool of graphs that are gone cannot be used again."""
        self._recorded.clear()
        self._pool = None


class ReplayedSteps:
    """The step function over one prefix cache, replayed from a graph."""

    def __init__(self, graphs: GraphCache, cache: StoredPrefix) -> None:
        self._graphs, self._cache = graphs, cache
        self._recording: Recording | None = None
        self._slots: ArenaSlots | None = None

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None) -> Tensor:
        if self._recording is None or not self._graphs.arena.holds(self._slots):
            self._recording = self._graphs.recording(self._cache, ids_BA, want_BM)
            self._slots = self._recording.slots
        self._recording.ids_BA.copy_(ids_BA)
        if want_BM is not None:
            assert self._recording.want_BM is not None
            self._recording.want_BM.copy_(want_BM)
        return self._graphs.replay(self._recording)


def project(layer: StepLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.project(x, cos, sin)


def finish(layer: StepLayer, x: Tensor, attended: Tensor) -> Tensor:
    return layer.finish(x, attended)


# Functions of their own, because what torch compiles for any length is slower for the few tokens of an answer, and
# torch keeps what it has compiled by function.
def project_prompt(layer: StepLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.project(x, cos, sin)


def finish_prompt(layer: StepLayer, x: Tensor, attended: Tensor) -> Tensor:
    return layer.finish(x, attended)


@dataclass(frozen=True)
class Pieces:
    """What a layer does before and after attention, as functions that may be compiled."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    finish: Callable[..., Tensor]

    def compiled(self, **options: Any) -> "Pieces":
        return Pieces(torch.compile(self.project, **options), torch.compile(self.finish, **options))


@dataclass(frozen=True)
class PromptLayer:
    """A layer that runs in those pieces, over prompts of any length."""

    layer: StepLayer
    pieces: Pieces
    compiled: bool

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._mark({1: (x,), 2: (cos, sin)})
        return self.pieces.project(self.layer, x, cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        self._mark({1: (x, attended)})
        return self.pieces.finish(self.layer, x, attended)

    def _mark(self, tensors_by_dimension: Mapping[int, Sequence[Tensor]]) -> None:
        """Tells the compiler which dimension is the length of the prompts, so that it does not compile for one."""
        if self.compiled:
            for dimension, tensors in tensors_by_dimension.items():
                for tensor in tensors:
                    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _compile_limit() -> Any:
    """Every shape of a batch is compiled anew; past the limit torch would silently run single kernels."""
    return torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, fail_on_recompile_limit_hit=True)
