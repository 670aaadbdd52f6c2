"""vLLM engines with one thing broken on purpose."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fipo_megatron.config.schema import Config
from fipo_megatron.rollout.vllm import VllmEngine


class FlippingEngine(VllmEngine):
    """Flips a bit of a parameter that it has received, before the update is finished."""

    parameter = "model.layers.1.mlp.down_proj.weight"

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        finish = self.llm.finish_weight_update

        def flip_and_finish() -> None:
            import torch

            model = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
            words = dict(model.named_parameters())[self.parameter].data.view(torch.int32)
            words[3, 5] ^= 1
            finish()

        self.llm.finish_weight_update = flip_and_finish
        return super().update_weights(update_info)


class PackedEngine(VllmEngine):
    """Multiplies by packed copies of its weights, as vLLM's CPU build does by itself."""

    def __init__(self, model_folder: Path, config: Config, load_weights: bool = False) -> None:
        import vllm._custom_ops as custom_ops

        # Now, not when the engine loads it below: what it mends is broken again.
        importlib.import_module("fipo_megatron.reshard.engine_worker")
        custom_ops._supports_onednn = True
        super().__init__(model_folder, config, load_weights)
