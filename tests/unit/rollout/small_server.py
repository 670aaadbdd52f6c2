"""A server that `ServerProcess` can start in a second: echoes what it is posted, after the seconds that it asks for."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from fipo_megatron.rollout.server_process import RequireToken, end_with_parent, read_settings


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body = json.loads((await receive())["body"] or b"{}") or {}
    await asyncio.sleep(body.get("seconds", 0))
    if body.get("die"):
        print("the last words", flush=True)
        os._exit(3)
    status = body.get("status", 200)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps({"path": scope["path"], **body}).encode()})


if __name__ == "__main__":
    import uvicorn

    settings = read_settings()
    end_with_parent()
    os.environ["FIPO_ENGINE_TOKEN"] = settings["token"]
    uvicorn.run(RequireToken(echo), host=settings["address"], port=settings["port"], log_level="error", lifespan="off")
