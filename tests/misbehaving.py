"""An HTTP server on loopback with the two chat forms, that misbehaves as its plan says."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

@contextmanager
def servers(make):
    """A function that makes a server with `make` and runs it; all of them end with the block."""
    running = []

    def start(*args, **settings):
        server = make(*args, **settings)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


KEY = "sk-secret-0123456789"


class Misbehaving(ThreadingHTTPServer):
    """Answers each question by the next step of its plan, then properly. A step is a function of the handler; the
    question is the last text of the request. What arrived is kept in `seen` as (question, body, headers, time)."""

    daemon_threads = True

    def __init__(self, handler, plan=None):
        super().__init__(("127.0.0.1", 0), handler)
        self.plan, self.seen, self.lock, self.busy, self.most_busy = plan or {}, [], threading.Lock(), 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a client that hung up is part of the plan

    def asked(self, question):
        return [entry for entry in self.seen if entry[0] == question]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        server = self.server
        with server.lock:
            server.seen.append((question, body, {k.lower(): v for k, v in self.headers.items()}, time.monotonic()))
            steps = server.plan.get(question, [])
            step = steps.pop(0) if steps else proper
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            step(self)
        finally:
            with server.lock:
                server.busy -= 1

    def say(self, status, content, headers=(), kind="application/json"):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def reply(self, text="It is (B).", finish=None):
        if self.path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": text}
            return {"id": "c", "object": "chat.completion", "created": 1, "model": "m",
                    "choices": [{"index": 0, "message": message, "finish_reason": finish or "stop"}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}}  # fmt: skip
        return {"id": "m", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None,
                "content": [{"type": "text", "text": text}], "stop_reason": finish or "end_turn",
                "usage": {"input_tokens": 100, "output_tokens": 7}}  # fmt: skip


def proper(handler):
    handler.say(200, handler.reply())


def status(code, message="no", headers=()):
    return lambda handler: handler.say(code, {"type": "error", "error": {"type": "x", "message": message}}, headers)


def says(content, kind="application/json"):
    return lambda handler: handler.say(200, content, kind=kind)


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler):
    """A proper start, then the connection is cut inside the body."""
    data = json.dumps(handler.reply()).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    hang_up(handler)


def silent(handler):
    time.sleep(3)


def dripping(handler):
    """A byte now and then: never silent for long enough for a read time-out, never done."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)
