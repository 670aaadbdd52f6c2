"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Addresses of loopback; not 127.0.0.1, which `ray start` replaces by the machine's own.
NODES = {"n1": "127.0.0.2", "n2": "127.0.0.3"}
START_S = 30.0
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,defer_batch
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=30
{nodes}
PartitionName=both Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=trainer Nodes=n1 MaxTime=INFINITE State=UP
PartitionName=rollout Nodes=n2 MaxTime=INFINITE State=UP
"""


def missing_program() -> str | None:
    """The first program of Slurm or munge that this machine lacks; also where the user may not run them."""
    if os.geteuid() != 0:
        return "slurmd as root"
    return next((name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None), None)


class SlurmCluster:
    """Two nodes, one processor each for Slurm to give away; a context manager. `folder` must be new, its path short."""

    def __init__(self, folder: Path, cpus_per_node: int = 2) -> None:
        self.folder = folder
        self._cpus_per_node = cpus_per_node
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{SYSTEM_PATH}:{os.environ['PATH']}"}

    def __enter__(self) -> SlurmCluster:
        folder = self.folder
        folder.mkdir(mode=0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={address} Port={port} "
            f"CPUs={self._cpus_per_node} State=UNKNOWN"
            for (name, address), port in zip(NODES.items(), ports[1:], strict=True)
        ]
        (folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(),
                controller_port=ports[0],
                user=getpass.getuser(),
                folder=folder,
                nodes="\n".join(nodes),
            )
        )
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_daemons(self) -> None:
        folder = self.folder
        files = {name: f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")}
        key, sock = f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"
        self.call("munged", "--force", "--num-threads=2", key, sock, *files.values())
        self.call("slurmctld", "-c")
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            self.call("slurmd", "-N", name)
        deadline = time.monotonic() + START_S
        while (states := self.call("sinfo", "-h", "-N", "-p", "both", "-o", "%T").split()) != ["idle"] * len(NODES):
            assert time.monotonic() < deadline, f"nodes: {states}\n{self.logs()}"
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.call("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 20
            while self.call("squeue", "-h", "-o", "%i") and time.monotonic() < deadline:
                time.sleep(0.2)
        pid_files = [*(f"slurmd-{name}.pid" for name in NODES), "slurmctld.pid", "munged.pid"]
        for name in pid_files:
            self._end_daemon(self.folder / name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_daemon(self, pid_file: Path) -> None:
        if not pid_file.exists():
            return
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            process = psutil.Process(int(pid_file.read_text()))
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(10)
                return
            process.kill()

    def call(self, *command: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
        """Output of a program of the cluster, which must succeed."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        done = subprocess.run(
            command,
            env={**own, **self.environment, **(environment or {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout.strip()

    def submit(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
        """The number of the job that `sbatch arguments` makes in a folder."""
        return self.call("sbatch", "--parsable", *arguments, folder=folder, environment=environment).split(";")[0]

    def state(self, job: str) -> str:
        """The job's state, e.g. RUNNING; UNKNOWN when Slurm has forgotten it."""
        return self._field(job, "JobState") or "UNKNOWN"

    def restarts(self, job: str) -> int:
        """How often the job was queued again."""
        return int(self._field(job, "Restarts") or 0)

    def exit_status(self, job: str) -> str:
        """Exit status and signal, `0:0` where all went well."""
        return self._field(job, "ExitCode") or ""

    def _field(self, job: str, name: str) -> str | None:
        try:
            words = self.call("scontrol", "show", "job", job).split()
        except AssertionError:
            return None
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)

    def wait(self, job: str, timeout_s: float, describe: Path | None = None) -> str:
        """The state in which the job has ended."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) in RUNNING:
            output = describe.read_text() if describe is not None and describe.exists() else ""
            assert time.monotonic() < deadline, f"job {job} is {state} after {timeout_s} s\n{output}\n{self.logs()}"
            time.sleep(0.5)
        return state

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for log in sorted(self.folder.glob("*.log"))
        )


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
