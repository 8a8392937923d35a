"""The wire, with a real server and real requests."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import statistics
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import noise, png, published, until
from PIL import Image

from chunkgrpo_rewards.batching import Batcher, NotReady, QueueFull
from chunkgrpo_rewards.metrics import Metrics
from chunkgrpo_rewards.scorers.colourfulness import Colourfulness
from chunkgrpo_rewards.wire import Limits, Sample


def colourfulness(pixels: np.ndarray) -> float:
    """The formula in plain Python: the oracle shares no code with the scorer."""
    rg, yb = [], []
    for r, g, b in (pixels.reshape(-1, 3).astype(int) / 255).tolist():
        rg.append(r - g)
        yb.append(0.5 * (r + g) - b)
    spread = math.sqrt(statistics.pvariance(rg) + statistics.pvariance(yb))
    return spread + 0.3 * math.sqrt(statistics.fmean(rg) ** 2 + statistics.fmean(yb) ** 2)


def flat(*rgb: int) -> np.ndarray:
    return np.full((8, 8, 3), rgb, dtype=np.uint8)


def test_scores_are_those_of_the_formula_for_a_client_of_the_published_form(serve):
    images = [noise(i) for i in range(5)] + [flat(128, 128, 128), flat(255, 0, 0)]
    answer = serve(Colourfulness()).compute(published(["any"] * 7, [png(i) for i in images]))
    assert answer.status == 200 and list(answer.json) == ["rewards"]
    rewards = answer.json["rewards"]
    # The same double arithmetic in another order.
    assert rewards == pytest.approx([colourfulness(i) for i in images], rel=1e-12, abs=1e-12)
    # Closed forms: grey has no colour; pure red is √(1² + ½²)·0.3.
    assert rewards[5:] == pytest.approx([0, 0.3 * math.sqrt(1.25)], abs=1e-15)


def test_every_kind_of_eight_bit_image_arrives_as_rgb(serve):
    rgb = noise(1)
    grey = rgb[..., 0]
    seen = []

    def scorer(images, prompts, metadata):
        seen.extend((image.mode, np.asarray(image)) for image in images)
        return [0] * len(images)

    alpha = np.dstack([rgb, grey])
    answer = serve(scorer).compute(published(["a"] * 4, [png(rgb), png(grey), png(alpha), png(rgb, "JPEG")]))
    assert answer.json == {"rewards": [0.0] * 4}
    assert [mode for mode, _ in seen] == ["RGB"] * 4
    np.testing.assert_array_equal(seen[0][1], rgb)
    np.testing.assert_array_equal(seen[1][1], np.dstack([grey] * 3))
    np.testing.assert_array_equal(seen[2][1], rgb)


def test_concurrent_requests_are_merged_and_each_gets_its_own_scores(serve):
    sizes, gate = [], threading.Event()

    def scorer(images, prompts, metadata):
        sizes.append(len(images))
        gate.wait(180)
        return [float(prompt) for prompt in prompts]

    server = serve(scorer, max_batch=8)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(server.compute, published(["100"], [png(noise(0))]))
        until(lambda: sizes == [1])  # it is in the scorer; what comes now has to wait
        others = [
            pool.submit(server.compute, published([str(3 * i + j) for j in range(3)], [png(noise(i))] * 3))
            for i in range(6)]
        until(lambda: server.batcher.waiting == 18)
        gate.set()
        assert first.result().json == {"rewards": [100.0]}
        for i, answer in enumerate(others):
            assert answer.result().json == {"rewards": [3.0 * i, 3.0 * i + 1, 3.0 * i + 2]}
    assert sizes == [1, 8, 8, 2]
    assert server.metric("batch_images_sum") == 19 and server.metric("batch_images_count") == 4


def test_the_first_image_waits_for_others_up_to_max_wait(serve):
    sizes = []

    def scorer(images, prompts, metadata):
        sizes.append(len(images))
        return [0] * len(images)

    server = serve(scorer, max_batch=2, max_wait=180)  # longer than the test may take: only a full batch ends it
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.compute, published(["a"], [png(noise(i))])) for i in range(2)]
        assert [answer.result().status for answer in answers] == [200, 200]
    assert sizes == [2]


def test_the_scorer_is_loaded_and_called_on_one_thread(serve):
    threads = set()

    def load():
        threads.add(threading.get_ident())

        def scorer(images, prompts, metadata):
            threads.add(threading.get_ident())
            return [0] * len(images)

        return scorer

    server = serve(load=load, max_batch=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: server.compute(published(["a"], [png(noise(i))])), range(8)))
    assert len(threads) == 1


def test_one_bad_image_does_not_mask_the_others_of_its_batch(serve):
    calls = []

    def scorer(images, prompts, metadata):
        calls.append(prompts)
        if "bad" in prompts:
            raise ValueError("cannot\nlook at this")
        return [len(prompt) for prompt in prompts]

    server = serve(scorer)
    answer = server.compute(published(["a", "bad", "ccc"], [png(noise(0))] * 3))
    assert answer.status == 200
    assert answer.json == {"rewards": [1.0, None, 3.0], "errors": [None, "ValueError: cannot look at this", None]}
    assert calls == [["a", "bad", "ccc"], ["a"], ["bad"], ["ccc"]]
    assert server.compute(published(["dddd"], [png(noise(0))])).json == {"rewards": [4.0]}
    assert server.metric("images_scored_total") == 3 and server.metric("images_failed_total") == 1


def test_a_reason_that_utf8_cannot_hold_is_still_an_answer(serve):
    def scorer(images, prompts, metadata):
        raise ValueError(f"cannot read {prompts[0]}")

    answer = serve(scorer).compute(published(["\ud800" * 400], [png(noise(0))]))
    assert answer.status == 500 and answer.json["error"].startswith("the scorer failed: ValueError: cannot read ???")
    assert answer.json["error"].endswith("…") and len(answer.json["error"]) < 400


def test_an_exception_fails_only_the_requests_it_is_about(serve):
    gate, started = threading.Event(), threading.Event()

    def scorer(images, prompts, metadata):
        started.set()
        gate.wait(180)
        if "bad" in prompts:
            raise RuntimeError("out of memory")
        return [0] * len(prompts)

    server = serve(scorer)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.compute, published(["a"], [png(noise(0))]))
        started.wait(180)
        bad, good = (pool.submit(server.compute, published([p], [png(noise(0))])) for p in ("bad", "good"))
        until(lambda: server.batcher.waiting == 2)  # both will be in one batch
        gate.set()
        assert first.result().status == 200 and good.result().json == {"rewards": [0.0]}
        assert bad.result().status == 500
        assert bad.result().json == {"error": "the scorer failed: RuntimeError: out of memory"}


def test_what_is_no_number_becomes_null_with_a_reason(serve):
    values = [math.nan, math.inf, -math.inf, None, ValueError("no text found"), np.float32(0.5), np.array([2])[0], True]
    answer = serve(lambda images, prompts, metadata: values).compute(published(["a"] * 8, [png(noise(0))] * 8))
    assert answer.status == 200
    assert answer.json["rewards"] == [None, None, None, None, None, 0.5, 2.0, 1.0]
    assert answer.json["errors"] == [
        "the scorer gave nan, which is no score", "the scorer gave inf, which is no score",
        "the scorer gave -inf, which is no score", "the scorer gave no score", "no text found", None, None, None]


@pytest.mark.parametrize("value, reason", [
    ([1.0, 2.0], "TypeError: the scorer returned 2 scores for 1 images"),
    (3.0, "TypeError: the scorer returned float, expected a list of numbers"),
    (["1"], "TypeError: the scorer returned '1', expected a number"),
])
def test_a_scorer_that_answers_wrongly_is_a_server_error(serve, value, reason):
    answer = serve(lambda images, prompts, metadata: value).compute(published(["a"], [png(noise(0))]))
    assert answer.status == 500 and answer.json == {"error": f"the scorer failed: {reason}"}


def test_metadata_is_handed_on_and_absent_metadata_is_none(serve):
    seen = []

    def scorer(images, prompts, metadata):
        seen.append(metadata)
        return [0] * len(images)

    server = serve(scorer)
    entry = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}
    body = published(["two dogs", "a cat"], [png(noise(0))] * 2)
    for extra in ({"metadata": [entry, None]}, {"metadata": None}, {}):
        assert server.compute(body | extra).status == 200
    assert seen == [[entry, None], [None, None], [None, None]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> str:
    """A PNG of a few bytes that says it is huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return base64.b64encode(data).decode()


