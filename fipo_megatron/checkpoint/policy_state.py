"""The state of a policy's ranks - model, optimizer, random generators - on disk, to be loaded in any layout.

The files are Megatron-Core's own distributed checkpoint (`torch_dist`), the optimizer's part in its `fully_reshardable`
form: moments are whole tensors under the names of the parameters, whoever held which part. Megatron's default form,
`fully_sharded_model_space`, loads wrong moments in another layout, so it is never used.

Beside them each rank leaves `rng-rankNNNNN.safetensors`. Nothing here imports the project's model: a rank is handed in.
"""

from __future__ import annotations

import inspect
import logging
import pickle
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from fipo_megatron.checkpoint.distcp import check_pickles, pickle_failure, weights_only

NUM_FILES = 2  # that each rank writes of its tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankState:
    """What of a rank is saved and loaded, in place. Everything is on its device (see model/host_offload.py)."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    num_updates: int  # of the optimizer so far
    layout: dict[str, Any]  # the settings of `parallel`, of JSON's types; equal on every rank


@dataclass(frozen=True)
class LoadedState:
    """What a loaded state says beside its tensors."""

    num_updates: int  # that the optimizer had made
    is_reseeded: bool  # whether random generators start from the seed, since it is of another layout


class PolicySave:
    """A save under way: what it writes is copied already, and a thread writes it."""

    def __init__(self, state: RankState, folder: Path) -> None:
        """Copy the rank's state to host memory and begin to write. Collective.

        What the rank does next may change model and optimizer at once. The copies take what the rank's part of the
        files does: each tensor is written by one rank.
        """
        self._folder = folder
        self._names: list[str] = []
        self._failure: BaseException | None = None
        # Where Megatron's writer leaves its results; its own queue needs a process to manage it.
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        self._request = _plan_save(_saved_tensors(state), folder)
        buckets = self._request.async_fn_args[1] if self._request.async_fn is not None else []
        self._buckets = [_copy_to_host(bucket) for bucket in buckets]
        self._rng = random_states()
        self._thread = threading.Thread(target=self._write, name="policy-save", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            name = rng_file(dist.get_rank())
            save_file(self._rng, self._folder / name)
            self._names.append(name)
            if not self._buckets:
                return
            # In this process: Megatron would fork one, which takes longer, or hangs where the parent has threads.
            transforms, results = self._request.async_fn.args[0], {}
            for i, bucket in enumerate(self._buckets):
                done: queue.Queue[Any] = queue.Queue()
                tickets: queue.Queue[int] = queue.Queue()
                tickets.put(i)
                filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, done, tickets, True)
                _, written = done.get_nowait()
                if isinstance(written, BaseException):
                    raise written
                results[i] = written
                self._names.append(bucket[1])
            self._results.put(results)
        except BaseException as error:
            self._failure = error
        finally:
            self._buckets = []

    def is_written(self) -> bool:
        """Whether this rank's writing has ended, well or not."""
        return not self._thread.is_alive()

    def finish(self) -> list[str]:
        """Wait for the files of all ranks; names of those this rank wrote, relative to the folder. Collective.

        Raises:
            RuntimeError: on every rank, where one could not write; its cause is this rank's own error, if any.
        """
        self._thread.join()
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, _describe(self._failure) if self._failure else None)
        failed = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None]
        if failed:
            raise RuntimeError(
                f"{self._folder}: the policy's state was not written; {'; '.join(failed)}"
            ) from self._failure
        for finalize in self._request.finalize_fns:
            finalize()
        if dist.get_rank() == 0:
            shared = (".metadata", "metadata.json", "common.pt")  # newer Megatron has no common.pt
            self._names += [name for name in shared if (self._folder / name).exists()]
        return sorted(self._names)


def _describe(failure: BaseException) -> str:
    """An error of the disk where there is one behind it: of a full one torch tells that a position is unexpected."""
    each: BaseException | None = failure
    while each is not None:
        if isinstance(each, OSError):
            return repr(each)
        each = each.__cause__ or each.__context__
    return repr(failure)


@torch.no_grad()
def load_policy_state(state: RankState, folder: Path, seed: int) -> LoadedState:
    """Load what `PolicySave` wrote, in this or another layout, into model and optimizer. Collective.

    Every number of weights, main parameters and moments is the saved one. Settings of the optimizer stay those it was
    built with. Random generators are the saved ones in the same layout; in another they start from `seed`.

    The files hold pickles. What they name is checked before torch reads them, which then takes tensors and plain values
    alone; a damaged file is for the manifest to find, before this is called.

    Raises:
        ValueError: the folder holds no checkpoint of Megatron-Core, or one of another model, or its pickles name what
            no checkpoint has.
    """
    if not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{folder}: no policy state, metadata.json is missing: the save did not end, or the path is wrong"
        )
    check_pickles(folder)
    requested = _sharded_state(state, is_loading=True)
    _check_all_is_asked_for(requested, folder)
    try:
        # One level deeper than what was saved: what the file has beside tensors (param_groups, whose number depends on
        # the layout) is not merged into what is asked for.
        with weights_only():
            loaded = dist_checkpointing.load({"requested": requested}, str(folder))
    except (dist_checkpointing.core.CheckpointingException, KeyError) as error:
        raise ValueError(f"{folder}: can't be loaded into this model; is it of another one? {error}") from error
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: can't be read: {pickle_failure(error)}; use another checkpoint") from error
    num_updates = int(loaded["num_updates"])
    for i, chunk in enumerate(state.chunks):
        chunk.module.load_state_dict(loaded["requested"][_chunk_key(state, i)])
    optimizers = _optimizers(state.optimizer)
    for i, optimizer in optimizers:
        part = loaded["requested"]["optimizer"]
        _load_optimizer(optimizer, part if len(_chained(state.optimizer)) == 1 else part[i], num_updates)
    same_layout = loaded["layout"] == state.layout
    _load_random_states(folder, same_layout, seed)
    return LoadedState(num_updates, is_reseeded=not same_layout)


