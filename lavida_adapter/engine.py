"""The denoising step: answer ids to logits over a stored prefix, with nothing computed that cannot have changed.

Keys of the prefix were rotated once, at the prefill. The answer's keys and values are written behind them, in place.
The last layer and the head run for the slots that may be written alone (docs/lavida.md, "Engine").

Shape letters: B batch, P prefix slots, A answer slots, M wanted slots.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lavida_adapter.cache_compression.compressor import CacheSelector, FirstStep, ShortenedCache
from lavida_adapter.generate import LogitsFn
from lavida_adapter.kv_cache import PrefixCache, Slots, StoredPrefix
from lavida_adapter.llada import AttentionHook, Llada, attention_mask, attention_weights
from lavida_adapter.prefix import Prefix
from lavida_adapter.timing import Timer
from shirg import UserError

Open = Callable[[int], tuple[Tensor, Tensor]]
"""A layer's keys and values [B, H, P + A, Dh]."""

Step = Callable[..., Tensor]
"""`step_logits`, or what is compiled from it."""


def step_logits(
    lm: Llada,
    ids_BA: Tensor,
    want_BM: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    masks: Sequence[Tensor | None],
    open_layer: Open,
    watch: AttentionHook | None = None,
) -> Tensor:
    """Logits [B, M, W] of the wanted slots, or of all when that is None.

    `cos`, `sin`: the answer's rotary positions [B, 1, A, Dh]. `masks`: by layer, where keys may be seen, broadcastable
    to [B, H, A, P + A]; None is everywhere. `watch` looks at the queries of every slot and needs all of them wanted.
    """
    x = lm.wte(ids_BA)
    n_answer = ids_BA.shape[1]
    for i, block in enumerate(lm.layers):
        u = block.attn_norm(x)
        keys, values = open_layer(i)
        k, v = block.keys_values(u, cos, sin)
        keys[:, :, -n_answer:].copy_(k)
        values[:, :, -n_answer:].copy_(v)
        if want_BM is not None and i + 1 == len(lm.layers):
            x, u = pick(x, want_BM), pick(u, want_BM)
            cos, sin = (pick(t[:, 0].expand(len(x), -1, -1), want_BM)[:, None] for t in (cos, sin))
        x = block.mix(x, u, keys, values, cos, sin, masks[i], lm.backend, watch)
    return lm.logits(lm.ln_f(x))


def pick(x_BAD: Tensor, want_BM: Tensor) -> Tensor:
    """Rows [B, M, D] by slot."""
    return x_BAD.gather(1, want_BM[..., None].expand(-1, -1, x_BAD.shape[-1]))


class PrefixReader:
    """The slots of every layer with the prefix in them: resident, or for a packed prefix one layer's at a time."""

    def __init__(self, cache: StoredPrefix, n_layers: int, n_answer: int) -> None:
        self.cache = cache
        self.lengths = [cache.n_slots(i) for i in range(n_layers)]
        given = cache.slots if isinstance(cache, PrefixCache) else None
        if given is not None and given.n_answer == n_answer:
            self.slots = given
        elif cache.is_packed:
            self.slots = Slots(cache.layer(0)[0], [max(self.lengths)], n_answer)
        else:
            self.slots = Slots(cache.layer(0)[0], self.lengths, n_answer)
            for i in range(n_layers):
                self.slots.write(i, *cache.layer(i))

    def open(self, layer: int) -> tuple[Tensor, Tensor]:
        if not self.cache.is_packed:
            return self.slots.keys[layer], self.slots.values[layer]
        self.slots.write(0, *self.cache.layer(layer))
        end = self.lengths[layer] + self.slots.n_answer
        return self.slots.keys[0][:, :, :end], self.slots.values[0][:, :, :end]


