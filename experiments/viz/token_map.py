"""A picture's vision tokens in two dimensions: those that a system kept and those that it dropped.

While a job runs, the tokens of its first examples are reduced to their principal components and stored beside the
examples. The report draws them with t-SNE where scikit-learn is installed (`pip install -e '.[viz]'`), otherwise with
the first two components; the caption says which. van der Maaten and Hinton (2008), "Visualizing data using t-SNE".
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.atomic_files import write_atomic
from shirg import Selector, VisionFeatures

MAP = "{:02d}_tokens.npz"
MAPS = 2
"""Examples of a job whose tokens are stored."""
COMPONENTS = 30
PERPLEXITY, ITERATIONS = 30, 500


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one picture."""

    components_NC: np.ndarray
    """Principal components, largest first."""
    share: float
    """Share of the variance in the first two components."""
    kept_N: np.ndarray


class TokenCapture:
    """Copies the tokens that a selector receives for some pictures, while it is open.

    Pictures are found by the samples that ask about them: of several samples, a selector may get the first alone.
    """

    def __init__(self, selector: Selector, pictures: Mapping[str, str]) -> None:
        """`pictures`: the picture's name by sample id, for the pictures to copy."""
        self.tokens: dict[str, Tensor] = {}
        self._pictures = dict(pictures)
        self._handle = selector.register_forward_pre_hook(self._copy)

    def _copy(self, _: Selector, arguments: tuple[VisionFeatures, ...]) -> None:
        features = arguments[0]
        for row, name in enumerate(features.ids):
            if name in self._pictures:
                self.tokens[self._pictures[name]] = features.tokens_BND[row].float().cpu()

    def __enter__(self) -> "TokenCapture":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def save_map(folder: Path, number: int, tokens_ND: Tensor, eligible_N: Tensor, kept: Sequence[int]) -> None:
    """Writes NN_tokens.npz beside the example: the eligible tokens' components, and which of them were kept."""
    used_N = eligible_N.cpu()
    components_NC, share = principal(tokens_ND[used_N])
    kept_N = torch.zeros(len(used_N), dtype=torch.bool)
    kept_N[list(kept)] = True
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, components=components_NC.numpy().astype(np.float16), share=share, kept=kept_N[used_N].numpy()
    )
    write_atomic(folder / MAP.format(number), buffer.getvalue(), durable=False)


def load_map(path: Path) -> TokenMap:
    """What `save_map` wrote."""
    with np.load(path) as stored:
        return TokenMap(stored["components"].astype(np.float32), float(stored["share"]), stored["kept"])


def principal(tokens_ND: Tensor) -> tuple[Tensor, float]:
    """Principal components [N, C] and the share of the variance in the first two; signs are fixed."""
    centred_ND = (tokens_ND - tokens_ND.mean(dim=0)).double()
    values_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
    vectors_DC = vectors_DD.flip(-1)[:, :COMPONENTS]
    largest_C = vectors_DC.gather(0, vectors_DC.abs().argmax(dim=0, keepdim=True))
    share = float(values_D[-2:].sum() / values_D.sum().clamp_min(1e-12))
    return (centred_ND @ (vectors_DC * largest_C.sign())).float(), share


def plane(tokens: TokenMap) -> tuple[np.ndarray, str]:
    """Positions [N, 2] and the name of the method."""
    if importlib.util.find_spec("sklearn") is None:
        return tokens.components_NC[:, :2], f"PCA, {tokens.share:.0%} of the variance"
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(tokens.components_NC) - 1) / 3)
    model: Any = TSNE(n_components=2, perplexity=perplexity, init="pca", max_iter=ITERATIONS, random_state=0)
    return model.fit_transform(tokens.components_NC), f"t-SNE, perplexity {perplexity:g}"
