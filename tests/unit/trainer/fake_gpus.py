"""The devices that the processes of a run would see, from a Ray cluster on whose GPUs nothing runs: Ray counts those
that it is told to have. `python -m tests.unit.trainer.fake_gpus CONFIG...` prints a line of JSON for each."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from typing import Any

import fipo_megatron.trainer  # noqa: F401, isort: skip (before Ray, which reads what it sets)
import ray
from ray.util.placement_group import remove_placement_group

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.reservation import Reservation


class Process:
    """Says what it sees."""

    def devices(self) -> list[int]:
        return [int(device) for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]


def find_devices(config: Config) -> dict[str, Any]:
    """What each rank sees, and each engine, of actors that all live at once; or why they can't."""
    try:
        reservation = Reservation(config, on_cpu=False, pools={"policy": {"fipo_trainer": 1e-3}})
    except ValueError as error:
        return {"error": str(error)}
    plan = reservation.plan
    actors = [
        ray.remote(Process)
        .options(**reservation.options(place), runtime_env={"env_vars": reservation.environment(place)})
        .remote()
        for place in (*plan.ranks, *plan.engines)
    ]
    devices = ray.get([actor.devices.remote() for actor in actors], timeout=120)
    for actor in actors:
        ray.kill(actor)
    remove_placement_group(reservation.group)
    return {"ranks": devices[: len(plan.ranks)], "engines": devices[len(plan.ranks) :]}


def main() -> None:
    """One node of eight devices, which CUDA calls 8 to 15."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "8,9,10,11,12,13,14,15"
    folder = tempfile.mkdtemp(prefix="fipo-", dir="/tmp")
    try:
        ray.init(
            num_cpus=8,
            num_gpus=8,
            resources={"fipo_trainer": 1},
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
            _temp_dir=f"{folder}/ray",
            _system_config={"prestart_worker_first_driver": False},
        )
        for text in sys.argv[1:]:
            print(json.dumps(find_devices(Config.model_validate(json.loads(text)))), flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