def sixteen_bits() -> str:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


GOOD = png(noise(0))
CUT = base64.b64encode(base64.b64decode(GOOD)[:-700]).decode()


@pytest.mark.parametrize("body, reason", [
    (b"{", "the body is not JSON"),
    (b"\xff\xfe", "the body is not JSON"),
    (b"[" * 200_000, "the body is not JSON"),
    ([], "the body: expected an object, got a list"),
    ({"image": [GOOD]}, "prompt: expected a list of strings, got null"),
    ({"prompt": "a", "image": [GOOD]}, "prompt: expected a list of strings, got a string"),
    ({"prompt": [1], "image": [GOOD]}, "prompt[0]: expected one of a list of strings, got a number"),
    (published(["a"], None), "image: expected a list of base64 strings, got null"),
    (published([], []), "image: expected at least one, got an empty list"),
    (published(["a", "b"], [GOOD]), "2 prompts but 1 images: send one prompt an image"),
    (published(["a"], [GOOD]) | {"video": [[GOOD]]}, "video: expected null, since this server scores images, got a list"),
    (published(["a"], [GOOD]) | {"metadata": {}}, "metadata: expected a list of objects or nulls, got an object"),
    (published(["a"], [GOOD]) | {"metadata": []}, "metadata: expected 1 entries, one an image, got 0"),
    (published(["a"], [GOOD]) | {"metadata": [1]}, "metadata[0]: expected one of a list of objects or nulls"),
    (published(["a", "b"], [GOOD, "%%%"]), "image[1]: not base64"),
    (published(["a"], ["é"]), "image[0]: not base64"),
    (published(["a"], ["aGVsbG8="]), "image[0]: 5 bytes that are no PNG or JPEG that can be decoded"),
    (published(["a"], [CUT]), "that are no PNG or JPEG that can be decoded"),
    (published(["a"], [bomb(30_000, 30_000)]), "image[0]: too many pixels, at most 1000000 pixels an image"),
    (published(["a"], [bomb(1001, 1000)]), "image[0]: 1001 × 1000 pixels, at most 1000000 pixels an image"),
    (published(["a"], [sixteen_bits()]), "image[0]: pixels of mode I;16, expected 8 bits a channel, grey or RGB"),
])
def test_a_malformed_request_is_refused_with_its_reason(serve, body, reason):
    server = serve(Colourfulness(), limits=Limits(pixels=1_000_000))
    answer = server.compute(body)
    assert answer.status == 400 and reason in answer.json["error"]
    assert server.compute(published(["a"], [GOOD])).status == 200


