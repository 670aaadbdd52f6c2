"""The batch scripts on a real Slurm of two nodes, both on this machine. Where there is none they are skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grpc import StatusCode

from fipo_megatron.trainer.placement import find_marked
from tests.cluster.slow_reward import SLOW_WHILE
from tests.cluster.slurm_cluster import NODES, SlurmCluster, missing_program
from tests.ray_head import ask
from tests.script_process import REPO, finish_script, start_script
from tests.smoke.train_process import SMALL, UNTRAINED

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.slow,
    pytest.mark.skipif(missing_program() is not None, reason=f"Slurm's test cluster lacks {missing_program()}"),
]

MEASURED = ("time/", "cost/peak_memory", "sync/receive_s", "sync/verify_s")  # what no two runs have alike
NUM_STEPS = 16
SLOW_REWARD = ("reward.rule=custom", "reward.function=tests/cluster/slow_reward.py:has_odd_ones")
STEPS_S = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # sockets want a short path
        Path(folder).chmod(0o755)
        with SlurmCluster(Path(folder) / "cluster") as cluster:
            yield cluster


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of base policies: made by the first run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The quickstart, small and with an engine that starts at once."""
    file = tmp_path / "small.yaml"
    file.write_text(f"base: {REPO / 'configs/quickstart_cpu.yaml'}\nrollout:\n  engine: hf\n")
    return file


class Jobs:
    """Batch jobs that train into one folder."""

    def __init__(self, cluster: SlurmCluster, folder: Path, cache: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.settings = [
            *(*SMALL, UNTRAINED, *SLOW_REWARD),
            *(f"run.root={folder / 'runs'}", f"warm_start.cache_dir={cache}", f"trainer.steps={NUM_STEPS}"),
            *("rollout.engine=hf", "evaluation.every_steps=100"),
        ]
        self.environment = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPO),
            "FIPO_JOBS": str(folder / "jobs"),
            "FIPO_START_S": "120",
        }

    def submit(self, *arguments: str) -> str:
        """The job's number; `arguments` are sbatch's, the script and what it is given before the settings."""
        return self.cluster.submit([f"--output={self.folder}/%j.log", *arguments], REPO, self.environment)

    def output(self, job: str) -> str:
        """What all attempts of a job have printed."""
        log = self.folder / f"{job}.log"
        return log.read_text() if log.exists() else ""

    def wait_for(self, job: str, is_so: Callable[[], object], what: str, timeout_s: float = STEPS_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            late = time.monotonic() > deadline
            ended = self.cluster.state(job) in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT")
            assert not late, f"{what} did not come\n{self.describe(job)}"
            assert not ended, f"ended before {what}\n{self.describe(job)}"
            time.sleep(0.3)

    def describe(self, job: str) -> str:
        nodes = "\n".join(
            f"--- {log}\n{log.read_text(errors='replace')[-2000:]}" for log in self.folder.glob("jobs/*/*.log")
        )
        return f"{self.output(job)}\n{nodes}\n{self.cluster.logs()}"

    def finish(self, job: str) -> None:
        """Wait until the job has ended well."""
        state = self.cluster.wait(job, 2 * STEPS_S)
        assert (state, self.cluster.exit_status(job)) == ("COMPLETED", "0:0"), self.describe(job)


@pytest.fixture
def jobs(cluster: SlurmCluster, tmp_path: Path, cache: Path) -> Jobs:
    return Jobs(cluster, tmp_path, cache)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]


def last_step(run: Path) -> int:
    return len(metrics(run)) - 1 if (run / "metrics.jsonl").exists() else -1


@pytest.mark.timeout(1200)
def test_a_job_is_queued_again_before_its_time_limit_and_goes_on_with_the_same_metrics(
    jobs: Jobs, cluster: SlurmCluster, config: Path, tmp_path: Path
) -> None:
    recipe = REPO / "examples/quickstart_cpu/slurm.sbatch"
    script = tmp_path / "slurm.sbatch"
    script.write_text(recipe.read_text().replace("examples/quickstart_cpu/config.yaml", str(config)))
    # Slurm looks every 30 seconds: meanwhile a step takes 3 and more, mostly asleep, afterwards a fraction of one.
    slow = tmp_path / "slow"
    slow.touch()
    jobs.environment[SLOW_WHILE] = str(slow)
    job = jobs.submit(str(script), *jobs.settings)
    run = tmp_path / "runs" / "small-seed0"
    jobs.wait_for(job, lambda: last_step(run) >= 1, "step 1")
    attempt = tmp_path / "jobs" / f"{job}-0"
    assert (attempt / "token").stat().st_mode & 0o777 == 0o600
    undisturbed, log = tmp_path / "runs" / "undisturbed", tmp_path / "undisturbed.log"
    arguments = [str(config), *jobs.settings, f"run.name={undisturbed.name}"]
    beside = start_script(REPO / "tools/train.py", arguments, log)
    # The limit comes so near that Slurm sends the signal.
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_of(cluster, job) + 2}")
    jobs.wait_for(job, lambda: "the time limit is near" in jobs.output(job), "the signal")
    slow.unlink()
    jobs.wait_for(job, lambda: cluster.restarts(job) == 1, "the second attempt")
    stopped_after = last_step(run)
    assert 1 <= stopped_after < NUM_STEPS, jobs.output(job)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    jobs.finish(job)
    output = jobs.output(job)
    assert f"stopped after step {stopped_after}, as asked" in output
    assert f"goes on after step {stopped_after}" in output
    for name in NODES:  # what each node's Ray has logged, in both attempts
        assert all(any((tmp_path / "jobs" / f"{job}-{i}" / name).glob("worker-*")) for i in (0, 1))
    assert not list(tmp_path.glob("jobs/*/token"))

    finish_script(beside, log, STEPS_S)
    assert metrics(run) == metrics(undisturbed)


