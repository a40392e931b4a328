"""The language model as the denoising loop sees it: answer ids to logits, over a cache that may be cut once."""

from torch import Tensor

from lavida_adapter.attention import attention_weights
from lavida_adapter.cache import PrefixCache, StoredPrefix
from lavida_adapter.cache_select import CacheSelector, FirstStep, ShortenedCache
from lavida_adapter.denoise import LogitsFn
from lavida_adapter.engine import DecodeEngine, DecodeSteps, EagerEngine, pick
from lavida_adapter.llada import Llada
from lavida_adapter.prefix import Prefix
from lavida_adapter.timer import Timer


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
