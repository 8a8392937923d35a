"""Counters in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What was asked and what it cost; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._scored = self._failed = 0
        self._sizes = [0] * (len(SIZES) + 1)
        self._images = 0
        self._seconds = 0.0

    def request(self, status: int) -> None:
        """Counts an answer of /compute."""
        with self._lock:
            self._requests[status] += 1

    def images(self, scored: int, failed: int) -> None:
        """Counts images that got a score and those that got none."""
        with self._lock:
            self._scored += scored
            self._failed += failed

    def batch(self, size: int, seconds: float) -> None:
        """Counts one call of the scorer."""
        with self._lock:
            self._sizes[bisect_left(SIZES, size)] += 1
            self._images += size
            self._seconds += seconds

    @property
    def seconds_an_image(self) -> float:
        """What an image has cost so far; 0 before the first."""
        with self._lock:
            return self._seconds / self._images if self._images else 0.0

    def text(self, *, reward: str, version: str, ready: bool, waiting: int) -> str:
        """Everything, with the state that only the caller knows."""
        lines: list[str] = []

        def metric(name: str, kind: str, what: str, *samples: str) -> None:
            name = "chunkgrpo_reward_" + name
            lines.extend([f"# HELP {name} {what}", f"# TYPE {name} {kind}", *(name + sample for sample in samples)])

        with self._lock:
            metric("info", "gauge", "What is served.", f'{{reward="{_escape(reward)}",version="{version}"}} 1')
            metric("ready", "gauge", "1 when the scorer is loaded and warm.", f" {int(ready)}")
            metric("requests_total", "counter", "Answers of /compute; 499 where the client had left.",
                   *(f'{{status="{status}"}} {n}' for status, n in sorted(self._requests.items())))
            metric("images_scored_total", "counter", "Images that got a score.", f" {self._scored}")
            metric("images_failed_total", "counter", "Images that got none.", f" {self._failed}")
            total, buckets = 0, []
            for size, n in zip((*SIZES, "+Inf"), self._sizes):
                total += n
                buckets.append(f'_bucket{{le="{size}"}} {total}')
            metric("batch_images", "histogram", "Images in one call of the scorer.", *buckets,
                   f"_sum {self._images}", f"_count {total}")
            metric("scorer_seconds_total", "counter", "Seconds in the scorer.", f" {self._seconds:.6f}")
            metric("queue_images", "gauge", "Images that wait for the scorer.", f" {waiting}")
        return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
