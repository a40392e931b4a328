"""Steps whose shapes and tensors stay the same from question to question, replayed as CUDA graphs.

Prefixes are filled up to the next multiple of BUCKET slots, which a mask hides, so that one recording serves every
prompt of about that length. The plain twin is `lavida_adapter.engine.DecodeSteps`: same function, same answers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lavida_adapter.cache import Slots, StoredPrefix
from lavida_adapter.engine import answer_angles, step_logits
from lavida_adapter.llada import Llada

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
            ValueError: for a prefix that is not kept as it is: packed, or longer in one layer than in another.
        """
        n = cache.n_slots(0)
        if cache.is_packed or any(cache.n_slots(i) != n for i in range(len(self.lm.layers))):
            raise ValueError(
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
