"""Where the processes run: Ray starts them, its own on loopback or one that is joined, and all are gone at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import ray

from fipo_megatron.config.schema import Config, RolloutConfig
from fipo_megatron.model.platform import resolve_platform
from fipo_megatron.reshard.session import ON_DISK
from fipo_megatron.rollout.hf import HfEngine
from fipo_megatron.rollout.replicas import Replicas
from fipo_megatron.rollout.sglang import SglangEngine
from fipo_megatron.rollout.vllm import VllmEngine, vllm_environment
from fipo_megatron.rollout.vllm_server import VllmServerEngine
from fipo_megatron.trainer.actor import EngineClient, PolicyClient
from fipo_megatron.trainer.bundles import Place, num_devices
from fipo_megatron.trainer.policy import MegatronPolicy
from fipo_megatron.trainer.ray_cluster import at_its_node, join, pools, with_address
from fipo_megatron.trainer.reservation import Reservation
from fipo_megatron.trainer.sync import WeightSync, make_session

logger = logging.getLogger(__name__)

MIN_OBJECT_STORE_BYTES = 256 << 20
# A sampled token: the engine's id (4) and log-prob (4). A batch's token: its id (8), old and reference log-prob (4, 4).
TOKEN_BYTES = 4 + 4 + 8 + 4 + 4
# Of a rollout batch at its limits: a step's two handles overlap, replies and the surplus of sampling come on top.
OBJECT_STORE_BATCHES = 3
SHUTDOWN_S = 10.0
SLOW_START = "timed out during startup"  # of Ray's message after 30 s, which nothing can set


class Workers:
    """The processes of a run: the policy's ranks and the engines. A context manager: leaving it ends them all."""

    policy: PolicyClient
    engine: Replicas
    model_folder: Path  # what the engine is started from, also when it is rebuilt

    def __init__(self, config: Config, log_folder: Path, policy_kind: type[MegatronPolicy] = MegatronPolicy) -> None:
        self.config = config
        self._policy_kind = policy_kind
        self.log_folder = log_folder
        self.platform = resolve_platform(config.platform)
        self._joins = config.cluster.ray_address is not None
        self._actors: list[Any] = []
        self._mark = secrets.token_hex(8)  # in the environment of the processes that a cluster runs for us
        self._processes: set[psutil.Process] = set()
        self._sync: WeightSync | None = None
        self._is_colocated = config.placement.mode == "colocated"
        self._version = -1  # of the last weights that the engines were sent
        self._engines_hold_weights = False

    def __enter__(self) -> Self:
        self._foreign = set(psutil.Process().children(recursive=True))
        # Ray makes its folder writable for everyone, so it lies in one that is not. Unix sockets allow 107 characters.
        self._temp_dir = tempfile.mkdtemp(prefix="fipo-", dir="/tmp")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if self._joins:
                self._join_ray()
            else:
                self._init_ray(self.config.cluster.address)
            self._reservation = Reservation(
                self.config, self._on_cpu, pools(self.config.placement.mode) if self._joins else None
            )
        except BaseException as error:
            self._end_everything()
            if isinstance(error, SystemExit):  # raised by Ray's handler of SIGTERM
                raise KeyboardInterrupt from error
            raise
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place
        return self

    def _join_ray(self) -> None:
        config = self.config
        assert config.cluster.ray_address is not None
        address = join(
            config.cluster.ray_address,
            num_cpus=num_devices(config),
            num_gpus=0 if self._on_cpu else num_devices(config),
            object_store_bytes=object_store_bytes(config.rollout),
            timeout_s=config.timeouts.startup_s,
        )
        self.config = with_address(config, address)

    def _init_ray(self, address: str) -> None:
        """Start a Ray of the run's own; on a busy machine again, for as long as `timeouts.startup_s`."""
        deadline = time.monotonic() + self.config.timeouts.startup_s
        while True:
            try:
                ray.init(
                    num_cpus=num_devices(self.config),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=object_store_bytes(self.config.rollout),
                    _node_ip_address=address,
                    _temp_dir=f"{self._temp_dir}/ray",
                    # Every actor has an environment of its own: workers that Ray starts ahead would be of no use.
                    _system_config={"prestart_worker_first_driver": False},
                )
                return
            except Exception as error:
                if SLOW_START not in str(error) or time.monotonic() > deadline:
                    raise
                print("Ray did not start within its 30 s, is the machine busy? Starting it again", file=sys.stderr)
                self._remember_processes()
                self._end_processes()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            self._keep_worker_logs()
        self._end_everything()

    def _end_everything(self) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a second Ctrl-C must not leave half of it behind
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        self._remember_processes()
        if self._joins and ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
        # A cluster that was joined goes on, and takes the reserved devices back. To ask it for that would hang where it
        # ends at the same time, by the same signal to a whole job.
        ray.shutdown()
        self._end_processes()
        shutil.rmtree(self._temp_dir, ignore_errors=True)
        if self._sync is not None and self._sync.session.transport in ON_DISK:
            shutil.rmtree(self._sync.session.folder, ignore_errors=True)
        for number, handler in handlers.items():  # None: not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _end_processes(self) -> None:
        _, alive = psutil.wait_procs(self._processes, timeout=0.5)
        for process in alive:  # also those that are stopped and can't end by themselves
            process.kill()
        psutil.wait_procs(alive, timeout=SHUTDOWN_S)

    async def start_policy(self) -> None:
        """Start the policy's ranks and form their process groups; engines that share their devices make room first."""
        if self._is_colocated:
            await self.engines_ready()  # which find out at their start how much memory is free
            await self._release_engines()
        self.policy = PolicyClient(
            [
                self._start_actor(self._policy_kind, self._options(place, environment={}), self.config, rank)
                for rank, place in enumerate(self._reservation.plan.ranks)
            ],
            self.config.timeouts,
        )
        await self.policy.connect()
        self._remember_processes()

    def start_engines(self, model_folder: Path) -> None:
        """Begin to start the engines; `sync_weights` waits for them."""
        self.model_folder = model_folder
        self._engines = [self._start_engine(replica) for replica in range(self.config.rollout.replicas)]
        self.engine = Replicas(self._engines)

    @property
    def engines(self) -> Sequence[EngineClient]:
        """One a replica; a rebuilt engine takes its predecessor's place."""
        return self._engines

    async def engines_ready(self) -> None:
        """Return when all engines are up."""
        await asyncio.gather(*(engine.ready() for engine in self._engines))
        self._remember_processes()

    async def sync_weights(self, version: int) -> dict[str, float]:
        """Push the policy's weights to the engines, as `version`; what it took. See `WeightSync.sync`.

        Engines that share devices take memory for weights alone; the policy keeps its parameters there until they left.
        """
        if self._sync is None:
            session = make_session(self.config, self.model_folder, self._on_cpu, Path(self._temp_dir), self.log_folder)
            self._sync = WeightSync(self.config, session, self.policy, self._engines, self._restart_engine)
        if self._is_colocated:
            await self.policy.offload()
            resumed = (engine.resume_memory("weights") for engine in self._engines)
            for result in await asyncio.gather(*resumed, return_exceptions=True):
                if isinstance(result, Exception):  # the sync rebuilds an engine that is gone
                    logger.warning("an engine did not take its memory again before weights %d (%s)", version, result)
        metrics = await self._sync.sync(version)
        if self.config.trainer.offload:
            await self.policy.offload()
        self._version, self._engines_hold_weights = version, True
        return metrics

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Within, the engines can sample from the weights of the last sync. Where they share devices with the policy it
        is in host memory meanwhile, and afterwards they give all memory back, so the weights may be pushed once more.
        """
        if not self._is_colocated:
            yield
            return
        if self._engines_hold_weights:
            await self.policy.offload()  # a call since the sync may have brought parts of it back
        else:
            await self.sync_weights(self._version)
        await asyncio.gather(*(engine.resume_memory("kv_cache") for engine in self._engines))
        yield
        await self._release_engines()

    async def _release_engines(self) -> None:
        await asyncio.gather(*(engine.release_memory() for engine in self._engines))
        self._engines_hold_weights = False

    def describe_sharing(self) -> str:
        """What shares devices, on one line."""
        rollout, plan = self.config.rollout, self._reservation.plan
        workers = f"{len(plan.engines)} x {rollout.tensor * rollout.pipeline} engine workers"
        line = f"placement: colocated, {plan.num_devices} devices shared by {len(plan.ranks)} ranks and {workers}"
        if self._on_cpu and rollout.engine == "vllm":
            line += "; vLLM's CPU build keeps its memory, also when it is told to give it back"
        return line

    def _start_engine(self, replica: int) -> EngineClient:
        config, engine, place = self.config, self.config.rollout.engine, self._reservation.plan.engines[replica]
        if engine == "vllm":
            options = self._options(place, vllm_environment(config, self._on_cpu, replica))
            if config.rollout.mode == "server":
                arguments = {"on_cpu": self._on_cpu}
                actor = self._start_actor(VllmServerEngine, options, self.model_folder, config, **arguments)
            else:
                actor = self._start_actor(VllmEngine, options, self.model_folder, config)
        elif engine == "sglang":
            arguments = {"on_cpu": self._on_cpu}
            options = self._options(place, {})
            actor = self._start_actor(SglangEngine, options, self.model_folder, config, **arguments)
        else:
            actor = self._start_actor(HfEngine, self._options(place, {}), self.model_folder, config)
        name = "engine" if config.rollout.replicas == 1 else f"engine {replica}"
        return EngineClient(actor, config.timeouts, name)

    def _start_actor(self, kind: type, options: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        if self._joins:
            kind = at_its_node(kind)
        actor = ray.remote(kind).options(**options).remote(*arguments, **named)
        self._actors.append(actor)
        return actor

    def _restart_engine(self, replica: int) -> EngineClient:
        ray.kill(self._engines[replica].actor)
        client = self._start_engine(replica)
        client.recorder = self._engines[replica].recorder
        self.engine.engines[replica] = client
        return client

    @property
    def _on_cpu(self) -> bool:
        return self.platform.name == "cpu"

    def _options(self, place: Place, environment: dict[str, str]) -> dict[str, Any]:
        base = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's tensor parallelism relies on the order of launches
        }
        if self._joins:
            base["FIPO_RUN"] = self._mark
        else:
            base["TMPDIR"] = self._temp_dir  # what a killed process leaves goes with the run's
        if self.config.cluster.address.startswith("127."):
            base["GLOO_SOCKET_IFNAME"] = "lo"
        devices = self._reservation.environment(place)
        return self._reservation.options(place) | {"runtime_env": {"env_vars": base | environment | devices}}

    def _remember_processes(self) -> None:
        self._processes.update(set(psutil.Process().children(recursive=True)) - self._foreign)
        if self._joins:  # the raylet's children, not ours
            self._processes.update(find_marked("FIPO_RUN", self._mark))

    def _keep_worker_logs(self) -> None:
        """Copy what the workers printed into the run's folder: a crash in native code is told nowhere else."""
        for log in Path(self._temp_dir).glob("ray/session_*/logs/worker-*.err"):
            if log.stat().st_size and not log.is_symlink():
                (self.log_folder / "worker_logs").mkdir(exist_ok=True)
                shutil.copy(log, self.log_folder / "worker_logs")


def find_marked(name: str, value: str) -> list[psutil.Process]:
    """The processes on this machine that have a variable of this value in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process)
    return found


def object_store_bytes(rollout: RolloutConfig) -> int:
    """The shared memory in which batches travel between the processes: room for the longest batch of a step."""
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    batch_bytes = rollout.prompts_per_step * rollout.samples_per_prompt * longest * TOKEN_BYTES
    return max(MIN_OBJECT_STORE_BYTES, OBJECT_STORE_BATCHES * batch_bytes)
