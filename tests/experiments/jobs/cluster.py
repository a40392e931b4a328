"""A SLURM of two nodes on this machine, for tests: its own munge, controller and daemons, in a folder of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("sinfo", "squeue", "sbatch", "srun", "scancel", "scontrol", "slurmctld", "slurmd", "munged")
CONFIG = """ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
KillWait=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which `srun -N2` works; skips the test where SLURM is not installed or may not be started."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"needs SLURM: there is no {missing[0]}")
    if os.geteuid() != 0:
        pytest.skip("needs to be root, to start SLURM")
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=socket.gethostname().partition(".")[0], ports=free_ports(3)))
    munge = [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "log", "seed", "key")]
    # Nodes have no names that anybody could look up; the first process is found here.
    environment = os.environ | {"SLURM_CONF": str(config), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    with ExitStack() as running:
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            daemon = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            running.callback(daemon.wait)
            running.callback(daemon.terminate)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            idle = subprocess.run(
                ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True
            )
            if idle.stdout.strip() == "2":
                try:
                    yield environment
                finally:
                    # What a failed test left running would outlive the daemons.
                    subprocess.run(["scancel", "--quiet", "--full", "--signal=KILL", "--user=root"], env=environment)
                return
            time.sleep(0.2)
        raise RuntimeError(f"SLURM did not come up: {idle.stderr}\n{(folder / 'slurmctld.log').read_text()[-2000:]}")


def free_ports(n: int) -> list[int]:
    with ExitStack() as open_ones:
        found = [open_ones.enter_context(closing(socket.socket())) for _ in range(n)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]
