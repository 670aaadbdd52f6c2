"""tools/train.py with one part of the driver broken on purpose; FAULT in the environment names it."""

from __future__ import annotations

import math
import os
import runpy
from pathlib import Path
from typing import Any

from fipo_megatron.reward import judge
from fipo_megatron.reward.base import Verdict
from fipo_megatron.trainer.actor import EngineClient


def reward_is_nan(response: str, ground_truth: str) -> Verdict:
    return Verdict(math.nan, 0.0, "")


update_weights = EngineClient.update_weights


async def engine_dies_in_second_update(self: EngineClient, update_info: dict[str, Any]) -> dict[str, float]:
    import ray

    if update_info["version"] == 1 and not getattr(EngineClient, "has_died", False):
        EngineClient.has_died = True  # type: ignore[attr-defined]
        self.actor.update_weights.remote(update_info)
        ray.kill(self.actor)
    return await update_weights(self, update_info)


if __name__ == "__main__":
    fault = os.environ["FAULT"]
    if fault == "engine_dies_in_second_update":
        EngineClient.update_weights = engine_dies_in_second_update  # type: ignore[method-assign]
    else:
        judge.RULES["dapo"] = {"reward_is_nan": reward_is_nan}[fault]
    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "train.py"), run_name="__main__")
