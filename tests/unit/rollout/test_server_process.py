"""Server processes and requests to them, with a server that has no engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fipo_megatron.rollout.server_process import EngineServerError, RequireToken, ServerClient, ServerProcess

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "tests.unit.rollout.stub_launcher"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
NOTICED_S = 10.0


def start(folder: Path, **settings: object) -> ServerProcess:
    log = folder / "server.log"
    return ServerProcess(COMMAND, settings, ENVIRONMENT, log, "127.0.0.1", hands_socket_over=True)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ServerClient]:
    server = start(tmp_path, model="m")
    client = ServerClient(server.url, server.token, 8, server)
    client.wait_until_healthy(60)
    yield client
    client.close()


def assert_gone(*pids: int) -> None:
    deadline = time.monotonic() + NOTICED_S
    while time.monotonic() < deadline and any(is_running(pid) for pid in pids):
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_requests_carry_the_token_that_no_command_line_shows(client: ServerClient) -> None:
    server = client._server
    assert server is not None
    assert not any(server.token in argument for argument in psutil.Process(server.pid).cmdline())
    settings = client.get("/")["settings"]
    assert (settings["model"], settings["token"], settings["port"]) == ("m", server.token, server.port)
    answer = client.post("/echo", {"a": 1})
    assert answer == {"body": {"a": 1}, "authorization": f"Bearer {server.token}"}
    with pytest.raises(EngineServerError, match="(?s)answered /refuse with 400.*no.*the child is"):
        client.post("/refuse", {})


def test_answers_come_as_they_are_ready(client: ServerClient) -> None:
    bodies = [{"sleep_s": 0.8}, {"sleep_s": 0.0}, {"sleep_s": 0.4}]
    answers = [answer for at_hand in client.post_all("/echo", bodies) for answer in at_hand]
    assert [index for index, _ in answers] == [1, 2, 0]
    assert all(answer["body"] == bodies[index] for index, answer in answers)


def test_an_order_does_not_wait_behind_responses(client: ServerClient) -> None:
    """More of them than connections, all at work: one that ends them must get through."""
    stream = client.post_all("/generate", [{"sleep_s": 1.5}] * 20)
    waiting = threading.Thread(target=lambda: next(stream))
    waiting.start()
    time.sleep(0.3)
    start = time.monotonic()
    client.post("/pause", {})
    assert time.monotonic() - start < 1.0
    waiting.join()
    stream.close()


def test_a_server_that_dies_is_an_error_at_once_and_leaves_nobody(client: ServerClient) -> None:
    info = client.get("/")
    begin = time.monotonic()
    threading.Timer(0.5, os.kill, (info["pid"], signal.SIGKILL)).start()
    with pytest.raises(EngineServerError, match="ended with status -9"):
        list(client.post_all("/echo", [{"sleep_s": 60}, {"sleep_s": 60}]))
    assert time.monotonic() - begin < NOTICED_S
    client.close()
    assert_gone(info["pid"], info["settings"]["child"])


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = start(tmp_path, fails=True)
    client = ServerClient(server.url, server.token, 8, server)
    with pytest.raises(EngineServerError, match="(?s)ended with status 1.*no memory left"):
        client.wait_until_healthy(60)
    client.close()


def test_nobody_outlives_the_process_that_started_the_server(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.unit.rollout.test_server_process import start
from fipo_megatron.rollout.server_process import ServerClient
server = start(Path({str(tmp_path)!r}))
client = ServerClient(server.url, server.token, 8, server)
client.wait_until_healthy(60)
print(server.pid, client.get("/")["settings"]["child"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=90)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    assert_gone(*map(int, parent.stdout.split()))


@pytest.mark.parametrize(
    ("path", "header", "passes"),
    [("/health", b"", True), ("/pause", b"Bearer t0k", True), ("/pause", b"Bearer t0", False), ("/pause", b"", False)],
)
def test_every_path_but_health_needs_the_token(
    path: str, header: bytes, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIPO_ENGINE_TOKEN", "t0k")
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    guarded = RequireToken(app)
    headers = [(b"authorization", header)] if header else []
    for kind in ("http", "websocket"):
        asyncio.run(guarded({"type": kind, "path": path, "headers": headers}, None, send))
    assert reached == ([path] * 2 if passes else [])
    assert [message.get("status", message.get("code")) for message in sent if "body" not in message] == (
        [] if passes else [401, 1008]
    )


def test_nobody_can_take_the_port_before_the_server_listens(tmp_path: Path) -> None:
    server = start(tmp_path)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", server.port))
    server.stop()
    assert_gone(server.pid)
