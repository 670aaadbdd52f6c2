"""Runs SGLang's HTTP server as a child of `SglangEngine`: `python -m fipo_megatron.rollout.sglang_launcher`.

The token stays off the command, and the schedulers are those of sglang_scheduler.py.
"""

from __future__ import annotations

import os

from fipo_megatron.rollout.server_process import end_with_parent, read_settings

# SGLang 0.5.23 heeds a request's seed with some attention kernels alone. Its plain torch one, which is not among them,
# computes each sequence by itself: a request's tokens don't depend on its company, with cached prefixes or without.
CPU_ATTENTION = "torch_native"


def main() -> None:
    """Serve until standard input is closed."""
    settings = read_settings()
    end_with_parent()

    from sglang.srt import server_args
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree

    from fipo_megatron.rollout.sglang_scheduler import run_scheduler

    server_args.add_deterministic_attention_backend_choices([CPU_ATTENTION])
    server_args.add_radix_supported_deterministic_attention_backend_choices([CPU_ATTENTION])
    own = [f"--host={settings['address']}", f"--port={settings['port']}"]
    arguments = server_args.prepare_server_args([*settings["arguments"], *own])
    arguments.api_key = settings["token"]
    arguments.resolve_once()
    try:
        launch_server(arguments, run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
