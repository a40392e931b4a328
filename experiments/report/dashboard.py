"""Saves a workspace on Weights & Biases that shows the study's runs: scores, cost, quality against cost, kept tokens.

It needs a key (`wandb login`) and runs that were logged there: `python eval.py logger=wandb logger.offline=false ...`
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.analysis.columns import headlines, names_in_keys
from experiments.analysis.table import read_table, records
from experiments.errors import CommandParser, fail

if TYPE_CHECKING:
    from wandb_workspaces import workspaces

PROJECT = "shirg"
"""The project of conf/logger/wandb.yaml."""


def workspace(study: str, frame: pd.DataFrame, entity: str, project: str = PROJECT) -> "workspaces.Workspace":
    """The workspace of a study, not saved: nothing is sent or requested."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    rows = records(frame)
    quality = list(dict.fromkeys(key.removeprefix("subset ") for _, key, _ in headlines(rows)))
    stages = [stage for stage in names_in_keys(rows, "", " ms") if stage != "total"]
    total, tokens = "ms total", "tokens visual"
    summary = panels.SummaryMetric
    bars = [panels.BarPlot(title=name, metrics=[summary(name)]) for name in quality]
    sections = [
        workspaces.Section("Scores", panels=[*bars], is_open=True),
        workspaces.Section(
            "Quality against cost",
            panels=[
                panels.ScatterPlot(title=f"{name} against {cost}", x=summary(cost), y=summary(name))
                for name in quality
                for cost in (total, tokens)
            ],
            is_open=True,
        ),
        workspaces.Section(
            "Cost",
            panels=[
                *(
                    panels.BarPlot(title=f"{stage}, ms per sample", metrics=[summary(f"ms {stage}")])
                    for stage in stages
                ),
                panels.BarPlot(title="peak memory, MiB", metrics=[summary("peak_memory_mib")]),
            ],
        ),
        workspaces.Section("What was kept", panels=[panels.MediaBrowser(media_keys=["kept tokens"], num_columns=4)]),
        workspaces.Section("Configs", panels=[panels.RunComparer(diff_only=True)]),
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"study {study}",
        sections=sections,
        runset_settings=workspaces.RunsetSettings(filters=workspaces.And(workspaces.Metric("Group") == study)),
    )


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m experiments.report.dashboard", description=__doc__)
    parser.add_argument("study", type=Path, help="a study's folder, for example outputs/demo")
    parser.add_argument("words", nargs="*", metavar="entity=NAME project=NAME", help="a user or a team; the project")
    parsed = parser.parse_args(arguments)
    options = dict(word.partition("=")[::2] for word in parsed.words)
    if not options.get("entity") or options.keys() - {"entity", "project"}:
        fail("give entity=NAME, a user or a team, and nothing else but project=NAME")
    frame = read_table(parsed.study)
    if frame.empty:
        fail(f"{parsed.study}: there is no evaluated job in it; give the folder of a study, for example outputs/demo")
    if importlib.util.find_spec("wandb_workspaces") is None:
        fail("wandb-workspaces is not installed: pip install -c constraints.txt -e '.[viz]'")
    import wandb

    if not wandb.login(prompt=False):
        fail("there is no key for Weights & Biases: wandb login")
    made = workspace(parsed.study.name, frame, options["entity"], options.get("project", PROJECT))
    made.save()
    print(made.url)


if __name__ == "__main__":
    main(sys.argv[1:])
