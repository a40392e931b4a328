"""Training over two nodes of a real SLURM, cancelled in the middle and resumed."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.training.history import read_points
from tests.experiments.cluster import slurm
from tests.experiments.conftest import ROOT, Here, result_of
from tests.experiments.test_resume import last_step, wait_for_step


@pytest.mark.slurm
def test_two_nodes_give_the_curve_of_one_process(train_here: Here, tiny_weights: Path, tmp_path: Path) -> None:
    words = ["selector=shirg", "optim.steps=30", "batch_size=4", "trainer.log_every=2", "trainer.checkpoint_every=5"]
    words += ["study=s"]
    alone = train_here(*words, root=tmp_path / "alone")
    shared = [f"model.path={tiny_weights}", "trainer=ddp", "trainer.num_nodes=2", "optim.warmup=0", "threads=1", *words]
    with slurm(tmp_path / "slurm") as environment:

        def srun(*more: str) -> subprocess.Popen[str]:
            command = ["srun", "-N2", "--job-name=training", sys.executable, str(ROOT / "train.py"), "device=cpu"]
            return subprocess.Popen(
                [*command, *shared, *more],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        first = srun()
        wait_for_step(first, tmp_path, 8)
        subprocess.run(["scancel", "--name=training"], env=environment, check=True)
        _, err = first.communicate(timeout=120)
        assert first.returncode != 0 and "CANCELLED" in err
        (folder,) = (tmp_path / "outputs/s").glob("train_*")
        assert result_of(folder)["status"] == "running" and 5 <= last_step(folder) < 30
        second = srun("resume=true")
        out, err = second.communicate(timeout=120)
        assert second.returncode == 0, err
    assert out.count("written  ") == 1, "one of the processes speaks"
    assert result_of(folder)["status"] == "ok" and result_of(folder)["times"]["processes"] == 2
    one, two = (read_points(path / "metrics.csv") for path in (alone, folder))
    for name in ("step", "loss", "accuracy", "grad_norm"):
        assert [p[name] for p in two] == pytest.approx([p[name] for p in one], abs=1e-4), name