@pytest.mark.timeout(600)
def test_an_array_trains_a_run_for_each_seed(jobs: Jobs, cluster: SlurmCluster, config: Path, tmp_path: Path) -> None:
    here = ["--array=3-4", "--gpus-per-node=0", "--cpus-per-task=2"]
    job = jobs.submit(*here, "examples/slurm/array.sbatch", str(config), *jobs.settings, "trainer.steps=1")
    for seed in (3, 4):
        jobs.finish(f"{job}_{seed}")
    first, second = (metrics(tmp_path / "runs" / f"small-seed{seed}") for seed in (3, 4))
    assert len(first) == len(second) == 2
    assert first != second


@pytest.mark.timeout(600)
def test_trainer_and_engines_run_in_partitions_of_their_own(
    jobs: Jobs, cluster: SlurmCluster, config: Path, tmp_path: Path
) -> None:
    own = ["--nodes=1", "--gpus-per-node=0", "--cpus-per-task=2"]
    job = jobs.submit(
        *("--partition=trainer", *own, ":", "--partition=rollout", *own),
        *("examples/slurm/heterogeneous.sbatch", str(config), *jobs.settings, "trainer.steps=1"),
    )
    jobs.finish(job)
    assert last_step(tmp_path / "runs" / "small-seed0") == 1
    actors = {  # Ray begins a worker's output with what it is
        name: {line for log in (tmp_path / "jobs" / f"{job}-0" / name).glob("worker-*") for line in lines_of(log)}
        for name in NODES
    }
    assert ":actor_name:MegatronPolicy" in actors["n1"]
    assert ":actor_name:HfEngine" in actors["n2"]
    assert ":actor_name:MegatronPolicy" not in actors["n2"]
    assert ":actor_name:HfEngine" not in actors["n1"]


def test_a_job_whose_nodes_do_not_come_up_says_where_to_look(jobs: Jobs, cluster: SlurmCluster, tmp_path: Path) -> None:
    jobs.environment["FIPO_INTERFACE"] = "missing0"
    job = jobs.submit("examples/quickstart_cpu/slurm.sbatch", *jobs.settings)
    assert cluster.wait(job, 60) == "FAILED"
    assert f"Ray ended on a node before all 2 were there; see {tmp_path}/jobs/{job}-0/*.log" in jobs.output(job)
    assert "FIPO_INTERFACE=missing0: has no IPv4 address on n" in (tmp_path / f"jobs/{job}-0/n2.log").read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(600)
def test_a_job_refuses_strangers_and_leaves_nothing_when_it_is_cancelled(
    jobs: Jobs, cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = jobs.submit("examples/quickstart_cpu/slurm.sbatch", *jobs.settings, "trainer.steps=500")
    jobs.wait_for(job, lambda: "base policy" in jobs.output(job) or "kernels:" in jobs.output(job), "the policy")
    assert find_marked("SLURM_JOB_ID", job)
    attempt = tmp_path / f"jobs/{job}-0"
    address = (attempt / "address").read_text().strip()
    assert ask(address, (attempt / "token").read_text()) is StatusCode.OK
    assert ask(address, None) is ask(address, "another") is StatusCode.UNAUTHENTICATED
    another = tmp_path / "another"
    another.touch(0o600)
    another.write_text("another")
    stranger = wait_for_ray(address, another)
    assert stranger.returncode == 1
    assert f"error: {address} refuses the token" in stranger.stderr
    cluster.call("scancel", job)
    assert cluster.wait(job, 60) == "CANCELLED"
    deadline = time.monotonic() + 30
    while (left := find_marked("SLURM_JOB_ID", job)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert left == [], jobs.describe(job)
    assert not list(tmp_path.glob("jobs/*/token"))
    assert not list(Path("/tmp").glob(f"fipo-{job}-*"))
    assert "interrupted; all worker processes have ended" in jobs.output(job)
    assert list(tmp_path.glob(f"jobs/{job}-0/n1/worker-*")), jobs.describe(job)


def lines_of(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()


def wait_for_ray(address: str, token: Path) -> subprocess.CompletedProcess[str]:
    """What the tool says of the job's Ray to one who has this token."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "RAY_ADDRESS": address}
    return subprocess.run(
        [sys.executable, REPO / "tools/wait_for_ray.py", "--nodes", "2"],
        env=environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def minutes_of(cluster: SlurmCluster, job: str) -> int:
    """Whole minutes that a job has run."""
    *_, minutes, _ = cluster.call("squeue", "-h", "-j", job, "-o", "%M").rpartition("-")[2].split(":")
    return int(minutes)
