"""The gradient of a loss with respect to which tokens are kept: a straight-through estimate in the attention.

docs/method.md, "Learned relevance". All tokens are in the prefix, but those that the selector drops have the gate 0:
they are seen by nobody, and they take no position, so that the loss is exactly that of the shortened prefix. In the
backward pass a gate has the derivative of a sigmoid of its score, so that dropped tokens, too, learn what seeing them
would have changed. A gate that multiplies an embedding would be undone by the norm behind it.

Shape letters: B prompts, N source tokens, S synthesised tokens, L positions, H heads, Dh head size, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.attention import attention_mask
from lavida_adapter.encode import PictureEncoder, PicturePrompts
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.loss import TrainBatch, rows_alone
from lavida_adapter.modules import LavidaModules
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import IGNORE
from lavida_adapter.relevance import RelevanceContext
from lavida_adapter.timing import NoTimer
from shirg import Selection, Selector, Source, UserError, VisionFeatures, join, keep
from shirg.relevance_head import standardised


class WithGraph:
    """A learned relevance that computes with a graph where the encoder does not, and keeps what it computed."""

    space, reads_question = "learned", True

    def __init__(self, learned: Learned) -> None:
        self.learned = learned
        self.scores: dict[str, Tensor] = {}
        self.competing: dict[str, Tensor] = {}
        """bool [N]: what the selector may choose from."""

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        with torch.enable_grad():
            scores_BN = self.learned(features, context)
            self.scores |= dict(zip(features.ids, scores_BN, strict=True))
        self.competing |= dict(zip(features.ids, competing(features), strict=True))
        return scores_BN.detach()


class WithDropped(Selector):
    """Another selector's synthesised tokens, then all source tokens in reading order; keeps what the other chose."""

    def __init__(self, selector: Selector) -> None:
        super().__init__(budget=None, geometry=selector.geometry)
        self.selector = selector
        self.stage, self.needs, self.uses_relevance = selector.stage, selector.needs, selector.uses_relevance
        self.reads_sample = True
        self.kept: dict[str, Tensor] = {}
        """bool [S + N]: which tokens of a picture's block the other selector keeps."""

    def select(self, features: VisionFeatures) -> Selection:
        chosen = self.selector(features)
        order_N, n = features.layout.order_N, features.layout.n_tokens
        is_kept_BT = chosen.mask_BT & (chosen.source_BT == Source.KEPT)
        at_BT = torch.where(is_kept_BT, chosen.index_BT, n)
        member_BN = torch.zeros_like(features.valid_BN[:, :1]).expand(-1, n + 1).clone().scatter(1, at_BT, True)[:, :n]
        n_first = int((chosen.source_BT[0] != Source.KEPT).sum())
        if (chosen.source_BT[:, :n_first] == Source.KEPT).any() or not chosen.mask_BT.all():
            raise UserError(
                f"objective=straight_through: {type(self.selector).__name__} puts other tokens between or behind those "
                "it keeps, or uses fewer than its budget; take newlines, summary and adaptive budgets out of it"
            )
        first = replace(chosen, scores_BN=None, **{name: getattr(chosen, name)[:, :n_first] for name in _PER_SLOT})
        everything = keep(features, order_N.expand(len(member_BN), -1), torch.full_like(chosen.index_BT[:, 0], n))
        kept_BX = torch.cat([torch.ones_like(first.mask_BT), member_BN[:, order_N]], dim=1)
        self.kept |= dict(zip(features.ids, kept_BX, strict=True))
        return join(first, everything)


_PER_SLOT = ("tokens_BTD", "index_BT", "source_BT", "box_BT4", "mask_BT")


@dataclass(frozen=True)
class GatedRows:
    """Whole rows, picture with its dropped tokens, prompt and masked answer, ready for `gated_states`."""

    embeds_BLD: Tensor
    gate_BL: Tensor
    """float32: 1 or 0, with the gradient of a soft membership."""
    position_BL: Tensor
    sees_BLL: Tensor
    """bool: what each position may see, dropped tokens included."""


def competing(features: VisionFeatures) -> Tensor:
    """bool [B, N]: the tokens of the finest views that are not padding."""
    fine_N = torch.arange(features.layout.n_tokens, device=features.valid_BN.device) >= features.layout.finest[0].start
    return features.valid_BN & fine_N


def soft_gates(score_BN: Tensor, competing_BN: Tensor, member_BN: Tensor, softness: float) -> Tensor:
    """1 for members and 0 for others [B, N]; its gradient is that of sigmoid((score - threshold) / softness).

    Scores are standardised first. The threshold lies between the worst member and the best of the others that compete;
    what does not compete has no gradient.
    """
    z_BN = standardised(score_BN, competing_BN)
    worst_B1 = z_BN.masked_fill(~member_BN, float("inf")).amin(-1, keepdim=True)
    others_BN = competing_BN & ~member_BN
    best_B1 = z_BN.masked_fill(~others_BN, float("-inf")).amax(-1, keepdim=True)
    between_B1 = torch.where(others_BN.any(-1, keepdim=True), (worst_B1 + best_B1) / 2, worst_B1 - 1)
    soft_BN = ((z_BN - between_B1.detach()) / softness).sigmoid() * competing_BN
    return member_BN.float() + soft_BN - soft_BN.detach()


