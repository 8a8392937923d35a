"""The three addresses: /health, /compute, /metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from . import __version__
from .batching import Batcher, NotReady, Outcome, QueueFull
from .metrics import CONTENT_TYPE
from .wire import Limits, Refused, parse

log = logging.getLogger("chunkgrpo_rewards")

READERS = 16
"""Bodies that are read and decoded at once; further ones wait in the sockets' buffers, not in memory."""
BODY_SECONDS = 120.0
"""A client that sends its body for longer than this keeps a reader from others."""


@dataclass
class Service:
    """A batcher behind HTTP."""

    reward: str
    batcher: Batcher
    limits: Limits = field(default_factory=Limits)
    token: str | None = None

    def __post_init__(self) -> None:
        # Else such a request would be told to try again for ever.
        if self.limits.images > self.batcher.max_queue:
            raise ValueError(f"{self.limits.images} images a request never fit a queue of {self.batcher.max_queue}")
        self._readers = asyncio.Semaphore(READERS)

    def authorise(self, request: Request) -> None:
        """Raises Refused unless the request carries the token, if there is one."""
        if self.token is None:
            return
        given = request.headers.get("authorization", "")
        # Bytes: compare_digest takes no text beyond ASCII.
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refused(401, "wrong or missing bearer token: set CHUNKGRPO_REWARD_TOKEN to the server's")

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health."""
        if not self.batcher.ready:
            return 503, {"status": self.batcher.state if self.batcher.state != "ready" else "stopping"}
        return 200, {
            "status": "ok", "reward": self.reward, "version": __version__, "max_images": self.limits.images,
            "max_batch": self.batcher.max_batch,
        }

    async def compute(self, request: Request) -> dict[str, Any]:
        """Rewards of a request; raises Refused and what the batcher raises."""
        self.authorise(request)
        if not self.batcher.ready:
            raise NotReady
        async with self._readers:
            try:
                body = await asyncio.wait_for(_body(request, self.limits), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise Refused(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
            wanted = await asyncio.to_thread(parse, body, self.limits)
            del body
            if not self.batcher.has_room(len(wanted.images)):
                raise QueueFull
            samples = await asyncio.to_thread(wanted.samples, self.limits)
        results = asyncio.gather(*map(asyncio.wrap_future, self.batcher.submit(samples)))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({results, left}, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise ClientDisconnect
            return answer(results.result())
        finally:
            left.cancel()
            if not results.done():
                results.cancel()  # whoever timed out asks again: its images need not be scored twice

    def retry_after(self) -> int:
        """Seconds until the queue may have room."""
        return min(60, max(1, math.ceil(self.batcher.waiting * self.batcher.metrics.seconds_an_image)))


def answer(outcomes: list[Outcome]) -> dict[str, Any]:
    """The body of a successful answer; raises Refused where the scorer raised for every image."""
    if all(outcome.raised for outcome in outcomes):
        raise Refused(500, f"the scorer failed: {outcomes[0].reason}")
    body: dict[str, Any] = {"rewards": [outcome.value for outcome in outcomes]}
    if any(outcome.value is None for outcome in outcomes):
        body["errors"] = [outcome.reason for outcome in outcomes]
    return body


def make_app(service: Service) -> FastAPI:
    """The application; its lifespan is the batcher's."""
    batcher = service.batcher

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="chunkgrpo rewards", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        status, body = service.health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        try:
            service.authorise(request)
        except Refused as error:
            return _error(error.status, str(error))
        text = batcher.metrics.text(
            reward=service.reward, version=__version__, ready=batcher.ready, waiting=batcher.waiting)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @app.post("/compute")
    async def compute(request: Request) -> Response:
        response = await respond(request)
        batcher.metrics.request(response.status_code)
        return response

    async def respond(request: Request) -> Response:
        try:
            return JSONResponse(await service.compute(request))
        except Refused as error:
            return _error(error.status, str(error))
        except NotReady:
            return _error(503, f"not ready: {service.health()[1]['status']}", {"Retry-After": "5"})
        except QueueFull:
            return _error(
                503, f"{batcher.waiting} images wait already, at most {batcher.max_queue}: try again",
                {"Retry-After": str(service.retry_after())})
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            log.exception("a request failed")
            return _error(500, f"{type(error).__name__}: {error}")

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)

    return app


def _error(status: int, reason: str, headers: Any = None) -> Response:
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse({"error": reason}, status, headers)


async def _body(request: Request, limits: Limits) -> bytes:
    # uvicorn reads on what is left of a body that was refused, so that a client that still sends sees the answer.
    too_large = Refused(413, f"a body of more than {limits.body} bytes: send fewer images at a time")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.body:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        if (size := size + len(part)) > limits.body:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _left(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
