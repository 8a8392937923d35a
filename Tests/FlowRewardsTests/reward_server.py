"""Reward servers, good and bad, for the tests of the remote rewards; the standard library only.

    reward_server.py [CERTIFICATE KEY]

Prints its port on 127.0.0.1 and serves until its standard input ends. Addresses are /BEHAVIOUR/KEY/...: the behaviour
says what goes wrong, the key whose statistics it counts to, which GET /stats/KEY returns.
"""

import base64
import json
import os
import pickle
import pickletools
import ssl
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

lock = threading.Lock()
stats = {}
GIGABYTE = 1 << 30
EMPTY = {"requests": 0, "connections": (), "now": 0, "most": 0, "sizes": [], "sent": 0, "path": "", "headers": {}}

SHARED = [1, "shared"]
SAMPLE = {
    "floats": [0.25, 1.5e300, -0.0, 1e-320, float("inf")],
    "integers": [0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, -(2**40), 2**63 - 1, -(2**63)],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4, 5))],
    "flags": [True, False, None],
    "texts": ["", "grün ☃ 𝄞", "x" * 300, "y" * 70000],
    "shared": [SHARED, SHARED, {"again": SHARED}],
    "empty": [[], {}],
    "many": list(range(2500)),
    "table": {str(i): i / 7 for i in range(1500)},
    3: "an integer as key",
}
BYTES = [b"", b"\x00\xff", bytes(range(256)) * 2]