# ---------------------------------------------------------------- tensors


def _check_all_is_asked_for(requested: dict[str, Any], folder: Path) -> None:
    """Raises ValueError where the folder has tensors that no rank asks for, which Megatron leaves out. Collective."""
    own = {value.key for value in nested_values(requested) if isinstance(value, ShardedBase)}
    of_ranks: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    if unread := dist_checkpointing.load_tensors_metadata(str(folder)).keys() - set().union(*of_ranks):
        raise ValueError(
            f"{folder}: can't be loaded into this model; is it of another one? It has {min(unread)} and "
            f"{len(unread) - 1} more tensors that this model has not"
        )


def _metadata(state: RankState) -> dict[str, Any]:
    """What Megatron's `sharded_state_dict` methods are told."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def _chunk_key(state: RankState, chunk: int) -> str:
    return "model" if len(state.chunks) == 1 else f"model{chunk}"


def _sharded_state(state: RankState, is_loading: bool) -> dict[str, Any]:
    """Where this rank's tensors stand in the whole ones. Collective."""
    _prime_moments(state)
    metadata = _metadata(state)
    tensors: dict[str, Any] = {
        _chunk_key(state, i): chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(state.chunks)
    }
    tensors["optimizer"] = state.optimizer.sharded_state_dict(tensors, is_loading=is_loading, metadata=metadata)
    return tensors


def _saved_tensors(state: RankState) -> dict[str, Any]:
    return {**_sharded_state(state, is_loading=False), "num_updates": state.num_updates, "layout": state.layout}


def _plan_save(tensors: dict[str, Any], folder: Path) -> Any:
    """Megatron's request to write this rank's part. Collective."""
    newer = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return dist_checkpointing.save(
        tensors,
        str(folder),
        sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=NUM_FILES),
        async_sharded_save=True,
        content_metadata={"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True},
        **({"async_strategy": "mcore"} if newer else {}),
    )


def _copy_to_host(bucket: Any) -> Any:
    path, name, (objects, tensors) = bucket
    return path, name, (objects, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors])


# ---------------------------------------------------------------- optimizer


def _chained(optimizer: MegatronOptimizer) -> list[Any]:
    """Those of dense parameters and of experts; one alone where experts are not shared out."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _optimizers(optimizer: MegatronOptimizer) -> list[tuple[int, Any]]:
    """With their place among the chained, without those of a rank that has no parameter of their kind."""
    return [(i, each) for i, each in enumerate(_chained(optimizer)) if not each.is_stub_optimizer]


def _parameters(optimizer: Any) -> Iterator[torch.Tensor]:
    for group in optimizer.optimizer.param_groups:
        yield from group["params"]


def _prime_moments(state: RankState) -> None:
    """Make the state that torch's AdamW makes at its first step: Megatron neither saves nor loads what is not there."""
    for _, optimizer in _optimizers(state.optimizer):
        if not isinstance(optimizer.optimizer, torch.optim.Optimizer) or not _counts_each(optimizer):
            continue
        for parameter in _parameters(optimizer):
            moments = optimizer.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.tensor(float(state.num_updates))
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)


def _counts_each(optimizer: Any) -> bool:
    """Whether steps are counted at each parameter, as torch does; the fused optimizers count in a group."""
    return isinstance(optimizer.optimizer, torch.optim.Adam)  # AdamW is one


def _load_optimizer(optimizer: Any, loaded: dict[Any, Any], num_updates: int) -> None:
    """Copy moments and main parameters. Megatron's `load_state_dict` isn't used: it gives all parameters one tensor of
    the step, which each of them then counts up, and asks for as many groups as were saved."""
    inner = optimizer.optimizer
    for moments in inner.state.values():
        moments.pop("step", None)  # else the distributed optimizer looks for it among what was loaded
    if isinstance(optimizer, DistributedOptimizer):
        optimizer.load_parameter_state_from_fully_reshardable(loaded["param_state"])
    else:
        parameters = list(_parameters(optimizer))
        for place, tensors in loaded.get("optimizer", loaded)["state"].items():
            for name, tensor in tensors.items():
                inner.state[parameters[place]][name].copy_(tensor)
        for mains, tensors in zip(
            getattr(optimizer, "fp32_from_float16_groups", []), loaded.get("fp32_from_fp16_params", []), strict=True
        ):
            for main, tensor in zip(mains, tensors, strict=True):
                main.copy_(tensor)
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = num_updates
    if _counts_each(optimizer):
        for parameter in _parameters(optimizer):
            inner.state[parameter]["step"] = torch.tensor(float(num_updates))


# ---------------------------------------------------------------- random generators


def rng_file(rank: int) -> str:
    """Name of the file with a rank's random generators."""
    return f"rng-rank{rank:05d}.safetensors"


def random_states() -> dict[str, torch.Tensor]:
    """This rank's states of torch's generators and of those that Megatron forks, uint8, copied."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    states |= {f"tracker.{name}": state for name, state in tracked.items()}
    return {name: state.clone() for name, state in states.items()}


def _load_random_states(folder: Path, same_layout: bool, seed: int) -> None:
    path = folder / rng_file(dist.get_rank())
    if not same_layout:
        if dist.get_rank() == 0:
            logger.warning(f"{folder}: saved in another layout; random generators start anew from seed {seed}")
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        return
    if not path.is_file():
        raise ValueError(f"{path}: missing; the random generators of this rank were not saved")
    set_random_states(load_file(path))


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put this rank's generators into the states that `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states(
        {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    )
