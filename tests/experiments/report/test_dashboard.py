"""The workspace on Weights & Biases, built without the network."""

from pathlib import Path

import pytest

from experiments.analysis.table import read_table
from experiments.report.dashboard import workspace


def test_a_workspace_is_made_without_the_network(study: Path) -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    made = workspace(study.name, read_table(study), "somebody")
    assert isinstance(made, workspaces.Workspace)
    assert [section.name for section in made.sections][:2] == ["Scores", "Quality against cost"]
    wire = made._to_model().spec.model_dump_json()
    for metric in ("fine sparse", "ms select", "tokens visual"):
        assert metric in wire
    assert f'"{study.name}"' in wire, "only this study's runs"
