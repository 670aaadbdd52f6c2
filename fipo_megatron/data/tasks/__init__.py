"""Seeded task generators, one file a task."""

from __future__ import annotations

from typing import Any

from fipo_megatron.config.problems import ArithmeticTaskConfig, CheckedSumsTaskConfig, KnightsTaskConfig
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask
from fipo_megatron.data.tasks.base import Task
from fipo_megatron.data.tasks.checked_sums import CheckedSumsTask
from fipo_megatron.data.tasks.knights import KnightsTask


def make_task(config: ArithmeticTaskConfig | CheckedSumsTaskConfig | KnightsTaskConfig) -> Task[Any]:
    """The configured task."""
    match config:
        case ArithmeticTaskConfig():
            return ArithmeticTask(config)
        case CheckedSumsTaskConfig():
            return CheckedSumsTask(config)
        case KnightsTaskConfig():
            return KnightsTask(config)
