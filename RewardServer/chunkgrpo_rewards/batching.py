"""One worker thread that loads a scorer and gives it images from many requests at a time."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

from .metrics import Metrics
from .wire import Sample

log = logging.getLogger("chunkgrpo_rewards")

Scorer = Callable[..., Sequence[Any]]
"""(images, prompts, metadata) → one number an image; None or an exception where there is none."""


class QueueFull(Exception):
    """More images than may wait."""


class NotReady(Exception):
    """The scorer is not loaded, or the server stops."""


@dataclass(frozen=True)
class Outcome:
    """A score, or why there is none."""

    value: float | None
    reason: str | None = None
    raised: bool = False
    """The scorer raised an exception for this image alone."""


@dataclass
class _Waiting:
    sample: Sample
    arrived: float
    future: Future[Outcome] = field(default_factory=Future)


class Batcher:
    """Collects samples for up to `max_wait` seconds or `max_batch` images, whichever is first.

    Models are not thread-safe, and some keep state per thread: loading, warming up and scoring happen on one thread.
    """

    def __init__(
        self, load: Callable[[], Scorer], *, max_batch: int, max_wait: float, max_queue: int, metrics: Metrics,
        failed: Callable[[], None] = lambda: None,
    ):
        self._load = load
        self._failed = failed
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.state = "starting"
        self.error: BaseException | None = None
        # Daemon: a load that takes minutes must not outlive SIGTERM.
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)

    def start(self) -> None:
        """Starts to load; `state` turns to ready or failed."""
        self._thread.start()

    def close(self) -> None:
        """Scores what is queued and ends the worker."""
        with self._changed:
            loading = self.state == "starting"
            self._closing = True
            self._changed.notify_all()
        if not loading and self.alive:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether images are taken."""
        return self.state == "ready" and not self._closing

    @property
    def waiting(self) -> int:
        """Images that nobody has started on or given up."""
        with self._changed:
            return sum(not entry.future.cancelled() for entry in self._queue)

    def has_room(self, images: int) -> bool:
        """Whether so many may join the queue now."""
        return self.waiting + images <= self.max_queue

    def submit(self, samples: Sequence[Sample]) -> list[Future[Outcome]]:
        """Queues all of them or none; cancel a future to withdraw its image."""
        with self._changed:
            if not self.ready:
                raise NotReady
            self._queue = deque(entry for entry in self._queue if not entry.future.cancelled())
            if len(self._queue) + len(samples) > self.max_queue:
                raise QueueFull
            now = time.monotonic()
            entries = [_Waiting(sample, now) for sample in samples]
            self._queue.extend(entries)
            self._changed.notify_all()
            return [entry.future for entry in entries]

    def _work(self) -> None:
        try:
            scorer = self._load()
        except BaseException as error:  # SystemExit too: the thread must not vanish silently
            self.error, self.state = error, "failed"
            self._failed()
            return
        with self._changed:
            self.state = "ready"
        while (batch := self._next()) is not None:
            if batch:
                self._score(scorer, batch)

    def _next(self) -> list[_Waiting] | None:
        """The next batch, which is empty if everybody in it gave up; None at the end."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return None
                self._changed.wait()
            deadline = self._queue[0].arrived + self.max_wait
            while len(self._queue) < self.max_batch and not self._closing:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Waiting] = []
            while self._queue and len(batch) < self.max_batch:
                entry = self._queue.popleft()
                if entry.future.set_running_or_notify_cancel():
                    batch.append(entry)
            return batch

    def _score(self, scorer: Scorer, batch: list[_Waiting]) -> None:
        samples = [entry.sample for entry in batch]
        try:
            outcomes = self._call(scorer, samples)
        except BaseException as error:
            log.exception("the scorer failed on %d images", len(samples))
            if len(samples) == 1:
                outcomes = [_raised(error)]
            else:
                # One bad image must not mask the others.
                outcomes = [self._alone(scorer, sample) for sample in samples]
        failed = sum(outcome.value is None for outcome in outcomes)
        self.metrics.images(len(outcomes) - failed, failed)
        for entry, outcome in zip(batch, outcomes):
            entry.future.set_result(outcome)

    def _alone(self, scorer: Scorer, sample: Sample) -> Outcome:
        try:
            return self._call(scorer, [sample])[0]
        except BaseException as error:
            return _raised(error)

    def _call(self, scorer: Scorer, samples: list[Sample]) -> list[Outcome]:
        start = time.monotonic()
        try:
            return outcomes(scorer, samples)
        finally:
            self.metrics.batch(len(samples), time.monotonic() - start)


def outcomes(scorer: Scorer, samples: Sequence[Sample]) -> list[Outcome]:
    """Calls the scorer once; raises what it raises, and TypeError for an answer that is not one number an image."""
    values = scorer(
        [sample.image for sample in samples], [sample.prompt for sample in samples],
        metadata=[sample.metadata for sample in samples])
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"the scorer returned {type(values).__name__}, expected a list of numbers") from None
    if len(values) != len(samples):
        raise TypeError(f"the scorer returned {len(values)} scores for {len(samples)} images")
    return [_outcome(value) for value in values]


def _outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome(None, "the scorer gave no score")
    if isinstance(value, Exception):
        return Outcome(None, _line(str(value) or type(value).__name__))
    if isinstance(value, str):  # float("1") works, but a scorer that answers with text is mistaken
        raise TypeError(f"the scorer returned {value[:40]!r}, expected a number")
    number = float(value)
    return Outcome(number) if math.isfinite(number) else Outcome(None, f"the scorer gave {number}, which is no score")


def _raised(error: BaseException) -> Outcome:
    return Outcome(None, _line(f"{type(error).__name__}: {error}"), raised=True)


def _line(text: str) -> str:
    # A prompt's lone surrogate, which JSON can carry and UTF-8 cannot, may be quoted.
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= 300 else text[:299] + "…"
