"""`chunkgrpo-rewards`: serves one scorer until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time

import uvicorn
from PIL import Image

from . import __version__
from .batching import Batcher, Scorer, outcomes
from .metrics import Metrics
from .scorers import NAMES, BadScorer, make
from .server import Service, make_app
from .wire import Limits, Sample

TOKEN = "CHUNKGRPO_REWARD_TOKEN"
log = logging.getLogger("chunkgrpo_rewards")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="chunkgrpo-rewards", description="Serves a reward over HTTP until it gets SIGTERM or Ctrl-C.",
        epilog=f"A bearer token is taken from the environment variable {TOKEN}; without it anybody may ask.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("scorer", help=f"{', '.join(NAMES)}, or module:function or module:Class of yours")
    p.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                   help="option of the scorer, such as model=FOLDER or device=cuda:1; may be repeated")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    p.add_argument("--max-batch", type=_positive, default=16, help="images in one call of the scorer")
    p.add_argument("--max-wait-ms", type=_not_negative, default=10.0,
                   help="how long the first image of a batch waits for others")
    p.add_argument("--max-queue", type=_positive, default=512, help="images that may wait; more get 503")
    p.add_argument("--max-images", type=_positive, default=64, help="images of one request; more get 413")
    p.add_argument("--max-body-mib", type=_positive, default=256, help="size of a request; more gets 413")
    p.add_argument("--max-pixels", type=_positive, default=16 << 20, help="pixels of one image; more gets 400")
    p.add_argument("--no-warm-up", action="store_true", help="do not score a grey image before the first request")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the server; 0 after SIGTERM or Ctrl-C, 1 if it cannot serve, 2 for a wrong command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    p = parser()
    a = p.parse_args(arguments)
    options: dict[str, str] = {}
    for entry in a.option:
        key, equals, value = entry.partition("=")
        if not (key and equals):
            p.error(f"--option {entry}: expected KEY=VALUE")
        options[key] = value
    if a.max_images > a.max_queue:
        p.error(f"--max-images {a.max_images} never fit --max-queue {a.max_queue}: lower one or raise the other")
    token = os.environ.get(TOKEN)
    if token is not None and not (token.strip() == token != "" and token.isascii() and token.isprintable()):
        p.error(f"{TOKEN} is empty or has characters that a header cannot hold: unset it or give a token")

    def load() -> Scorer:
        start = time.monotonic()
        scorer = make(a.scorer, options)
        if not a.no_warm_up:
            warm_up(scorer)
        log.info("%s is ready after %.1f s", a.scorer, time.monotonic() - start)
        return scorer

    try:
        listener = socket.create_server((a.host, a.port), family=_family(a.host), backlog=512)
    except (OSError, OverflowError) as error:
        log.error("cannot listen on %s port %s: %s; choose another with --port", a.host, a.port, error)
        return 1
    if token is None and not listener.getsockname()[0].startswith(("127.", "::1")):
        log.warning("anybody who reaches %s may ask: set %s to a secret", a.host, TOKEN)

    def stop() -> None:
        server.should_exit = True

    batcher = Batcher(
        load, max_batch=a.max_batch, max_wait=a.max_wait_ms / 1000, max_queue=a.max_queue, metrics=Metrics(),
        failed=stop)
    limits = Limits(images=a.max_images, body=a.max_body_mib << 20, pixels=a.max_pixels)
    app = make_app(Service(a.scorer, batcher, limits, token))
    # Clients keep connections between iterations: one that closes while they ask looks like a failure.
    server = uvicorn.Server(uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_keep_alive=300))
    # uvicorn obeys these signals while it runs; when it has, it raises them once more for whoever was there before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    host, port = listener.getsockname()[:2]
    log.info("%s on http://%s:%d", a.scorer, f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
    if batcher.error is not None:
        known = isinstance(batcher.error, BadScorer)
        log.error("cannot serve %s: %s", a.scorer, batcher.error if known else repr(batcher.error),
                  exc_info=None if known else batcher.error)
        return 1
    return 0


def warm_up(scorer: Scorer) -> None:
    """Scores a grey image, so that the first request does not pay for what is made on first use."""
    sample = Sample(Image.new("RGB", (256, 256), "#808080"), "a photo", getattr(scorer, "warm_up", None))
    try:
        outcomes(scorer, [sample])
    except Exception as error:
        raise BadScorer(
            f"it failed on a grey image ({type(error).__name__}: {error}); fix that, or pass --no-warm-up if it "
            "cannot score one") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _not_negative(text: str) -> float:
    if not 0 <= (value := float(text)) < 3.6e6:
        raise argparse.ArgumentTypeError(f"expected 0 … 3600000, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