class DecodeEngine(Protocol):
    """How prefill and steps of a language model are launched."""

    lm: Llada
    prefill: Callable[..., PrefixCache]
    """`Llada.prefill`."""

    def steps(self, cache: StoredPrefix, n_answer: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Answer ids [B, A] and wanted slots [B, M], None for all, to logits [B, M, W] over one stored prefix."""


class EagerEngine:
    """One kernel after the other."""

    def __init__(self, lm: Llada) -> None:
        self.lm, self.prefill = lm, lm.prefill

    def steps(self, cache: StoredPrefix, n_answer: int) -> "DecodeSteps":
        return DecodeSteps(self.lm, cache, n_answer)


class DecodeSteps:
    """Logits of one batch of answers, step by step, over one stored prefix."""

    def __init__(self, lm: Llada, cache: StoredPrefix, n_answer: int, step: Step = step_logits) -> None:
        self.lm, self.cache, self._step = lm, cache, step
        self.reader = PrefixReader(cache, len(lm.layers), n_answer)
        self._cos, self._sin = answer_angles(lm, cache, n_answer)
        self._masks = [step_mask(cache.mask(i), n_answer) for i in range(len(lm.layers))]

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None, watch: AttentionHook | None = None) -> Tensor:
        return self._step(self.lm, ids_BA, want_BM, self._cos, self._sin, self._masks, self.reader.open, watch)


def answer_angles(lm: Llada, cache: StoredPrefix, n_answer: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, A, Dh] of the answer's rotary positions, which begin behind the prefix's last."""
    first_B = cache.next_position_B
    return lm.angles(first_B[:, None] + torch.arange(n_answer, device=first_B.device))


def step_mask(mask_BP: Tensor | None, n_answer: int) -> Tensor | None:
    """Where an answer may look [B, 1, 1, P + A]: at the prefix's used slots and at all of itself."""
    if mask_BP is None:
        return None
    return attention_mask(torch.nn.functional.pad(mask_BP, (0, n_answer), value=True), None)


class CachedSteps:
    """Logits of every step against one cache; a selector cuts it after the prefill or between two steps.

    The stage "cache" is the cut. What a first step adds for being watched counts as denoising.
    """

    def __init__(
        self,
        lm: Llada,
        prefix: Prefix,
        cache: StoredPrefix,
        n_answer: int,
        selector: CacheSelector | None,
        timer: Timer,
        launcher: DecodeEngine | None = None,
    ) -> None:
        """Without a `launcher` steps are eager; the step that a selector watches is so in any case."""
        self.lm, self.prefix, self.timer = lm, prefix, timer
        self.cache: StoredPrefix = cache
        self._n_answer = n_answer
        self._launcher = launcher or EagerEngine(lm)
        self._steps: LogitsFn | None = None
        self._kept_BP = prefix.mask_BP
        self._selector = selector
        self._pending = selector
        self._seen: tuple[AttentionMean, Tensor] | None = None
        if selector is not None and selector.after == "prefill":
            self._cut(None)

    @property
    def cached_BP(self) -> Tensor | None:
        """Slots of the prefix that are in the cache; None without a selector."""
        return None if self._selector is None else self._kept_BP

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        if self._seen is not None:
            attention, logits_BAW = self._seen
            self._cut(FirstStep(attention.mean_BAP, ids_BA == self.lm.config.mask_token_id, logits_BAW))
        if self._pending is not None:
            watch = AttentionMean(self.cache.n_slots(0))
            logits_BAW = DecodeSteps(self.lm, self.cache, self._n_answer)(ids_BA, watch=watch)
            self._seen = watch, logits_BAW.clone()  # the loop may write to what it gets
            return logits_BAW if want_BM is None else pick(logits_BAW, want_BM)
        if self._steps is None:
            self._steps = self._launcher.steps(self.cache, self._n_answer)
        return self._steps(ids_BA, want_BM)

    def _cut(self, first: FirstStep | None) -> None:
        assert self._pending is not None and isinstance(self.cache, PrefixCache)
        with self.timer.stage("cache"):
            cut: ShortenedCache = self._pending(self.lm, self.cache, self.prefix, first)
        self.cache, self._kept_BP, self._pending, self._seen = cut.cache, cut.kept_BP, None, None
        self._steps = None


class AttentionMean:
    """The attention of all queries to the first P keys, averaged over heads and layers as these go by."""

    def __init__(self, n_prefix: int) -> None:
        self._n_prefix = n_prefix
        self._n_layers = 0
        self._sum_BAP: Tensor | None = None

    def __call__(self, q_BHAD: Tensor, k_BHKD: Tensor, mask: Tensor | None) -> None:
        layer_BAP = attention_weights(q_BHAD, k_BHKD, mask).mean(1)[..., : self._n_prefix]
        self._sum_BAP = layer_BAP if self._sum_BAP is None else self._sum_BAP + layer_BAP
        self._n_layers += 1

    @property
    def mean_BAP(self) -> Tensor:
        assert self._sum_BAP is not None
        return self._sum_BAP / self._n_layers


class CompiledEngine:
    """One language model, compiled the first time it is used with a kind of shapes: one prompt or several, padded or
    not. A CPU then runs prefixes as long as they are; on CUDA steps are recorded as graphs too."""

    def __init__(self, lm: Llada) -> None:
        """
        Raises:
            UserError: on a CPU without a C++ compiler.
        """
        self.lm = lm
        options: dict[str, Any] | None = None
        if lm.wte.weight.is_cuda:
            self._recorder: GraphCache | None = GraphCache(lm, compiled=True)
        else:
            self._recorder = None
            check_compiler()
            store_by_column(lm)
            options = {"cpp_wrapper": True}  # launches kernels from C++ too: a tenth of a small step
        self._step = torch.compile(step_logits, dynamic=True, options=options)
        self._prefill: Callable[..., PrefixCache] = torch.compile(lm.prefill, dynamic=True, options=options)
        self.prefill: Callable[..., PrefixCache] = self._prefill_with_angles

    def _prefill_with_angles(self, embeds_BPD: Tensor, *rest: Any) -> PrefixCache:
        """A compiler would make the angles again wherever they are used."""
        angles = self.lm.angles(torch.arange(embeds_BPD.shape[1], device=embeds_BPD.device)[None])
        return self._prefill(embeds_BPD, *rest, angles=angles)

    def steps(self, cache: StoredPrefix, n_answer: int) -> "ReplayedSteps | CompiledSteps":
        if self._recorder is not None:
            return self._recorder.steps(cache, n_answer)
        return CompiledSteps(DecodeSteps(self.lm, cache, n_answer, self._step))


class CompiledSteps:
    """Compiled steps that always get slots: "all of them" would be a function of its own to compile."""

    def __init__(self, steps: DecodeSteps) -> None:
        self._steps = steps

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None) -> Tensor:
        if want_BM is None:
            want_BM = torch.arange(ids_BA.shape[1], device=ids_BA.device).expand(len(ids_BA), -1)
        return self._steps(ids_BA, want_BM)


