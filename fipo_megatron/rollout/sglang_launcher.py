"""Runs SGLang's HTTP server as a child of `SglangEngine`: `python -m fipo_megatron.rollout.sglang_launcher`."""

from __future__ import annotations

from fipo_megatron.rollout.server_process import end_with_parent, read_settings


def main() -> None:
    """Serve until standard input is closed."""
    settings = read_settings()
    end_with_parent()

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    # The token is handed over inside this process: on a command it would be in every list of processes.
    own = ["--host", settings["address"], "--port", str(settings["port"]), "--api-key", settings["token"]]
    run_server(prepare_server_args([*settings["arguments"], *own]))


if __name__ == "__main__":
    main()
