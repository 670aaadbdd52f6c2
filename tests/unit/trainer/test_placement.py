"""The shared memory that a run asks for."""

from __future__ import annotations

import numpy as np

from fipo_megatron.config.schema import RolloutConfig
from fipo_megatron.trainer.placement import MIN_OBJECT_STORE_BYTES, TOKEN_BYTES, object_store_bytes
from fipo_megatron.types import Generation, TrainingBatch


def test_a_token_takes_the_bytes_of_all_its_arrays() -> None:
    generation = Generation(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0)
    batch = TrainingBatch(*np.zeros((3, 1), np.int64), *np.zeros((3, 1), np.float32))  # all arrays, one token each
    arrays = (generation.token_ids, generation.logprobs, batch.token_ids, batch.old_logprobs, batch.ref_logprobs)
    assert sum(array.nbytes for array in arrays if array is not None) == TOKEN_BYTES


def test_the_longest_batch_of_a_recipe_fits_and_a_small_run_asks_for_little() -> None:
    recipe = RolloutConfig(
        prompts_per_step=512, samples_per_prompt=16, max_prompt_tokens=2048, max_response_tokens=20480
    )
    assert object_store_bytes(recipe) == 3 * 24 * 8192 * 22528  # 12.4 GiB
    small = RolloutConfig(prompts_per_step=32, samples_per_prompt=8, max_prompt_tokens=16, max_response_tokens=48)
    assert object_store_bytes(small) == MIN_OBJECT_STORE_BYTES == 256 * 1024 * 1024
