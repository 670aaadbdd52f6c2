"""The configuration that the parity tests run a policy with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fipo_megatron.config.schema import Config


def make_config(folder: Path | None = None, **sections: dict[str, Any]) -> Config:
    """A small float32 CPU config; `sections` override single settings."""
    base: dict[str, Any] = {
        "platform": "cpu",
        "model": {"path": str(folder) if folder else None, "dtype": "float32"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_prompt_tokens": 16, "max_response_tokens": 48},
        "trainer": {"mini_batch_prompts": 4, "microbatch_tokens": 80, "max_policy_kl": 10.0},
        "timeouts": {"startup_s": 100, "call_s": 60, "collective_s": 60},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)
