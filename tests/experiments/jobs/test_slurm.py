"""Sweeps, shards and training over two nodes of a real SLURM: cancelled, drained, put back into the queue, resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from experiments.training.callbacks import read_points
from tests.experiments.conftest import Here, finish, journaled, lasting, result_of, rows_of, start, table_without_times
from tests.experiments.jobs.cluster import slurm
from tests.experiments.jobs.test_killed_sweeps import DIED, writer
from tests.experiments.training.runs import last_step, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
Cluster = dict[str, str]
WORDS = ["data.n=480", "batch_size=4", "threads=1", "device=cpu", "study=s"]
SLURM = "hydra/launcher=slurm"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def sweep(tiny_weights: Path) -> list[str]:
    """Three systems of the main table; nobody has trained adapters for these weights."""
    systems = ["experiment=B0,S1,P1", "adapter=null", f"model.path={tiny_weights}", "limit=240", "shots=2"]
    return ["sweep=main_table", *systems, *WORDS]


@pytest.fixture(scope="module")
def in_process(sweep: list[str], cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of the same sweep without a cluster."""
    home = tmp_path_factory.mktemp("in_process")
    code, _, err = finish(start("eval", *sweep, cwd=home))
    assert (code, err) == (0, [])
    return home / "outputs/s"


def test_a_sweep_fills_the_table_that_it_fills_here(
    sweep: list[str], in_process: Path, cluster: Cluster, tmp_path: Path
) -> None:
    code, out, err = finish(start("eval", *sweep, SLURM, cwd=tmp_path, environment=cluster))
    assert code == 0, err
    assert sum(line.startswith("ok ") for line in out.splitlines()) == 3
    assert table_without_times(tmp_path / "outputs/s") == table_without_times(in_process)
    assert len(table_without_times(in_process)) == 3
    assert set(nodes(cluster, tmp_path).values()) == {"n1", "n2"}


