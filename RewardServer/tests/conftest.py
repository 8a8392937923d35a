"""A real uvicorn server on loopback and real requests to it."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import uvicorn
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chunkgrpo_rewards.batching import Batcher, Scorer  # noqa: E402
from chunkgrpo_rewards.metrics import Metrics  # noqa: E402
from chunkgrpo_rewards.server import Service, make_app  # noqa: E402
from chunkgrpo_rewards.wire import Limits  # noqa: E402


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@dataclass
class Server:
    port: int
    batcher: Batcher

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        try:
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        finally:
            connection.close()

    def compute(self, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return self.ask("POST", "/compute", body, headers)

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"chunkgrpo_reward_{name} "))


class QuickServer(uvicorn.Server):
    """Looks a hundred times a second whether it is to stop, not ten times: tests start dozens."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def stopped() -> Iterator[list[tuple[threading.Thread, Batcher]]]:
    """Servers that were told to stop. uvicorn takes a tenth of a second for that, which no test waits for."""
    stopping: list[tuple[threading.Thread, Batcher]] = []
    yield stopping
    for thread, batcher in stopping:
        thread.join(60)
        assert not thread.is_alive() and not batcher.alive


@pytest.fixture
def serve(stopped: list[tuple[threading.Thread, Batcher]]) -> Iterator[Callable[..., Server]]:
    """Starts servers: serve(scorer, …) or serve(load=…, wait=False)."""
    running: list[tuple[uvicorn.Server, threading.Thread, Batcher]] = []

    def start(
        scorer: Scorer | None = None, *, load: Callable[[], Scorer] | None = None, wait: bool = True,
        max_batch: int = 16, max_wait: float = 0.0, max_queue: int = 512, limits: Limits = Limits(),
        token: str | None = None,
    ) -> Server:
        batcher = Batcher(
            load or (lambda: scorer), max_batch=max_batch, max_wait=max_wait, max_queue=max_queue, metrics=Metrics())
        app = make_app(Service("a \"test\"", batcher, limits, token))
        server = QuickServer(uvicorn.Config(app, port=0, log_level="warning", access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread, batcher))
        until(lambda: server.started)
        if wait:
            until(lambda: batcher.ready)
        return Server(server.servers[0].sockets[0].getsockname()[1], batcher)

    yield start
    for server, thread, batcher in running:
        server.should_exit = True
        stopped.append((thread, batcher))


def until(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def noise(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 [H, W, 3], another one for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray, kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def published(prompts: list[str], images: list[str]) -> dict[str, Any]:
    """A request as Flow-Factory's client sends it."""
    return {"prompt": prompts, "image": images, "video": None, "condition_images": None, "condition_videos": None}