def gated_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, sees_BLL: Tensor, gate_BL: Tensor) -> Tensor:
    """Attention in which key j has the weight gate_j exp(score_j), normalised; float32 inside."""
    groups = q_BHLD.shape[1] // k_BHLD.shape[1]
    k, v = k_BHLD.repeat_interleave(groups, 1), v_BHLD.repeat_interleave(groups, 1)
    scores = (q_BHLD @ k.transpose(-1, -2)).float() * q_BHLD.shape[-1] ** -0.5
    counted = sees_BLL[:, None] & (gate_BL.detach() > 0)[:, None, None]
    most = scores.masked_fill(~counted, float("-inf")).amax(-1, keepdim=True).detach()
    # A dropped key may score far above all others; its weight is 0, only its gradient must stay finite.
    weights = (scores - most).clamp_max(20.0).exp() * (sees_BLL[:, None] * gate_BL[:, None, None])
    return (weights.to(v.dtype) @ v) / weights.sum(-1, keepdim=True).to(v.dtype)


def gated_states(lm: LanguageModel, rows: GatedRows) -> Tensor:
    """States [B, L, D] after the final norm."""
    x = rows.embeds_BLD
    cos, sin = lm.angles(rows.position_BL)
    for block in lm.layers:
        q, k, v = block.project(x, cos, sin)
        x = block.finish(x, gated_attention(q, k, v, rows.sees_BLL, rows.gate_BL).transpose(1, 2).flatten(-2))
    states: Tensor = lm.final_norm(x)
    return states


def straight_through_loss(
    model: LavidaModules, batch: TrainBatch, selector: Selector, learned: Learned, softness: float, *, least: int = 0
) -> Tensor:
    """Mean cross entropy of whole masked answers, differentiable in the scores of the head.

    A LoRA in the language model gets a gradient, too; one in the tower or the projector gets none.

    Raises:
        UserError: for a selector whose synthesised tokens are not all before those that it keeps.
    """
    ids = [str(i) for i in range(len(batch.questions))]
    scored, shown = WithGraph(learned), WithDropped(selector)
    texts, labels = rows_alone(model, batch, least=least)
    with torch.no_grad():
        prompts = PicturePrompts(batch.images, batch.questions, ids, batch.boxes)
        blocks, selections = PictureEncoder(model, shown, scored, NoTimer()).blocks(prompts)
    gates = []
    for name, selection in zip(ids, selections, strict=True):
        kept_X, index_X = shown.kept[name], selection.index_BT[0]
        n_first = len(kept_X) - len(scored.scores[name])
        order_N = index_X[n_first:]
        score_1N, competing_1N = (known[name][order_N][None] for known in (scored.scores, scored.competing))
        soft_N = soft_gates(score_1N, competing_1N, kept_X[None, n_first:], softness)[0]
        gates.append(torch.cat([torch.ones_like(soft_N[:1]).expand(n_first), soft_N]))
    rows, labels_BL = gated_rows(model, texts, labels, blocks, gates)
    target_BL = labels_BL != IGNORE
    at_M = target_BL.flatten().nonzero()[:, 0]
    states = gated_states(model.lm, rows)
    # With a shift, the token before an answer predicts its first token; it is never one that was dropped.
    logits_MW = model.lm.logits(states.flatten(0, 1).index_select(0, at_M - model.lm.shift))
    loss = F.cross_entropy(logits_MW.float(), labels_BL.flatten()[at_M], reduction="sum")
    return loss / len(labels_BL)


def gated_rows(
    model: LavidaModules,
    texts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    blocks: Sequence[Tensor],
    gates: Sequence[Tensor],
) -> tuple[GatedRows, Tensor]:
    """Rows with masked answers and gates for the picture's tokens, and the labels [B, L]."""
    # Dropped tokens take no position, so they do not count towards the context either.
    whole, labels_BL = splice(texts, blocks, model.lm.embedding, max_length=10**9, labels=labels)
    target_BL = labels_BL != IGNORE
    mask_D = model.lm.embedding(torch.full((), model.config.lm.mask_token_id, device=model.device))
    embeds = torch.where(target_BL[..., None], mask_D.to(whole.embeds_BPD.dtype), whole.embeds_BPD)
    gate_BL = torch.ones_like(target_BL, dtype=torch.float32).masked_scatter(whole.visual_BP, torch.cat(list(gates)))
    hard_BL = gate_BL.detach() > 0
    position_BL = (hard_BL.cumsum(-1) - hard_BL.to(torch.int64)).clamp_min(0)
    visual_BL = model.visual(whole.visual_BP)
    full_BLL = whole.mask_BP[:, None, :].expand(-1, target_BL.shape[1], -1)
    seen = attention_mask(whole.mask_BP, visual_BL) if visual_BL is not None else full_BLL[:, None]
    assert seen is not None
    # The prompt does not see the answer, as in decoding from the cache.
    sees_BLL = seen[:, 0] & (target_BL[:, :, None] | ~target_BL[:, None, :])
    return GatedRows(embeds, gate_BL, position_BL, sees_BLL), labels_BL
