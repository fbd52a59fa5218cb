"""A real Slurm in one machine: munge, a controller and a daemon per machine of `machines.py`.

Needs root and, on Debian, `apt-get install --no-install-recommends slurm-wlm munge iproute2`. No system service is
touched: keys, sockets, configuration and logs are in a folder of the cluster's own, and all daemons end with it.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import machines
import psutil

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# Two partitions over the same machines: jobs of `urgent` take them from jobs of `main`, which get 60 s to save.
_CONFIGURATION = """\
ClusterName=drill
SlurmctldHost={host}({home})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=10
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort=16827
SlurmdPort=16828
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser=root
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_min_interval=500000,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    missing = [name for name in _DAEMONS if shutil.which(name) is None]
    if missing:
        return f"there is no {', '.join(missing)}; as root on Debian: apt-get install slurm-wlm munge"
    return machines.why_not()


class Cluster:
    """Slurm's commands, and its machines to do harm to."""

    def __init__(self, folder: Path, nodes: list[machines.Machine]) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **environment: str) -> str:
        """Output of one of Slurm's commands, started in the repository's root."""
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=machines.ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, NodeList, ExitCode, …"""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """A job's state, such as PENDING."""
        return self.job(number)["JobState"]

    def idle(self) -> int:
        """How many machines are ready; none while the controller does not answer yet."""
        try:
            return self.run("sinfo", "--noheader", "--Node", "-p", "main", "-o", "%t").split().count("idle")
        except RuntimeError:
            return 0

    def start_node(self, node: machines.Machine) -> None:
        """Start the daemon of a machine."""
        command = node.command("slurmd", "-N", node.name, "-f", str(self.folder / "slurm.conf"))
        subprocess.run(command, env=self.environment, check=True, timeout=30)


@contextlib.contextmanager
def cluster(folder: Path, count: int) -> Iterator[Cluster]:
    """A cluster of `count` machines with 2 CPUs each, ready for jobs; its files are in `folder`, which root owns."""
    with machines.machines(count) as nodes:
        names = "\n".join(f"NodeName={n.name} NodeAddr={n.address} CPUs=2 RealMemory=4000" for n in nodes)
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(host=socket.gethostname(), home=machines.HOME, folder=folder, nodes=names)
        )
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        slurm = Cluster(folder, nodes)
        try:
            _start_munge(folder)
            subprocess.run(["slurmctld"], env=slurm.environment, check=True, timeout=30)
            for node in nodes:
                slurm.start_node(node)
            machines.wait_for("machines of the cluster", lambda: slurm.idle() == count, 60)
            yield slurm
        finally:
            for node in nodes:
                node.kill()
            for name in ("slurmctld", "munged"):
                _end_daemon(folder / f"{name}.pid")


def _start_munge(folder: Path) -> None:
    command = ["munged", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    command += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
    subprocess.run(command, check=True, timeout=30, capture_output=True)


def _end_daemon(pid_file: Path) -> None:
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        daemon = psutil.Process(int(pid_file.read_text()))
        daemon.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            daemon.wait(5)
            return
        daemon.kill()
        time.sleep(0.1)
