"""SHIRG as one would write it with paper and loops: slow, obvious, and what the fast code must equal."""

import math

import torch

from shirg import Role, VisionFeatures


def neighbours(features: VisionFeatures, i: int, valid: list[bool]) -> list[int]:
    """Valid tokens on the 8 cells around a token, on its own grid."""
    layout = features.layout
    row, col = layout.cell_N2[i].tolist()
    return [
        j
        for j, (r, c) in enumerate(layout.cell_N2.tolist())
        if j != i and valid[j] and layout.role_N[j] == layout.role_N[i] and max(abs(r - row), abs(c - col)) == 1
    ]


def distance(features: VisionFeatures, sample: int, metric: str) -> list[float]:
    x, valid = features.tokens_BND[sample].float(), features.valid_BN[sample].tolist()
    unit = torch.nn.functional.normalize(x, dim=-1)
    cells = features.layout.cell_N2.double()
    values = []
    for i, usable in enumerate(valid):
        around = neighbours(features, i, valid) if usable else []
        if metric == "local_var":
            window = unit[[i, *around]].mean(0)
            values.append(float((unit[i] - window).square().mean()) if usable else 0.0)
        elif not around:
            values.append(0.0)
        elif metric == "feature_l2":
            values.append(float((unit[around] - unit[i]).norm(dim=-1).mean()))
        elif metric == "feature_cos":
            values.append(float((1 - unit[around] @ unit[i]).mean()))
        else:
            values.append(float((cells[around] - cells[i]).norm(dim=-1).mean()))
    return values


def zscore(values: list[float], members: list[int]) -> dict[int, float]:
    inside = [values[i] for i in members]
    mean = sum(inside) / len(inside)
    std = math.sqrt(sum((v - mean) ** 2 for v in inside) / len(inside))
    return {i: max(-3.0, min(3.0, (values[i] - mean) / (std + 1e-6))) for i in members}


def shirg980(features: VisionFeatures, sample: int, k: int, sign: int = -1) -> list[int]:
    """The k kept tokens in reading order, with the published weights."""
    assert features.relevance_BN is not None
    layout = features.layout
    relevance = features.relevance_BN[sample].tolist()
    near = distance(features, sample, "feature_l2")
    ranked: list[int] = []
    for role in (Role.TILE, Role.GLOBAL):
        members = [
            i for i in range(layout.n_tokens) if layout.role_N[i] == int(role) and bool(features.valid_BN[sample, i])
        ]
        if not members:
            continue
        r, d = zscore(relevance, members), zscore(near, members)
        score = {i: 0.65 * r[i] + sign * 0.25 * d[i] for i in members}
        ranked += sorted(members, key=lambda i: (-score[i], int(layout.rank_N[i])))
    return sorted(ranked[:k], key=lambda i: int(layout.rank_N[i]))
