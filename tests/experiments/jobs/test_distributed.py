"""The ranks of a process from the launcher's variables, and launchers that do not fit the config."""

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.jobs.distributed import Ranks, detect_ranks, init_distributed

VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
)
OF_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OF_SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def config(**trainer: Any) -> DictConfig:
    return OmegaConf.create({"device": "cpu", "trainer": {"strategy": "single", "num_nodes": 1} | trainer})


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, Ranks()),
        (OF_TORCHRUN, Ranks(launcher="torchrun", rank=5, world=8, local_rank=1, local_world=4)),
        (OF_SRUN, Ranks(launcher="srun", rank=2, world=4, local_rank=0, local_world=2)),
        (OF_SRUN | OF_TORCHRUN, Ranks(launcher="torchrun", rank=5, world=8, local_rank=1, local_world=4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Ranks()),  # a batch script, not a task
    ],
)
def test_launchers(variables: dict[str, str], ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert detect_ranks() == ranks
    assert ranks.world == 1 or ranks.nodes == 2


@pytest.mark.parametrize(
    ("variables", "trainer", "message"),
    [
        ({}, {"strategy": "ddp"}, "trainer=ddp runs in processes that a launcher starts: torchrun --nproc_per_node=2"),
        (OF_TORCHRUN, {}, "torchrun started 8 processes and this job runs in one: train with trainer=ddp"),
        (
            OF_TORCHRUN,
            {"strategy": "ddp"},
            "trainer.num_nodes=1, and torchrun started processes on 2: give trainer.num_nodes=2",
        ),
        (
            OF_SRUN | {"SLURM_STEP_NUM_TASKS": "3"},
            {"strategy": "ddp"},
            "srun started 3 tasks on 2 nodes: start as many on",
        ),
    ],
)
def test_a_launcher_that_does_not_fit_the_config(
    variables: dict[str, str], trainer: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        init_distributed(config(**trainer))


ONE_TASK = OF_SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("variables", "num_nodes", "device", "gpus", "message"),
    [
        (
            ONE_TASK,
            1,
            "auto",
            8,
            r"srun started 1 tasks on a node with 8 GPUs.*gpus_per_node=N.*ntasks-per-node.*\(N=8\)",
        ),
        (OF_SRUN, 2, "cuda", 4, r"srun started 2 tasks on a node with 4 GPUs"),
        (
            ONE_TASK,
            1,
            "auto",
            1,
            "needs several processes, and srun started one task; .*gpus_per_node.*trainer=default",
        ),
        (ONE_TASK, 1, "cpu", 8, "needs several processes, and srun started one task"),
    ],
)
def test_one_task_of_srun_does_not_train_for_a_node(
    strategy: str,
    variables: dict[str, str],
    num_nodes: int,
    device: str,
    gpus: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    cfg = config(strategy=strategy, num_nodes=num_nodes)
    cfg.device = device
    with pytest.raises(ValueError, match=message):
        init_distributed(cfg)


def test_evaluation_runs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OF_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="this job runs in one"):
        init_distributed(OmegaConf.create({"device": "cpu"}))