def test_unknown_keys_are_ignored(serve):
    assert serve(Colourfulness()).compute(published(["a"], [GOOD]) | {"extra": {"a": 1}}).status == 200


def test_too_many_images_and_too_large_a_body_are_413(serve):
    server = serve(Colourfulness(), limits=Limits(images=4, body=200_000))
    answer = server.compute(published(["a"] * 5, [GOOD] * 5))
    assert answer.status == 413 and answer.json == {
        "error": "5 images in one request, at most 4: send fewer at a time"}
    # A client that is still sending sees the answer too.
    for size in (200_001, 20_000_000):
        answer = server.compute(b" " * size)
        assert answer.status == 413 and "a body of more than 200000 bytes" in answer.json["error"]


def test_a_body_of_unknown_length_is_limited_too(serve):
    server = serve(Colourfulness(), limits=Limits(body=200_000))
    with socket.create_connection(("127.0.0.1", server.port), timeout=180) as s:
        s.sendall(b"POST /compute HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(30):
            s.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        s.sendall(b"0\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_asks_first_is_refused_before_it_sends(serve):
    server = serve(Colourfulness(), limits=Limits(body=1000))
    with socket.create_connection(("127.0.0.1", server.port), timeout=180) as s:
        s.sendall(b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\nExpect: 100-continue\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 413 ")


def test_only_the_right_token_opens_compute_and_metrics(serve):
    server = serve(Colourfulness(), token="s3cret")
    body = published(["a"], [GOOD])
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer é"}):
        for answer in (server.compute(body, headers), server.ask("GET", "/metrics", headers=headers)):
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "CHUNKGRPO_REWARD_TOKEN" in answer.json["error"] and "s3cret" not in answer.text
    # A client that is still sending a large body sees the answer too.
    assert server.compute(b" " * 20_000_000).status == 401
    assert server.ask("GET", "/health").status == 200
    right = {"Authorization": "Bearer s3cret"}
    assert server.compute(body, right).status == 200
    metrics = server.ask("GET", "/metrics", headers=right)
    assert metrics.status == 200 and 'requests_total{status="401"} 5' in metrics.text


def test_a_full_queue_is_503_with_the_time_to_wait(serve):
    gate, started = threading.Event(), threading.Event()

    def scorer(images, prompts, metadata):
        started.set()
        gate.wait(180)
        return [0] * len(images)

    server = serve(scorer, max_queue=3, limits=Limits(images=3), max_batch=1)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.compute, published(["a"], [GOOD]))
        started.wait(180)
        second = pool.submit(server.compute, published(["a"] * 2, [GOOD] * 2))
        until(lambda: server.batcher.waiting == 2)
        assert server.metric("queue_images") == 2
        answer = server.compute(published(["a"] * 2, [GOOD] * 2))
        assert answer.status == 503 and answer.json == {"error": "2 images wait already, at most 3: try again"}
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        third = pool.submit(server.compute, published(["a"], [GOOD]))  # this one fits
        until(lambda: server.batcher.waiting == 3)
        gate.set()
        assert [f.result().status for f in (first, second, third)] == [200] * 3
    assert server.compute(published(["a"] * 3, [GOOD] * 3)).status == 200


def test_the_queue_takes_all_images_of_a_request_or_none():
    gate, started = threading.Event(), threading.Event()

    def scorer(images, prompts, metadata):
        started.set()
        gate.wait(180)
        return [0] * len(images)

    batcher = Batcher(lambda: scorer, max_batch=1, max_wait=0, max_queue=2, metrics=Metrics())
    sample = Sample(Image.new("RGB", (1, 1)), "a")
    with pytest.raises(NotReady):
        batcher.submit([sample])
    batcher.start()
    until(lambda: batcher.ready)
    first = batcher.submit([sample])
    started.wait(180)
    second = batcher.submit([sample])
    with pytest.raises(QueueFull):
        batcher.submit([sample] * 2)
    assert batcher.waiting == 1
    second[0].cancel()  # makes room
    third = batcher.submit([sample] * 2)
    gate.set()
    batcher.close()
    assert [f.result().value for f in first + third] == [0.0] * 3
    with pytest.raises(NotReady):
        batcher.submit([sample])


def test_images_of_a_client_that_left_are_not_scored(serve):
    gate, calls = threading.Event(), []

    def scorer(images, prompts, metadata):
        calls.append(prompts)
        gate.wait(180)
        return [0] * len(images)

    server = serve(scorer, max_batch=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.compute, published(["first"], [GOOD]))
        until(lambda: len(calls) == 1)
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            body = json.dumps(published(["impatient"], [GOOD])).encode()
            s.sendall(b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: server.batcher.waiting == 1)
        until(lambda: server.batcher.waiting == 0)
        gate.set()
        assert first.result().status == 200
    assert server.compute(published(["last"], [GOOD])).status == 200
    assert calls == [["first"], ["last"]]
    assert 'requests_total{status="499"} 1' in server.ask("GET", "/metrics").text


def test_health_is_503_until_the_scorer_is_loaded(serve):
    gate = threading.Event()

    def load():
        gate.wait(180)
        return Colourfulness()

    server = serve(load=load, wait=False)
    health = server.ask("GET", "/health")
    assert health.status == 503 and health.json == {"status": "starting"}
    answer = server.compute(published(["a"], [GOOD]))
    assert answer.status == 503 and answer.json == {"error": "not ready: starting"} and "retry-after" in answer.headers
    assert server.metric("ready") == 0
    gate.set()
    until(lambda: server.batcher.ready)
    health = server.ask("GET", "/health")
    assert health.status == 200 and health.json["status"] == "ok" and health.json["max_images"] == 64
    assert server.metric("ready") == 1


def test_metrics_are_prometheus_text(serve):
    server = serve(Colourfulness())
    server.compute(published(["a"] * 3, [GOOD] * 3))
    server.compute(b"?")
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert answer.text.endswith("\n")
    for line in ('chunkgrpo_reward_requests_total{status="200"} 1', 'chunkgrpo_reward_requests_total{status="400"} 1',
                 "chunkgrpo_reward_images_scored_total 3", 'chunkgrpo_reward_batch_images_bucket{le="2"} 0',
                 'chunkgrpo_reward_batch_images_bucket{le="4"} 1', 'chunkgrpo_reward_batch_images_bucket{le="+Inf"} 1',
                 "chunkgrpo_reward_queue_images 0", "# TYPE chunkgrpo_reward_batch_images histogram"):
        assert line in lines
    assert any(line.startswith('chunkgrpo_reward_info{reward="a \\"test\\"",version=') for line in lines)
    assert server.metric("scorer_seconds_total") > 0
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) == 8


def test_other_addresses_answer_in_the_same_form(serve):
    server = serve(Colourfulness())
    assert server.ask("GET", "/nothing").json == {"error": "GET /nothing: Not Found"}
    answer = server.ask("GET", "/compute")
    assert answer.status == 405 and "error" in answer.json
