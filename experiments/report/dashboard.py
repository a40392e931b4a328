"""python -m experiments.report.dashboard outputs/STUDY entity=NAME [project=shirg]

Saves a workspace on Weights & Biases that shows the study's runs: scores, cost, quality against cost, what was kept. It
needs a key (`wandb login`) and runs that were logged there: `python eval.py logger=wandb logger.offline=false ...`
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.analysis.columns import headlines
from experiments.analysis.rows import Row, collect
from experiments.errors import fail

if TYPE_CHECKING:
    from wandb_workspaces import workspaces

PROJECT = "shirg"
"""The project of conf/logger/wandb.yaml."""


def workspace(study: str, rows: Sequence[Row], entity: str, project: str = PROJECT) -> "workspaces.Workspace":
    """The workspace of a study, not saved: it asks the network for nothing."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    quality = list(dict.fromkeys(f"quality.{_metric(key)}.mean" for _, key, _ in headlines(rows)))
    stages = [key.removesuffix(" ms") for row in rows for key in row if key.endswith(" ms") and key != "total ms"]
    total, tokens = "times.ms_per_sample.total", "tokens.visual.mean"
    summary = panels.SummaryMetric
    bars = [panels.BarPlot(title=name.removesuffix(".mean"), metrics=[summary(name)]) for name in quality]
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
                    panels.BarPlot(title=f"{stage}, ms per sample", metrics=[summary(f"times.ms_per_sample.{stage}")])
                    for stage in dict.fromkeys(stages)
                ),
                panels.BarPlot(title="peak memory, MiB", metrics=[summary("times.peak_memory_mib")]),
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


def _metric(key: str) -> str:
    """The name under which `experiments.training.run_logger` logs what a row calls `key`."""
    return f"subsets.{key.removeprefix('subset ')}" if key.startswith("subset ") else f"metrics.{key}"


def main(arguments: Sequence[str]) -> None:
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return
    study, *rest = arguments
    given = dict(word.partition("=")[::2] for word in rest)
    rows = collect(Path(study))
    if not rows:
        fail(f"{study}: there is no evaluated job in it; give the folder of a study, for example outputs/demo")
    if not given.get("entity") or given.keys() - {"entity", "project"}:
        fail("give entity=NAME, a user or a team, and nothing else but project=NAME")
    if importlib.util.find_spec("wandb_workspaces") is None:
        fail("wandb-workspaces is not installed: pip install -c constraints.txt -e '.[viz]'")
    import wandb

    if not wandb.login(prompt=False):
        fail("there is no key for Weights & Biases: wandb login")
    made = workspace(Path(study).name, rows, given["entity"], given.get("project", PROJECT))
    made.save()
    print(made.url)


if __name__ == "__main__":
    main(sys.argv[1:])
