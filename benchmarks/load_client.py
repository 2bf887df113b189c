"""Sends a trace of requests to a server and notes when what came back. Light: it shares the processors with the server.

    python load_client.py HOST PORT < trace.json

The trace is {"requests": [{"at": s, "body": {...}}, ...], "patience_s": s}: bodies of /v1/completions, each sent `at`
seconds after the start, whatever has become of the others. The answer is a list with, for each request,
{"sent": s, "status": code, "chunks": [[s, data], ...], "error": text}: every event of the stream as it came, its time
counted from the start. Nothing of an event is looked at before the last stream has ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from time import perf_counter
from typing import Any


async def ask(host: str, port: int, body: dict[str, Any], began: float) -> dict[str, Any]:
    """One request on a connection of its own."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    found: dict[str, Any] = {"sent": perf_counter() - began, "status": 0, "chunks": [], "error": None}
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        status = await reader.readline()
        found["status"] = int(status.split()[1])
        headers = [line async for line in _until_empty(reader)]
        if not any(line.lower().startswith(b"transfer-encoding: chunked") for line in headers):
            found["error"] = (await reader.read()).decode(errors="replace")
            return found
        rest = b""
        while size := int(await reader.readline(), 16):
            rest += (await reader.readexactly(size + 2))[:-2]
            *events, rest = rest.split(b"\n\n")
            now = perf_counter() - began
            found["chunks"] += [[now, event] for event in events]
    finally:
        writer.close()
    return found


async def _until_empty(reader: asyncio.StreamReader) -> Any:
    while line := (await reader.readline()).strip():
        yield line


async def run(host: str, port: int, trace: dict[str, Any]) -> list[dict[str, Any]]:
    began = perf_counter()

    async def later(request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(request["at"] - (perf_counter() - began))
        try:
            return await asyncio.wait_for(ask(host, port, request["body"], began), trace["patience_s"])
        except (OSError, ValueError, IndexError, EOFError, TimeoutError) as error:
            return {"sent": request["at"], "status": 0, "chunks": [], "error": f"{type(error).__name__}: {error}"}

    return list(await asyncio.gather(*map(later, trace["requests"])))


def main() -> None:
    trace = json.load(sys.stdin)
    answers = asyncio.run(run(sys.argv[1], int(sys.argv[2]), trace))
    for answer in answers:
        answer["chunks"] = [[round(t, 5), data.decode()] for t, data in answer["chunks"]]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
