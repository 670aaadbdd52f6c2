"""Seeded task generators, one file a task."""

from __future__ import annotations

from typing import Any

from fipo_megatron.config.schema import ArithmeticTaskConfig, ChainTaskConfig, KnightsTaskConfig
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask
from fipo_megatron.data.tasks.base import Task
from fipo_megatron.data.tasks.chain import ChainTask
from fipo_megatron.data.tasks.knights import KnightsTask


def make_task(config: ArithmeticTaskConfig | ChainTaskConfig | KnightsTaskConfig) -> Task[Any]:
    """The configured task."""
    match config:
        case ArithmeticTaskConfig():
            return ArithmeticTask(config)
        case ChainTaskConfig():
            return ChainTask(config)
        case KnightsTaskConfig():
            return KnightsTask(config)
