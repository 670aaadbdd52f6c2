"""Where the rank processes of the parity tests come from: a server that has imported the heavy libraries once."""

from __future__ import annotations

import multiprocessing as mp

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fipo_megatron.trainer.policy"])
