"""An engine's HTTP server as a child process, and the requests that are made to it.

The child ends when this process does, however that ends: it reads its standard input, which closes then. Its token
travels there, too, where no list of processes shows it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil

POLL_S = 0.5
HEALTH_S = 5.0
END_S = 10.0
LOG_CHARS = 6000  # of the end of a server's log, in errors: the cause is followed by those who lost it


class EngineServerError(RuntimeError):
    """A server died, or refused a request."""


class ServerProcess:
    """A server on `address` that is asked for health at `/health`; its output goes to `log`.

    `command` runs a launcher that calls `read_settings` first and `end_with_parent` next. With `hands_socket_over` it
    finds the number of a socket that is bound to its port among the settings, as `socket`: without, somebody may take
    the port until it listens.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
        address: str,
        hands_socket_over: bool = False,
    ) -> None:
        self.token = secrets.token_urlsafe(32)
        bound = _bound_socket(address)
        self.port = int(bound.getsockname()[1])
        self.url = f"http://{address}:{self.port}"
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # its own group, which is ended as a whole
                pass_fds=(bound.fileno(),) if hands_socket_over else (),
            )
        assert self._process.stdin is not None
        meeting = {"token": self.token, "address": address, "port": self.port, "socket": bound.fileno()}
        line = json.dumps({**settings, **meeting})
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        bound.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def listens(self) -> bool:
        """Whether the server, or a process that it has started, is the one that listens on its port."""
        server = psutil.Process(self._process.pid)
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
            for process in (server, *server.children(recursive=True))
            for connection in process.net_connections("inet")
        )

    def check(self) -> None:
        """Raises EngineServerError, with the end of its log, if the server is gone."""
        if self._process.poll() is not None:
            self.fail(f"the engine's server ended with status {self._process.returncode}")

    def fail(self, message: str) -> NoReturn:
        """Raises EngineServerError with a message and the end of the server's log."""
        text = self._log.read_text(errors="replace")[-LOG_CHARS:] if self._log.exists() else ""
        raise EngineServerError(f"{message}; the end of {self._log}:\n{text}")

    def stop(self) -> None:
        """End the server and all that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait(END_S)


class ServerClient:
    """Requests to an engine's server: one that was started here, or another's, by its URL and token.

    `post_all` uses up to `max_connections`: more requests wait here instead of in the server.
    """

    def __init__(self, url: str, token: str, max_connections: int, server: ServerProcess | None = None) -> None:
        self.url, self.token = url, token
        self._server = server
        # Orders don't wait for a connection behind responses, which they may have to end.
        self._responses, self._orders = (
            httpx.AsyncClient(
                base_url=url,
                headers={"Authorization": f"Bearer {token}"},
                # A response may take long, and wait for a connection: a server's death is seen otherwise.
                timeout=httpx.Timeout(None, connect=30.0),
                limits=httpx.Limits(max_connections=limit),
                trust_env=False,  # no proxy between processes of one machine or cluster
            )
            for limit in (max_connections, None)
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Return when the server answers.

        Raises:
            EngineServerError: it died, or does not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._check()
            try:
                # Without the token: whoever has taken the port must not be told it.
                httpx.get(f"{self.url}/health", timeout=HEALTH_S, trust_env=False).raise_for_status()
            except httpx.HTTPError:
                time.sleep(POLL_S)
                continue
            if self._server is not None and not self._server.listens():
                self._fail(f"somebody else listens on port {self._server.port}, which the engine's server was to have")
            return
        self._fail(f"the engine's server did not answer within {timeout_s:g} s")

    def get(self, path: str) -> Any:
        """The JSON, or else the text, that a path answers with."""
        return self._result(self._submit(self._orders, "GET", path))

    def post(self, path: str, body: Any = None, params: Mapping[str, str] | None = None) -> Any:
        """The JSON, or else the text, that a path answers a body with.

        Raises:
            EngineServerError: the server refused it, or died.
        """
        return self._result(self._submit(self._orders, "POST", path, body, params))

    def post_all(self, path: str, bodies: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        """`(index, JSON)` of many requests made at once, as they are answered; an item holds those at hand."""
        futures = {self._submit(self._responses, "POST", path, body): index for index, body in enumerate(bodies)}
        try:
            while futures:
                done, _ = wait(futures, timeout=POLL_S, return_when=FIRST_COMPLETED)
                if not done:
                    self._check()
                    continue
                yield [(futures.pop(future), self._result(future)) for future in done]
        finally:
            for future in futures:  # hung up on, the server frees them
                future.cancel()

    def close(self) -> None:
        """Give the connections up, and end the server if it was started here."""
        try:
            if not self._loop.is_closed():
                for client in (self._responses, self._orders):
                    asyncio.run_coroutine_threadsafe(client.aclose(), self._loop).result(END_S)
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(END_S)
                self._loop.close()
        finally:
            if self._server is not None:
                self._server.stop()

    def _submit(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
    ) -> Future[httpx.Response]:
        request = client.request(method, path, json=body, params=params)
        return asyncio.run_coroutine_threadsafe(request, self._loop)

    def _result(self, future: Future[httpx.Response]) -> Any:
        while not future.done():
            wait([future], timeout=POLL_S)
            if not future.done():
                self._check()
        try:
            response = future.result()
        except httpx.TransportError:
            time.sleep(POLL_S)  # so that a death can be told from a refused connection
            self._check()
            raise
        if response.status_code >= 400:
            self._fail(
                f"the engine's server answered {response.request.url.path} with {response.status_code}: {response.text}"
            )
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else response.text

    def _check(self) -> None:
        if self._server is not None:
            self._server.check()

    def _fail(self, message: str) -> NoReturn:
        if self._server is not None:
            self._server.fail(message)
        raise EngineServerError(message)


def _bound_socket(address: str) -> socket.socket:
    """A socket that has a port of the address, and does not listen yet."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((address, 0))
    return sock


def read_settings() -> dict[str, Any]:
    """(In a launcher) what `ServerProcess` has written to standard input."""
    return json.loads(sys.stdin.buffer.readline())


def end_with_parent() -> None:
    """(In a launcher) have this process and all that it starts killed when the parent is gone, or closes the pipe."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class RequireToken:
    """ASGI middleware: every request but `/health` needs the token, not only those that a server guards itself."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._header = f"Bearer {os.environ['FIPO_ENGINE_TOKEN']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            await self._app(scope, receive, send)
            return
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if secrets.compare_digest(given, self._header):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "a token is needed"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})
