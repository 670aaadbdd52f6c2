from __future__ import annotations

import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.launch import check_num_gpus


def test_ranks_and_engine_need_a_device_each() -> None:
    config = Config.model_validate({"parallel": {"tensor": 2, "data": 2}})
    check_num_gpus(config, available=5)
    with pytest.raises(ValueError, match="4 ranks and the engine take 5 GPUs, there are 4"):
        check_num_gpus(config, available=4)
