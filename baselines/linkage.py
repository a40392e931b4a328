"""Single linkage: the connected components of "more similar than a threshold", for every threshold at once.

Shape letters: X graphs, S nodes of a graph, M slots, N columns.
"""

import math

import torch
from torch import Tensor

BOTTOM = -2.0
"""A threshold below every cosine."""
APART = -4.0
"""A similarity below every threshold: for nodes that must not be joined."""


def spanning_tree(similarity_XSS: Tensor) -> tuple[Tensor, Tensor]:
    """A maximum spanning tree of each graph by Prim's algorithm, of S - 1 steps.

    Returns the parent of each node, int64 [X, S], and the similarity to it, float32 [X, S]. Node 0 is the root: it is
    its own parent, at -inf. Every path from a node to its parents passes nodes that were reached earlier.
    """
    x, s = similarity_XSS.shape[:2]
    table_YS, first_X1 = similarity_XSS.reshape(x * s, s), s * torch.arange(x, device=similarity_XSS.device)[:, None]
    root_X1 = torch.zeros_like(first_X1)
    parent_XS = root_X1.expand(x, s)
    gone_XS = torch.zeros_like(similarity_XSS[:, 0]).scatter(1, root_X1, -torch.inf)
    left_XS = similarity_XSS[:, 0] + gone_XS
    nodes, weights = [root_X1], [torch.full_like(left_XS[:, :1], -torch.inf)]
    for _ in range(s - 1):
        weight_X1, node_X1 = left_XS.max(-1, keepdim=True)
        nodes.append(node_X1)
        weights.append(weight_X1)
        gone_XS = gone_XS.scatter(1, node_X1, -torch.inf)
        left_XS = left_XS.scatter(1, node_X1, -torch.inf)
        row_XS = table_YS.index_select(0, (first_X1 + node_X1).squeeze(-1)) + gone_XS
        parent_XS = torch.where(row_XS > left_XS, node_X1, parent_XS)
        left_XS = torch.maximum(left_XS, row_XS)
    weight_XS = torch.empty_like(left_XS).scatter(1, torch.cat(nodes, dim=1), torch.cat(weights, dim=1))
    return parent_XS, weight_XS


def cut(parent_XS: Tensor, weight_XS: Tensor, threshold_X: Tensor) -> Tensor:
    """The root of each node, int64 [X, S], in the trees that are left without edges at or below the threshold."""
    own_S = torch.arange(parent_XS.shape[1], device=parent_XS.device)
    return roots(torch.where(weight_XS > threshold_X[:, None], parent_XS, own_S), depth=len(own_S) - 1)


def roots(parent_XS: Tensor, depth: int) -> Tensor:
    """The root of each node of forests that are at most `depth` edges deep."""
    for _ in range(math.ceil(math.log2(max(depth, 1)))):
        parent_XS = parent_XS.gather(1, parent_XS)
    return parent_XS


def components(near_XSS: Tensor) -> Tensor:
    """One node of each node's connected component, the same for all of them, int64 [X, S]; `near` is symmetric, bool.

    In each round a component joins its neighbour of the lowest number, or, if its own number is lower, that of the
    highest. No component with a neighbour stays alone, so their number falls at least by half, and ceil(log2 S) rounds
    are enough. After a join to the highest the next join goes back below, so the only circles are two components that
    join each other.
    """
    x, s = near_XSS.shape[:2]
    number = torch.int16 if s < 2**15 else torch.int32
    # -1 has every bit set: "and" with it keeps a label, and 0 is no label.
    bits_XSS = near_XSS.to(number).neg_()
    own_XS = torch.arange(s, device=near_XSS.device).expand(x, s)
    label_XS = own_XS
    rounds = math.ceil(math.log2(max(s, 2)))
    for done in range(rounds):
        low_XS, high_XS = (
            torch.zeros_like(own_XS).scatter_reduce(
                1, label_XS, (bits_XSS & mark_XS.to(number)[:, None]).amax(-1).long(), "amax"
            )
            for mark_XS in (s - label_XS, label_XS + 1)
        )
        low_XS, high_XS = s - low_XS, high_XS - 1
        parent_XS = torch.where(low_XS < own_XS, low_XS, torch.maximum(high_XS, own_XS))
        is_circle_XS = (parent_XS.gather(1, parent_XS) == own_XS) & (own_XS < parent_XS)
        parent_XS = torch.where(is_circle_XS, own_XS, parent_XS)
        label_XS = roots(parent_XS, depth=max(s >> done, 2) - 1).gather(1, label_XS)
    return label_XS


def sum_rows(values_XSN: Tensor, slot_XS: Tensor, slots: int) -> Tensor:
    """The sum of the rows of each slot, [X, slots, N].

    On a CPU the rows are added one after the other. A GPU would add them in another order in every run, so there it is
    a product with a 0-1 matrix.
    """
    x, s, n = values_XSN.shape
    if values_XSN.device.type != "cpu":
        return is_slot(slot_XS, slots).to(values_XSN.dtype) @ values_XSN
    row_XS = slot_XS + slots * torch.arange(x)[:, None]
    sums_YN = values_XSN.new_zeros(x * slots, n).index_add(0, row_XS.flatten(), values_XSN.reshape(x * s, n))
    return sums_YN.view(x, slots, n)


def is_slot(slot_XS: Tensor, slots: int) -> Tensor:
    """bool [X, slots, S]: which nodes are in which slot."""
    return slot_XS[:, None] == torch.arange(slots, device=slot_XS.device)[:, None]
