"""Where the rank processes of the parity tests come from: a server that has imported torch once."""

from __future__ import annotations

import multiprocessing as mp

CONTEXT = mp.get_context("forkserver")
# What Megatron imports of torch, but not Megatron itself: it has to come after the patches of model/platform.py.
CONTEXT.set_forkserver_preload(["fipo_megatron.trainer.policy", "torch.distributed.tensor", "torch._dynamo"])
