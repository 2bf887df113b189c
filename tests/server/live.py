"""A server on a free port, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any

from outpace.server.app import create_app
from outpace.server.connections import Patience
from outpace.server.run import bind, make_server
from outpace.server.service import EngineService


class Live:
    """Serves an engine while the `with` block runs. `url` is its address."""

    def __init__(self, engine: Any, grace: float = 5.0, patience: Patience | None = None, **options: Any) -> None:
        self.engine, self.service = engine, EngineService(engine)
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._up = threading.Event()
        self.app = create_app(self.service, **options)
        self.server = make_server(self.app, self.service, grace=grace, patience=patience, ready=self._up.set)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._socket]))

    def __enter__(self) -> Live:
        self._thread.start()
        assert self._up.wait(60), "the server did not start"
        return self

    def stop_gently(self) -> None:
        """What a signal does."""
        self.server._loop.call_soon_threadsafe(self.server.end_gently)

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.should_exit = True
        self.join()
        self._socket.close()
