"""A server of our own starts, answers, is guarded, dies loudly, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from fipo_megatron.rollout.server_process import EngineServerError, ServerClient, ServerProcess

REPO = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "tests.unit.rollout.small_server"]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ServerClient]:
    server = ServerProcess(COMMAND, {}, {"PYTHONPATH": str(REPO)}, tmp_path / "server.log", "127.0.0.1")
    made = ServerClient(server.url, server.token, server)
    try:
        made.wait_until_healthy(30)
        yield made
    finally:
        made.close()
        assert not psutil.pid_exists(server.pid)


def test_answers_come_as_they_are_ready_under_their_own_index(client: ServerClient) -> None:
    assert client.post("/a", {"b": 1}) == {"path": "/a", "b": 1}
    assert client.get("/c") == {"path": "/c"}
    bodies = [{"seconds": 0.6, "n": 0}, {"seconds": 0.0, "n": 1}, {"seconds": 0.3, "n": 2}]
    answers = [answer for some in client.post_all("/generate", bodies) for answer in some]
    assert [index for index, _ in answers] == [1, 2, 0]
    assert all(answer["n"] == index for index, answer in answers)


def test_a_request_without_the_token_is_refused_and_nobody_can_read_it(client: ServerClient) -> None:
    assert httpx.get(f"{client.url}/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer guess"}):
        assert httpx.post(f"{client.url}/generate", json={}, headers=headers).status_code == 401
    own = psutil.Process().children(recursive=True)
    assert not any(client.token in " ".join(process.cmdline()) for process in own)
    listening = [c.laddr.ip for process in own for c in process.net_connections("inet") if c.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}


def test_a_refusal_and_a_death_say_why(client: ServerClient) -> None:
    with pytest.raises(EngineServerError, match=r'answered /x with 400: \{"path": "/x", "status": 400\}'):
        client.post("/x", {"status": 400})
    start = time.monotonic()
    with pytest.raises(EngineServerError, match=r"(?s)ended with status 3; .*the last words"):
        list(client.post_all("/generate", [{"die": True}, {"seconds": 60}]))
    assert time.monotonic() - start < 10


def test_a_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from fipo_megatron.rollout.server_process import ServerProcess\n"
        f"server = ServerProcess({COMMAND!r}, {{}}, {{}}, Path({str(tmp_path / 'log')!r}), '127.0.0.1')\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, _ = psutil.wait_procs([server], timeout=20)
    assert gone
