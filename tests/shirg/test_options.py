"""The options of SHIRG: each value changes what the model reads."""

from dataclasses import MISSING, fields
from typing import Any

import pytest

from shirg import ShirgSelector
from shirg.options import ShirgOptions
from tests.features import differs, make_features, through

SMALL = {"scaffold": {"size": 3}}
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"weights": {"similarity": 0.2}}),
    ({}, {"weights": {"neighbour": 0}}),
    ({"crop_term": "border"}, {"crop_term": "border", "weights": {"crop": 0.6}}),
    *(({}, {"neighbour": {"metric": metric}}) for metric in ("feature_cos", "local_var", "position")),
    ({}, {"neighbour": {"sign": 1}}),
    *(({}, {"norm": norm}) for norm in ("minmax", "rank", "none")),
    *(({}, {"weights": {"crop": 0.6}, "crop_term": t}) for t in ("border", "literal")),
    *(({}, {"weights": {name: 0.5}}) for name in ("centre", "variance", "edge")),
    ({}, {"merge": {"mode": "tome"}}),
    ({"merge": {"mode": "tome"}}, {"merge": {"mode": "tome", "share": 0.1}}),
    ({}, {"diversity": {"mode": "mmr"}}),
    ({"diversity": {"mode": "mmr"}}, {"diversity": {"mode": "mmr", "weight": 0.1}}),
    ({}, {"allocation": {"mode": "evidence_context"}}),
    *(
        ({"allocation": {"mode": "evidence_context"}}, {"allocation": {"mode": "evidence_context", name: value}})
        for name, value in (("evidence", 7), ("evidence", 0.2), ("mass", 0.1))
    ),
    ({}, {"adaptive": {"mode": "entropy", "temperature": 0.2}}),
    ({"adaptive": {"mode": "entropy", "temperature": 0.2}}, {"adaptive": {"mode": "entropy", "temperature": 5.0}}),
    (
        {"adaptive": {"mode": "entropy", "temperature": 0.2}},
        {"adaptive": {"mode": "entropy", "temperature": 0.2, "levels": [0.2, 1.0]}},
    ),
    ({}, {"adaptive": {"mode": "head", "levels": [0.4, 1.0], "tolerance": 0.7}}),
    ({}, {"scaffold": {"size": 4}}),
    ({"scaffold": {"size": 0}}, {"scaffold": {"size": "1/2"}}),
    ({}, {"scaffold": {"size": 0}}),
    ({}, {"scaffold": {"size": 3, "source": "canvas"}}),
    ({}, {"scaffold": {"size": 3, "space": "post"}}),
]
"""Each field of each group, and each value of each choice: (options to compare with, options)."""


@pytest.mark.parametrize(("base", "options"), CHANGES, ids=lambda options: str(options))
def test_every_value_changes_what_the_model_reads(base: dict[str, Any], options: dict[str, Any]) -> None:
    features = make_features((2, 2), sizes=[(640, 480), (480, 640)])
    here = through(ShirgSelector(budget=69, **{**SMALL, **base}), features)
    assert differs(here, through(ShirgSelector(budget=69, **{**SMALL, **options}), features))


def test_every_field_of_every_group_is_tried() -> None:
    tried = {
        (group, name)
        for _, options in CHANGES
        for group, value in options.items()
        if isinstance(value, dict)
        for name in value
    }
    groups = {f.name: f.default_factory() for f in fields(ShirgOptions) if f.default_factory is not MISSING}
    assert len(groups) == 7 and tried == {(name, f.name) for name, group in groups.items() for f in fields(group)}


@pytest.mark.parametrize("weights", [{}, {"crop": 0}, {"crop": 0.0}, {"crop": 0.1}, {"neighbour": 0.0}], ids=str)
def test_the_weight_of_a_term_that_is_left_out(weights: dict[str, float]) -> None:
    """Its default and 0, which the files of variants give, say the same: no crop term, no neighbour term."""
    features = make_features((2, 2), sizes=[(640, 480)])
    plain = ShirgSelector(budget=69, **SMALL)(features)
    assert differs(plain, ShirgSelector(budget=69, weights=weights, **SMALL)(features)) == ("neighbour" in weights)
