"""Runs vLLM's HTTP server as a child of `VllmServerEngine`: `python -m fipo_megatron.rollout.vllm_launcher`."""

from __future__ import annotations

import os
import socket

from fipo_megatron.rollout.server_process import end_with_parent, read_settings


def main() -> None:
    """Serve until standard input is closed."""
    settings = read_settings()
    end_with_parent()
    os.environ["FIPO_ENGINE_TOKEN"] = settings["token"]

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.system_utils import set_ulimit

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = [*settings["arguments"], "--host", settings["address"], "--port", str(settings["port"])]
    arguments += ["--enable-scale-out", "--disable-uvicorn-access-log"]  # tokens in, tokens out
    # vLLM's own token guards the paths below /v1 alone.
    arguments += ["--middleware", "fipo_megatron.rollout.server_process.RequireToken"]
    args = parser.parse_args(arguments)
    validate_parsed_serve_args(args)
    set_ulimit()  # a connection a request
    listener = socket.socket(fileno=settings["socket"])
    uvloop.run(run_server_worker(f"http://{settings['address']}:{settings['port']}", listener, args))


if __name__ == "__main__":
    main()
