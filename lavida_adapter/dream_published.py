"""Dream's sampler, and its published loop step by step, quirks included, for comparison with the published numbers.

docs/lavida.md, "Dream's decoding", lists what `decode.parity=true` keeps: every step runs, the masks of all rows are
one pool, confidence has the type of the logits, and `topk` breaks its ties.

Shape letters: B batch, A answer slots, M masks of all rows one after the other, W vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.decode_config import DecodeConfig, Rule
from lavida_adapter.dream_sampling import commit_dream, confidence_under, number_of_candidates
from lavida_adapter.sampling import Denoised, LogitsFn, Sampler, check_eps
from lavida_adapter.schedules import grid_count, grid_shares, tokens_per_step
from shirg import UserError


def check_dream(config: DecodeConfig) -> None:
    """Raises UserError for what Dream's sampler does not have."""
    check_eps(config, on_grid=config.schedule in ("none", "time_grid") and config.threshold is None)
    if not config.parity:
        return
    if config.block_length is not None:
        raise UserError(
            f"decode.parity=true repeats Dream's published sampler, which has no blocks, and decode.block_length="
            f"{config.block_length}: leave it out, or use decode.parity=false"
        )
    if config.remasking == "random":
        raise UserError(
            "decode.parity=true repeats Dream's published sampler, which has no decode.remasking=random: choose "
            "origin, or use decode.parity=false"
        )
    if config.steps_per_block > config.grid_steps:
        raise UserError(
            f"decode.parity=true repeats Dream's published sampler, whose time grid has {config.grid_steps} steps "
            f"(decode.step_per_block), and decode.step_ratio asks for {config.steps_per_block}: lower it"
        )


def denoise_published(
    logits_of: LogitsFn, ids_BA: Tensor, config: DecodeConfig, mask_id: int, generator: torch.Generator | None
) -> Denoised:
    """Fills masks as the published sampler does; some may remain. For the same generator it makes the same draws.

    Raises:
        UserError: when a named schedule has more steps than the first row has masks, where the published code fails.
    """
    ids_BA = ids_BA.clone()
    steps = config.steps_per_block
    counts = scheduled_counts(int((ids_BA[0] == mask_id).sum()), steps, config)
    history: list[Tensor] = []
    for step, share in enumerate(grid_shares(config.grid_steps, config.eps)[:steps]):
        logits_MW = logits_of(ids_BA, None)[ids_BA == mask_id]
        n_masks = len(logits_MW)
        last = step + 1 == steps
        if counts is not None:
            k = counts[step]
        else:
            k = n_masks if last else grid_count(n_masks, share)
        new_M = torch.full((n_masks,), mask_id, device=ids_BA.device)
        if config.remasking == "origin":
            u_M = torch.rand(n_masks, device=ids_BA.device, generator=generator)
            chosen_K = torch.nonzero(u_M < (1 if last else share.item()))[:, 0]
            new_M[chosen_K], _ = predict(logits_MW[chosen_K], config.rule, generator)
        elif n_masks > 0:
            tokens_M, sure_M = predict(logits_MW, config.rule, generator)
            chosen_K = chosen(sure_M, k, config.alg_temp, generator)
            new_M[chosen_K] = tokens_M[chosen_K]
        ids_BA = ids_BA.masked_scatter(ids_BA == mask_id, new_M)
        if config.keep_history:
            history.append(ids_BA)
    return ids_BA, steps, [steps] * len(ids_BA), history


def predict(logits_MW: Tensor, rule: Rule, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Candidates and confidence [M] in the type of the logits."""
    p_MW = filtered(logits_MW, rule).softmax(-1)
    tokens_M = torch.multinomial(p_MW, 1, generator=generator)[:, 0] if rule.temperature > 0 else p_MW.argmax(-1)
    return tokens_M, confidence_under(p_MW, tokens_M, rule.remasking)


def filtered(logits_MW: Tensor, rule: Rule) -> Tensor:
    """Logits over the temperature; a token outside top-p or top-k has the type's lowest finite number.

    Top-k keeps all that equal the k-th of what top-p has left.
    """
    lowest = torch.finfo(logits_MW.dtype).min
    if rule.temperature > 0:
        logits_MW = logits_MW / rule.temperature
    if rule.top_p is not None and rule.top_p < 1:
        ranked_MW, order_MW = logits_MW.sort(dim=-1, descending=True)
        beyond_MW = ranked_MW.softmax(-1).cumsum(-1) > rule.top_p
        after_MW = F.pad(beyond_MW[:, :-1], (1, 0), value=False)
        logits_MW = logits_MW.masked_fill(torch.zeros_like(after_MW).scatter(-1, order_MW, after_MW), lowest)
    top_k = number_of_candidates(rule)
    if top_k is not None:
        least_M1 = logits_MW.topk(min(top_k, logits_MW.shape[-1]), dim=-1).values[:, -1:]
        logits_MW = logits_MW.masked_fill(logits_MW < least_M1, lowest)
    return logits_MW


def scheduled_counts(n_masks: int, steps: int, config: DecodeConfig) -> list[int] | None:
    """The counts of a named schedule for the first row's masks; None where the time grid decides at every step."""
    if config.schedule in ("none", "time_grid") or steps == 0:
        return None
    if steps > n_masks:
        raise UserError(
            f"decode.parity=true repeats Dream's published sampler, which cannot spread {n_masks} masks over {steps} "
            f"steps with decode.schedule={config.schedule}: lower decode.step_ratio, or use decode.parity=false"
        )
    return tokens_per_step(n_masks, steps, config.schedule, config.shift)


def chosen(sure_M: Tensor, k: int, alg_temp: float, generator: torch.Generator | None) -> Tensor:
    """The places [k] of the surest candidates, or k draws by their softmax without replacement."""
    if alg_temp == 0:
        return sure_M.topk(k).indices
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=sure_M.device)
    return torch.multinomial((sure_M / alg_temp).softmax(-1), k, generator=generator)


DREAM_SAMPLER = Sampler("time_grid", check_dream, commit_dream, denoise_published)