def test_a_cancelled_job_and_a_drained_node_cost_one_row(
    sweep: list[str], in_process: Path, cluster: Cluster, tmp_path: Path
) -> None:
    study = tmp_path / "outputs/s"
    waiting = start("eval", *sweep, SLURM, cwd=tmp_path, environment=cluster)
    journal = wait_for(lambda: next(iter(written(study, "*B0*/journal.arrow", batches=2)), None), waiting)
    (job,) = (path.name for path in study.glob(".submitit/*_0"))
    with interrupted([writer(journal)]):
        control(cluster, "scancel", job)
        control(cluster, "scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        code, out, err = finish(waiting)
        assert code == 1
        reason, last = [line for line in err if line.startswith("error: ")]
        assert "experiment=B0" in reason and ": died without reporting a result (CANCELLED): " in reason
        assert last == DIED
        assert sum(line.startswith("ok ") for line in out.splitlines()) == 2
        assert sorted(row["status"] for row in table_without_times(study)) == ["ok", "ok", "stopped"]
        first = [row["id"] for batch in journaled(journal) for row in batch]
        assert 8 <= len(first) < 240
    finally:
        control(cluster, "scontrol", "update", "nodename=n2", "state=resume")
    code, out, err = finish(start("eval", *sweep, SLURM, "resume=true", cwd=tmp_path, environment=cluster))
    assert code == 0, err
    assert sum(line.startswith("skip ") for line in out.splitlines()) == 2
    assert table_without_times(study) == table_without_times(in_process)
    ids = [row["id"] for row in rows_of(journal.parent)]
    assert ids[: len(first)] == first and len(set(ids)) == len(ids) == 240


def test_an_interrupted_command_says_in_one_line_what_goes_on(
    sweep: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """Ctrl+C goes to all processes of a terminal; the jobs are not its children."""
    study = tmp_path / "outputs/s"
    waiting = start("eval", *sweep, SLURM, cwd=tmp_path, environment=cluster, session=True)
    journal = wait_for(lambda: next(iter(written(study, "*/journal.arrow", batches=2)), None), waiting)
    (array,) = {path.name.partition("_")[0] for path in study.glob(".submitit/*_0")}
    with interrupted([writer(journal)]):
        os.killpg(waiting.pid, signal.SIGINT)
        code, _, (line,) = finish(waiting)
        control(cluster, "scancel", array)
    assert code == 130
    said = rf"error: interrupted; (1 job goes|[23] jobs go) on in SLURM, `scancel {array}` ends them; the same command"
    assert re.fullmatch(rf"{said} with resume=true goes on from here", line)


def test_shards_over_both_nodes_equal_the_whole(
    sweep: list[str], in_process: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """One of them is put back into the queue in the middle, as when its node fails, and goes on by itself."""
    words = ["-m", "shards=2", "shard=0,1", "experiment=P1", *sweep[2:], SLURM]
    study = tmp_path / "outputs/s"
    waiting = start("eval", *words, cwd=tmp_path, environment=cluster)
    journal = wait_for(lambda: next(iter(written(study, "*shard-1*/journal.arrow", batches=2)), None), waiting)
    with interrupted([writer(journal)]):
        first = nodes(cluster, tmp_path)
        (job,) = (path.name for path in study.glob(".submitit/*_1"))
        before = journaled(journal)
        control(cluster, "scontrol", "requeue", job)
    assert 2 <= len(before) < 30
    code, out, err = finish(waiting)
    assert code == 0, err
    assert sorted(first.values()) == ["n1", "n2"]
    parts = [rows_of(folder) for folder in sorted(study.glob("*_shard-*"))]
    assert list(map(len, parts)) == [120, 120]
    assert [row["id"] for row in parts[1]][:8] == [row["id"] for batch in before[:2] for row in batch]
    (merged,) = (path for path in study.glob("eval_*shards-2*") if "_shard-" not in path.name)
    (whole,) = in_process.glob("*P1*")
    assert [{**row, "batch": 0} for row in rows_of(merged)] == [{**row, "batch": 0} for row in rows_of(whole)]
    ours, theirs = (lasting(result_of(folder)) for folder in (merged, whole))
    for key in ("quality", "tokens", "data", "config", "config_hash", "model", "selector", "status"):
        assert ours[key] == theirs[key], key


def test_two_nodes_give_the_curve_of_one_process(
    train_here: Here, tiny_weights: Path, cluster: Cluster, tmp_path: Path
) -> None:
    words = ["selector=shirg", "optim.steps=30", "batch_size=4", "trainer.log_every=2", "trainer.checkpoint_every=5"]
    words += ["study=s"]
    alone = train_here(*words, root=tmp_path / "alone")
    shared = [f"model.path={tiny_weights}", "trainer=ddp", "trainer.num_nodes=2", "optim.warmup=0", "threads=1", *words]
    srun = ("srun", "-N2", "--job-name=training", sys.executable)

    def begin(*more: str) -> subprocess.Popen[str]:
        return start("train", "device=cpu", *shared, *more, cwd=tmp_path, launcher=srun, environment=cluster)

    first = begin()
    wait_for_step(first, tmp_path, 8)
    with interrupted(trainers(tmp_path)):
        control(cluster, "scancel", "--name=training")
    code, _, err = finish(first)
    assert code != 0 and "CANCELLED" in "\n".join(err)
    (folder,) = (tmp_path / "outputs/s").glob("train_*")
    assert result_of(folder)["status"] == "running" and 5 <= last_step(folder) < 30
    code, out, err = finish(begin("resume=true"))
    assert code == 0, err
    assert out.count("written  ") == 1, "one of the processes speaks"
    assert result_of(folder)["status"] == "ok" and result_of(folder)["times"]["processes"] == 2
    one, two = (read_points(path / "metrics.csv") for path in (alone, folder))
    for name in ("step", "loss", "accuracy", "grad_norm"):
        assert [p[name] for p in two] == pytest.approx([p[name] for p in one], abs=1e-4), name


@contextmanager
def interrupted(processes: Sequence[int]) -> Iterator[None]:
    """Stops processes of a job while SLURM ends it, then kills them.

    SLURM itself would wake them, ask, and kill seconds later: on a quick machine the job would have come to its end.
    """
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    yield
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def trainers(home: Path) -> list[int]:
    """The processes that train in a folder; not the one that started them and waits."""
    program = os.fsencode(sys.executable)
    found = [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if runs(path, home) and (path / "cmdline").read_bytes().startswith(program)
    ]
    assert len(found) == 2
    return found


def runs(process: Path, home: Path) -> bool:
    try:
        return (process / "cwd").readlink() == home
    except OSError:
        return False


def control(cluster: Cluster, *command: str) -> str:
    return subprocess.run(command, env=cluster, check=True, capture_output=True, text=True).stdout


def nodes(cluster: Cluster, home: Path) -> dict[str, str]:
    """Where each job of the study ran, or runs."""
    listed = control(cluster, "squeue", "--noheader", "--array", "--states=all", "--format=%i %N")
    jobs = {path.name for path in home.glob("outputs/s/.submitit/*_*")}
    running = (line.split() for line in listed.splitlines())  # a job that waits has no node
    return {job: nodes[0] for job, *nodes in running if nodes and job in jobs}


def written(study: Path, pattern: str, batches: int) -> list[Path]:
    return [path for path in study.glob(pattern) if len(journaled(path)) >= batches]


def wait_for(found: Callable[[], Path | None], process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path := found():
            return path
        time.sleep(0.01)
    raise AssertionError(f"never came: {finish(process) if process.poll() is not None else 'still running'}")
