"""The command as users run it, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Server, noise, png, published, until

HERE = Path(__file__).parent


class Running(Server):
    """A started command with what it printed."""

    def __init__(self, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chunkgrpo_rewards", *arguments], cwd=HERE, text=True, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment})
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))
        self.reader.start()

    def until_ready(self) -> "Running":
        until(lambda: self.process.poll() is not None or any("is ready after" in line for line in self.lines))
        assert self.process.poll() is None, self.text
        super().__init__(int(re.search(r" on http://127\.0\.0\.1:(\d+)", self.text)[1]), None)
        return self

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait(self) -> int:
        code = self.process.wait(180)
        self.reader.join()
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


@pytest.fixture
def command():
    started: list[Running] = []

    def start(*arguments: str, **environment: str) -> Running:
        started.append(Running(*arguments, **environment))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def test_a_function_of_a_module_is_served_and_sigterm_ends_it(command):
    server = command("scorer_for_tests:widths", "--port", "0").until_ready()
    assert server.compute(published(["a"], [png(noise(0, 8, 40))])).json == {"rewards": [40.0]}
    assert server.ask("GET", "/health").json["reward"] == "scorer_for_tests:widths"
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0 and "Traceback" not in server.text


def test_a_function_with_metadata_gets_it(command):
    server = command("scorer_for_tests:from_metadata", "--port", "0").until_ready()
    body = published(["a", "b"], [png(noise(0))] * 2) | {"metadata": [{"value": 7}, None]}
    assert server.compute(body).json == {"rewards": [7.0, None], "errors": [None, "the scorer gave no score"]}


def test_a_class_is_made_with_its_options(command):
    server = command("scorer_for_tests:Scaled", "--option", "factor=0.5", "--port", "0").until_ready()
    assert server.compute(published(["a"], [png(noise(0, 8, 40))])).json == {"rewards": [20.0]}


def test_sigterm_finishes_what_is_queued(command):
    server = command(
        "scorer_for_tests:slow", "--port", "0", "--max-batch", "1", "--no-warm-up", SLOW_SECONDS="0.5").until_ready()
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(server.compute, published(["x" * i], [png(noise(0))])) for i in range(1, 5)]
        until(lambda: server.metric("queue_images") == 3)  # one is in the scorer
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result().json for answer in answers] == [{"rewards": [float(i)]} for i in range(1, 5)]
    assert server.wait() == 0


def test_the_token_comes_from_the_environment(command):
    server = command("colourfulness", "--port", "0", CHUNKGRPO_REWARD_TOKEN="abc").until_ready()
    body = published(["a"], [png(noise(0))])
    assert server.compute(body).status == 401
    assert server.compute(body, {"Authorization": "Bearer abc"}).status == 200


REFUSED = [
    (["nothing"], 1, 'no scorer "nothing"; known: clip, colourfulness, geneval, hpsv3, imagereward, or module:function'),
    (["no_such_module:f"], 1, "cannot import no_such_module"),
    (["scorer_for_tests:absent"], 1, "has no function or class absent; it has widths, from_metadata, slow, broken, Scaled"),
    (["scorer_for_tests:broken"], 1,
     "it failed on a grey image (RuntimeError: no such file weights.bin); fix that, or pass --no-warm-up"),
    (["scorer_for_tests:widths", "--option", "a=1"], 1, "a function takes no options (a)"),
    (["scorer_for_tests:Scaled", "--option", "size=1"], 1, "has no option size; it has factor"),
    (["scorer_for_tests:Scaled", "--option", "factor=x"], 1, 'factor: expected a number, got "x"'),
    (["clip", "--option", "model=/no/such/folder"], 1, "/no/such/folder"),
    (["colourfulness", "--option", "model"], 2, "--option model: expected KEY=VALUE"),
    (["colourfulness", "--max-queue", "8"], 2, "--max-images 64 never fit --max-queue 8"),
    (["colourfulness", "--port", "99999"], 1, "cannot listen on 127.0.0.1 port 99999"),
]


@pytest.fixture(scope="module")
def refused():
    """All of them started at once: they need nothing but processor time, and there may be several processors."""
    started = [
        Running(*(["--port", "0"] if "--port" not in arguments else []), *arguments, HF_HUB_OFFLINE="1")
        for arguments, _, _ in REFUSED]
    yield started
    for running in started:
        running.stop()


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda i: " ".join(REFUSED[i][0]))
def test_what_cannot_be_served_ends_with_one_clear_error(refused, number):
    _, code, reason = REFUSED[number]
    server = refused[number]
    assert server.wait() == code
    assert reason in server.text and "Traceback" not in server.text


def test_an_empty_token_is_refused(command):
    server = command("colourfulness", "--port", "0", CHUNKGRPO_REWARD_TOKEN="")
    assert server.wait() == 2 and "CHUNKGRPO_REWARD_TOKEN is empty" in server.text


def test_a_port_in_use_is_named(command):
    server = command("colourfulness", "--port", "0").until_ready()
    other = command("colourfulness", "--port", str(server.port))
    assert other.wait() == 1 and f"cannot listen on 127.0.0.1 port {server.port}" in other.text


@pytest.mark.parametrize("name", ["hpsv3", "imagereward"])
def test_a_model_whose_package_is_not_here_says_what_to_install(command, name):
    server = command(name, "--port", "0")
    assert server.wait() == 1
    assert f"pip install 'chunkgrpo-rewards[{name}]'" in server.text and "Traceback" not in server.text