def check_compiler() -> None:
    """Raises UserError when what torch would call to compile for the CPU is not there."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"decode.engine=compile needs a C++ compiler on a CPU, and there is no {name!r} on the path: install one, "
            "name another in CXX, or use decode.engine=eager"
        )


@torch.inference_mode(False)
def store_by_column(module: nn.Module) -> None:
    """Stores float32 weights [out, in] of linear layers with `out` as the inner dimension; values stay what they are.

    With the few rows of a denoising step, a product of torch's spends a third of its time on bringing weights into this
    order. With many rows it makes no difference. Last digits change, because sums are taken in another order.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()


BUCKET = 64
KEPT = 4
"""Recordings that are kept, the last used ones: each holds the keys and values of one batch."""

_Key = tuple[int, int, int, int, torch.dtype, torch.device]


@dataclass
class CapturedGraph:
    """One step with all that it reads and writes: B rows, a bucket of prefix slots, A answer slots, M wanted slots."""

    slots: Slots
    ids_BA: Tensor
    want_BM: Tensor | None
    cos: Tensor
    sin: Tensor
    mask_B11K: Tensor
    logits_BMW: Tensor | None = None
    graph: "torch.cuda.CUDAGraph | None" = None


class GraphCache:
    """Makes and keeps the recordings of one language model."""

    def __init__(self, lm: Llada, *, compiled: bool = False) -> None:
        """`compiled`: what is recorded has been compiled by torch before."""
        self.lm, self.prefill = lm, lm.prefill
        self._step = torch.compile(_resident_logits, dynamic=False) if compiled else _resident_logits
        self._kept: dict[_Key, CapturedGraph] = {}

    def steps(self, cache: StoredPrefix, n_answer: int) -> "ReplayedSteps":
        return ReplayedSteps(self, cache)

    def recording(self, cache: StoredPrefix, ids_BA: Tensor, want_BM: Tensor | None) -> CapturedGraph:
        """The recording for these shapes, with the prefix in it.

        Raises:
            UserError: for a prefix that is not kept as it is: packed, or longer in one layer than in another.
        """
        n = cache.n_slots(0)
        if cache.is_packed or any(cache.n_slots(i) != n for i in range(len(self.lm.layers))):
            raise UserError(
                "decode.engine=graph and compile read caches of one length in the model's own type: choose "
                "decode.engine=eager"
            )
        keys, _ = cache.layer(0)
        (b, a), m = ids_BA.shape, -1 if want_BM is None else want_BM.shape[1]
        bucket = -(-n // BUCKET) * BUCKET
        key = (b, a, m, bucket, keys.dtype, keys.device)
        found = self._kept.pop(key, None) or self._blank(cache, keys, bucket, ids_BA, want_BM)
        self._kept[key] = found
        while len(self._kept) > KEPT:
            self._kept.pop(next(iter(self._kept)))
        for i in range(len(self.lm.layers)):
            found.slots.write(i, *cache.layer(i))
        for target, source in zip((found.cos, found.sin), answer_angles(self.lm, cache, a), strict=True):
            target.copy_(source.expand_as(target))
        found.mask_B11K[..., :bucket] = False
        mask_BP = cache.mask(0)
        found.mask_B11K[..., :n] = True if mask_BP is None else mask_BP[:, None, None]
        return found

    def _blank(
        self, cache: StoredPrefix, keys: Tensor, bucket: int, ids_BA: Tensor, want_BM: Tensor | None
    ) -> CapturedGraph:
        b, a = ids_BA.shape
        cos, sin = (t.expand(b, -1, -1, -1).clone() for t in answer_angles(self.lm, cache, a))
        return CapturedGraph(
            Slots(keys, [bucket] * len(self.lm.layers), a),
            ids_BA.clone(),
            None if want_BM is None else want_BM.clone(),
            cos,
            sin,
            torch.ones(b, 1, 1, bucket + a, dtype=torch.bool, device=keys.device),
        )

    def replay(self, recording: CapturedGraph) -> Tensor:
        """Runs the step on what the recording's tensors hold now; on CUDA the first time records it."""
        if recording.graph is not None:
            recording.graph.replay()
        elif recording.ids_BA.is_cuda:
            self._capture(recording)
        else:
            recording.logits_BMW = self._step(self.lm, recording)
        assert recording.logits_BMW is not None
        return recording.logits_BMW

    def _capture(self, recording: CapturedGraph) -> None:
        """Runs the step a few times on a side stream, as CUDA asks for, then records and replays it."""
        side = torch.cuda.Stream(recording.ids_BA.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(self.lm, recording)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recording.logits_BMW = self._step(self.lm, recording)
        recording.graph = graph
        graph.replay()


class ReplayedSteps:
    """Like `Steps`, from a recording."""

    def __init__(self, recorder: GraphCache, cache: StoredPrefix) -> None:
        self._recorder, self._cache = recorder, cache
        self._recording: CapturedGraph | None = None

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None) -> Tensor:
        if self._recording is None:
            self._recording = self._recorder.recording(self._cache, ids_BA, want_BM)
        self._recording.ids_BA.copy_(ids_BA)
        if want_BM is not None:
            assert self._recording.want_BM is not None
            self._recording.want_BM.copy_(want_BM)
        return self._recorder.replay(self._recording)


def _resident_logits(lm: Llada, r: CapturedGraph) -> Tensor:
    slots, masks = r.slots, [r.mask_B11K] * len(lm.layers)
    return step_logits(lm, r.ids_BA, r.want_BM, r.cos, r.sin, masks, lambda i: (slots.keys[i], slots.values[i]))