def sample(protocol):
    # Protocol 2 writes bytes as a call of a function.
    return SAMPLE if protocol < 3 else dict(SAMPLE, bytes=BYTES)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def red(png):
    """The first pixel's red: whatever the row's filter, its first pixel has nothing to be predicted from."""
    position, data = 8, b""
    while position < len(png):
        length = int.from_bytes(png[position : position + 4], "big")
        if png[position + 4 : position + 8] == b"IDAT":
            data += png[position + 8 : position + 8 + length]
        position += length + 12
    return zlib.decompress(data)[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    count = 0

    def setup(self):
        super().setup()
        with lock:
            Handler.count += 1
            self.connection_number = Handler.count

    def log_message(self, *arguments):
        pass

    def answer(self, status, body, headers=(), type="application/json"):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def start(self, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def hang_up(self, body=b""):
        if body:
            self.start(len(body))
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
        self.close_connection = True

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "stats":
            with lock:
                mine = dict(stats.get(parts[1], EMPTY))
                mine["connections"] = len(mine["connections"])
            return self.answer(200, json.dumps(mine))
        if parts[0] == "sample":
            return self.answer(200, pickle.dumps(sample(int(parts[1])), protocol=int(parts[1])))
        if parts[0] == "opcodes":
            return self.answer(200, json.dumps({op.code.encode("latin-1")[0]: op.name for op in pickletools.opcodes}))
        if parts[0] == "sick":
            return self.answer(503, "the model is not loaded")
        if parts[-1] == "health":
            return self.answer(200, '{"status": "ok"}')
        self.answer(404, "nothing here")

    def do_POST(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        how, key = parts[0], parts[1]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
            mine = stats.setdefault(
                key, dict(EMPTY, connections=set(), sizes=[])
            )
            mine["requests"] += 1
            mine["connections"].add(self.connection_number)
            mine["now"] += 1
            mine["most"] = max(mine["most"], mine["now"])
            mine["path"] = self.path
            mine["headers"] = dict(self.headers)
            number = mine["requests"]
        try:
            self.behave(how, parts, body, mine, number)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True
        finally:
            with lock:
                mine["now"] -= 1

    def behave(self, how, parts, body, mine, number):
        if how.startswith("pickle"):
            return self.pickle(how, parts, body, mine)
        if parts[0] == "same":
            equal = repr(pickle.loads(body)) == repr(sample(int(parts[1])))
            return self.answer(200, json.dumps({"equal": equal}))
        if how.startswith("judge"):
            return self.judge(how, body, mine)
        request = json.loads(body)
        reds = [red(base64.b64decode(image)) for image in request.pop("image")]
        with lock:
            mine["sizes"].append(len(reds))
            mine["last"] = request
        good = json.dumps({"rewards": [value / 255 for value in reds]})
        if how == "slow":
            time.sleep(0.2)
        elif how == "never":
            time.sleep(900)
        elif how == "slow-body":
            self.start(len(good))
            self.wfile.write(good[:5].encode())
            self.wfile.flush()
            time.sleep(30)
        elif how == "500-twice" and number <= 2:
            return self.answer(500, "out of\nluck")
        elif how == "busy-once" and number == 1:
            return self.answer(429, "busy", [("Retry-After", "1")])
        elif how == "always-500":
            return self.answer(500, "broken for good")
        elif how == "always-503":
            return self.answer(503, "loading")
        elif how == "bad-request":
            return self.answer(400, "your token is " + self.headers.get("Authorization", "absent") + " " + "x" * 500)
        elif how == "echo-error":
            return self.answer(200, json.dumps({"error": "token " + self.headers.get("Authorization", "absent")}))
        elif how == "moved":
            return self.answer(307, "", [("Location", "http://example.invalid/elsewhere")])
        elif how == "hang-mid-body":
            return self.hang_up(good.encode())
        elif how == "hang-up":
            return self.hang_up()
        elif how == "hang-once" and number == 1:
            return self.hang_up(good.encode())
        elif how == "close-idle":
            # Promises to keep the connection, but does not.
            self.close_connection = True
        elif how == "wrong-length":
            good = json.dumps({"rewards": [0.5] * (len(reds) - 1)})
        elif how == "nan":
            others = [float("nan"), float("-inf"), None, "0.5", True, [1]]
            good = json.dumps({"rewards": [0.5] + others[: len(reds) - 1]})
        elif how == "errors":
            # A number beside an error.
            good = json.dumps({"rewards": [0.5, None, 0.75], "errors": [None, "no face found", "too dark"]})
        elif how == "garbage":
            good = "<html>It works!</html>"
        elif how == "no-rewards":
            good = json.dumps({"rewards": {"0": 1}})
        elif how == "huge":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            part = b"1" * (1 << 20)
            for _ in range(GIGABYTE // len(part)):
                self.wfile.write(b"%x\r\n" % len(part) + part + b"\r\n")
                mine["sent"] += len(part)
            return self.wfile.write(b"0\r\n\r\n")
        elif how == "huge-declared":
            self.start(GIGABYTE)
            part = b"1" * (1 << 20)
            for _ in range(GIGABYTE // len(part)):
                self.wfile.write(part)
                mine["sent"] += len(part)
            return
        elif how == "huge-header":
            return self.answer(200, good, [("X-%d" % i, "x" * 1000) for i in range(90)])
        elif how == "413-above-2" and len(reds) > 2:
            return self.answer(413, "too many")
        elif how == "one-bad-image" and 0 in reds:
            return self.answer(500, "an image is black")
        self.answer(200, good)

    def judge(self, how, body, mine):
        request = json.loads(body)
        image, text = request["messages"][0]["content"]
        value = red(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")))
        with lock:
            mine["sizes"].append(1)
            del request["messages"]
            mine["last"] = dict(request, text=text["text"], order=[image["type"], text["type"]])
        choice = {"message": {"role": "assistant"}, "finish_reason": "stop"}
        message = choice["message"]
        if how == "judge":
            message["content"] = f"It is rather red.\nFinal Score: {1 + 4 * value / 255:.3f}\n"
        elif how == "judge-other":
            message["content"] = f"I give it {value} points."
        elif how == "judge-rambling":
            message["content"] = "I would say\nthat " + "very " * 40 + "nice"
            choice["finish_reason"] = "length"
        elif how == "judge-silent":
            message["content"] = None
        elif how == "judge-error":
            return self.answer(404, '{"error": {"message": "The model `m` does not exist."}}')
        elif how == "judge-huge-number":
            message["content"] = "Final Score: " + "9" * 400
        else:
            tokens = {
                "judge-yes": [("Yes", -0.5), ("No", -2.0), (" yes", -3.0), ("\u2581NO", -4.0), ("Maybe", -5.0)],
                "judge-only-no": [("No", -0.1), ("Nope", -3.0)],
                "judge-neither": [("The", -0.1), ("It", -3.0)],
                "judge-nonsense": [("Yes", 3.0), ("No", -3.0)],
                "judge-no-logprobs": [],
            }[how]
            message["content"] = tokens[0][0] if tokens else "Yes"
            if tokens:
                top = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens]
                choice["logprobs"] = {"content": [dict(top[0], top_logprobs=top)]}
        self.answer(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}))

    def pickle(self, how, parts, body, mine):
        request = pickle.loads(body)
        images = request.pop("images")
        with lock:
            mine["sizes"].append(len(images))
            mine["last"] = request
        assert all(image[:2] == b"\xff\xd8" for image in images), "not JPEG"
        lengths = [float(len(image)) for image in images]
        if how == "pickle-trap":
            return self.answer(200, pickle.dumps({"outputs": [Trap("/" + "/".join(parts[2:]))]}))
        if how == "pickle-geneval":
            counts = [meta["include"][0]["count"] / 10 for meta in request["meta_datas"]]
            assert all(isinstance(meta["include"][0]["count"], int) for meta in request["meta_datas"])
            strict = [float(count > 0.15) for count in counts]
            reply = {
                "scores": counts,
                "rewards": strict,
                "strict_rewards": strict,
                "group_rewards": {"counting": counts},
                "group_strict_rewards": {"counting": strict},
            }
        elif how == "pickle-prompts":
            reply = {"outputs": [float(len(prompt)) for prompt in request["prompts"]]}
        elif how == "pickle-lengths":
            reply = {"outputs": lengths}
        elif how == "pickle-nan":
            reply = {"outputs": [1, float("nan"), None, "x", True][: len(images)]}
        elif how == "pickle-short":
            reply = {"outputs": lengths[1:]}
        elif how == "pickle-key":
            reply = {"output": lengths}
        elif how == "pickle-text":
            return self.answer(200, "no pickle at all")
        self.answer(200, pickle.dumps(reply))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, ssl.SSLError)):
            super().handle_error(request, address)


server = Server(("127.0.0.1", 0), Handler)
if len(sys.argv) == 3:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_address[1], flush=True)
sys.stdin.read()
