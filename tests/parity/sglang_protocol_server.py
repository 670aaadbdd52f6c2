"""A server that answers as SGLang 0.5.23 does, without a model: `python -m tests.parity.sglang_protocol_server SGLANG`.

Every request is checked by SGLang's own structs. Its tokens are made up: the version that samples one, times 10.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fipo_megatron.rollout.server_process import end_with_parent, read_settings
from tests.parity.sglang_structs import RefusedError, Structs

TOKEN_S = 0.01
LAST_BATCH_S = 0.2  # after the last answer the scheduler is not idle yet
REFUSED_VERSION, DEADLY_VERSION = 666, 667  # versions of updates that the loader refuses, and dies of
GUARDED_BY_SESSION = ("/update_weights_from_tensor", "/update_weights_from_distributed")
Answer = tuple[int, Any]


class ProtocolServer:
    """What SGLang remembers between requests."""

    def __init__(self, structs: Structs, options: list[str]) -> None:
        self.structs = structs
        version = next(option for option in options if option.startswith("--weight-version="))
        self.version = int(version.partition("=")[2])
        self.in_session = self.is_paused = False
        self.released: set[str] = set()
        self.loaders = [options[options.index("--custom-weight-loader") + 1]]
        self.groups: set[str] = set()
        self.running = self.aborts = 0
        self.last_batch_until = 0.0

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        try:
            values = self.structs.check(path, body)
            handler = getattr(self, path.removeprefix("/"))
            return handler(values) or (200, {"success": True, "message": "Success"})
        except RefusedError as error:
            return 400, {"success": False, "message": str(error)}
        except Exception:  # ends SGLang's scheduler, and the server with it
            traceback.print_exc()
            os._exit(1)

    def generate(self, values: dict[str, Any]) -> Answer:
        parameters, tokens, spans = values["sampling_params"], [], []
        aborts, self.running = self.aborts, self.running + 1
        reason = "length"
        while len(tokens) < parameters["max_new_tokens"]:
            time.sleep(TOKEN_S)
            if self.aborts != aborts:
                reason = "abort"
                break
            if self.is_paused:
                continue
            if not spans or spans[-1]["version"] != str(self.version):
                spans.append({"version": str(self.version), "start": len(tokens), "end": len(tokens)})
            tokens.append(10 * self.version)
            spans[-1]["end"] = len(tokens)
        self.running -= 1
        self.last_batch_until = time.monotonic() + LAST_BATCH_S
        meta = {
            "finish_reason": {"type": reason, "message": "Aborted"},
            "weight_version": str(self.version),
            "weight_versions": spans,
            "output_token_logprobs": [[-1.0, token, None] for token in tokens],
        }
        return 200, {"output_ids": tokens, "meta_info": meta}

    def begin_weight_update(self, values: dict[str, Any]) -> None:
        if self.in_session:
            raise RefusedError("a weight-update session is already open")
        self.in_session = True

    def end_weight_update(self, values: dict[str, Any]) -> None:
        self._need_session("end_weight_update")
        self.in_session = False

    def init_weights_update_group(self, values: dict[str, Any]) -> None:
        if values["world_size"] != values["rank_offset"] + 1:
            raise RefusedError("Failed to initialize custom process group: not all ranks came")
        self.groups.add(values["group_name"])

    def update_weights_from_distributed(self, values: dict[str, Any]) -> None:
        self._need_session("update_weights_from_distributed")
        if values["group_name"] not in self.groups:
            raise RefusedError(f"Group {values['group_name']} not in {sorted(self.groups)}")
        if not len(values["names"]) == len(values["shapes"]) == len(values["dtypes"]):
            raise RefusedError("names, shapes and dtypes differ in number")
        self._flush(values)

    def update_weights_from_tensor(self, values: dict[str, Any]) -> None:
        self._need_session("update_weights_from_tensor")
        (payload,) = values["serialized_named_tensors"]
        named = self.structs.unpickle(payload)
        if values["load_format"] is not None:
            assert values["load_format"] in self.loaders
            self._load(json.loads(named[0][0]))
        elif not all(tensor.dim() for _, tensor in named):
            raise RefusedError("Failed to update parameter online")
        self._flush(values)

    def update_weights_from_disk(self, values: dict[str, Any]) -> None:
        if not Path(values["model_path"]).is_dir():
            raise RefusedError(f"Failed to update weights: {values['model_path']} is no folder")
        self._flush(values)

    def _load(self, order: dict[str, Any]) -> None:
        """As reshard/sglang_worker.py."""
        report: dict[str, Any] = {}
        if order["order"] == "update":
            report = {"receive_s": 0.25, "verify_s": 0.5}
            if order["version"] == REFUSED_VERSION:
                report = {"refusal": ["WeightMismatchError", "model.norm.weight: is not what was sent"]}
            elif order["version"] == DEADLY_VERSION:
                print("the loader is no more", flush=True)
                os._exit(9)
        elif order["order"] == "checksums":
            report = {"checksums": {"model.norm.weight": "00ff"}}
        (Path(order["reports"]) / "report-0.json").write_text(json.dumps(report))

    def update_weight_version(self, values: dict[str, Any]) -> None:
        assert not values["abort_all_requests"]
        self.version = int(values["new_version"])

    def pause_generation(self, values: dict[str, Any]) -> None:
        self.is_paused = True
        self.keeps_memories = values["mode"] == "in_place"
        if values["mode"] == "abort":
            self._end_all()

    def continue_generation(self, values: dict[str, Any]) -> None:
        self.is_paused = False

    def abort_request(self, values: dict[str, Any]) -> Answer | None:
        if values["abort_all"]:
            self._end_all()
        return 200, ""

    def flush_cache(self, values: dict[str, Any]) -> Answer:
        if self.last_batch_until > time.monotonic():
            return 400, "Flush cache failed.\n"
        if self.running and not (self.is_paused and not self.keeps_memories):
            return 400, "Flush cache failed.\n"
        return 200, "Cache flushed.\n"

    def release_memory_occupation(self, values: dict[str, Any]) -> Answer:
        is_idle = not self.running and self.last_batch_until <= time.monotonic()
        assert is_idle, "release_memory_occupation should be called only when server is idle."
        self.released = set(values["tags"])
        return 200, None

    def resume_memory_occupation(self, values: dict[str, Any]) -> Answer:
        assert self.released >= set(values["tags"]), "the real one ends at what was not released"
        self.released -= set(values["tags"])
        return 200, None

    def _need_session(self, name: str) -> None:
        if not self.in_session:
            raise RefusedError(f"{name} must run between begin_weight_update() and end_weight_update()")

    def _flush(self, values: dict[str, Any]) -> None:
        if values["flush_cache"] and self.flush_cache({})[0] != 200:
            raise RefusedError("Weights were updated, but the cache was not flushed")

    def _end_all(self) -> None:
        self.aborts += 1
        while self.running:
            time.sleep(TOKEN_S)


def make_handler(server: ProtocolServer, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(200, "")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
            if self.headers["Authorization"] != f"Bearer {token}":
                self._reply(401, {"error": "Unauthorized"})
                return
            self._reply(*server.answer(self.path.partition("?")[0], body))

        def _reply(self, status: int, content: Any) -> None:
            is_text = isinstance(content, str)
            data = content.encode() if is_text else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if is_text else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


def main() -> None:
    settings = read_settings()
    end_with_parent()
    server = ProtocolServer(Structs(Path(sys.argv[1])), settings["arguments"])
    http = ThreadingHTTPServer((settings["address"], settings["port"]), make_handler(server, settings["token"]))
    http.serve_forever()


if __name__ == "__main__":
    main()
