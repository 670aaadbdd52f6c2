"""A server as `ServerProcess` starts them, without an engine: `python -m tests.unit.rollout.stub_launcher`."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from fipo_megatron.rollout.server_process import end_with_parent, read_settings


class Handler(http.server.BaseHTTPRequestHandler):
    """Echoes what it is sent, with the settings; one path refuses."""

    settings: dict[str, Any]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"settings": self.settings, "pid": os.getpid()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/refuse":
            self._answer(400, {"error": "no"})
            return
        time.sleep(body.get("sleep_s", 0))
        self._answer(200, {"body": body, "authorization": self.headers["authorization"]})

    def _answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    settings = read_settings()
    end_with_parent()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as an engine has workers
    print("the child is", child.pid, flush=True)
    if settings.get("fails"):
        sys.exit("no memory left")
    Handler.settings = settings | {"child": child.pid}
    server = http.server.ThreadingHTTPServer((settings["address"], 0), Handler, bind_and_activate=False)
    server.socket = socket.socket(fileno=settings["socket"])
    server.server_activate()
    server.serve_forever()


if __name__ == "__main__":
    main()
