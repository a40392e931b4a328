"""The oracle keeps all evidence that fits."""

import pytest
import torch

from baselines import Oracle
from experiments.metrics import entity_recall
from experiments.metrics.recall import target_tokens
from tests.features import GRIDS, SIZES, make_features


@pytest.mark.parametrize("grid", GRIDS)
def test_the_oracle_keeps_all_evidence_that_fits(grid: tuple[int, int]) -> None:
    features = make_features(grid, sizes=SIZES[grid])
    assert features.boxes is not None
    tiles = features.layout.role_N != 0 if grid != (0, 0) else features.layout.role_N == 0
    chosen = Oracle(budget=60)(features)
    for sample, boxes in enumerate(features.boxes):
        where = {
            "boxes": boxes,
            "token_box_N4": features.box_BN4()[sample],
            "eligible_N": tiles & features.valid_BN[sample],
        }
        n = int(target_tokens(**where).sum())
        assert 0 < n <= 60
        assert entity_recall(**where, kept_T=chosen.index_BT[sample]) == 1.0
        only = Oracle(budget=n)(features).index_BT[sample]
        assert torch.equal(only.sort().values, torch.where(target_tokens(**where))[0])
