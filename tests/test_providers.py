"""providers.py through the real clients, against an HTTP server on loopback that misbehaves on purpose.

python -m pytest tests/test_providers.py
"""

import base64
import io
import logging
import random
import socket
import time
from email.utils import formatdate

import numpy as np
import pytest
from misbehaving import KEY, Handler, Misbehaving, dripping, half, hang_up, says, servers, silent, status
from PIL import Image

import providers
from providers import Refused, Request, ask, cost, picture_data, retry_after


@pytest.fixture(params=["openai", "anthropic"])
def provider(request, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return request.param


@pytest.fixture
def serving(provider):
    """serving(plan) -> a server that runs until the end of the test."""
    with servers(lambda plan=None, handler=Handler: Misbehaving(handler, plan)) as start:
        yield start


def asked(server, provider, requests, **options):
    url = server.url + ("/v1" if provider == "openai" else "")
    options = {"max_wait": 0.2, "timeout": 2.0, "attempts": 3, "parallel": 8} | options
    return {reply.id: reply for reply in ask(requests, provider=provider, model="m", base_url=url, **options)}


# ---------------------------------------------------------------- what goes wrong on the way


TRANSIENT = {
    "500": status(500), "503": status(503), "529 overloaded": status(529), "429": status(429), "408": status(408),
    "hang up": hang_up, "half a body": half, "silent": silent, "dripping": dripping,
    "broken JSON": says(b'{"choices": [{"mess'), "a web page": says(b"<html>502</html>", "text/html"),
    "not UTF-8": says(b"\xff\xfe{}"), "nothing": says(b""), "null": says(None), "a list": says([1]), "a number": says(7),
    "no choices": says({"choices": [], "content": None, "stop_reason": "end_turn"}),
    "wrong kinds": says({"choices": "B", "content": "B", "stop_reason": 1}),
    "content of numbers": says({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}],
                                "content": [{"type": "text", "text": 5}], "stop_reason": "end_turn"}),
    "an error in a 200": says({"error": {"message": "upstream timed out", "code": 502}}),
}  # fmt: skip


def test_every_transient_fault_is_tried_again_and_mends(serving, provider):
    server = serving({name: [step] for name, step in TRANSIENT.items()})
    replies = asked(server, provider, [Request(name, name) for name in TRANSIENT])
    assert {name: (reply.text, reply.attempts, reply.error) for name, reply in replies.items()} == {
        name: ("It is (B).", 2, None) for name in TRANSIENT
    }
    assert len(server.seen) == 2 * len(TRANSIENT)
    assert {(reply.tokens_in, reply.tokens_out) for reply in replies.values()} == {(100, 7)}, "of the attempt that answered"


def test_what_never_mends_is_listed_and_the_rest_is_answered(serving, provider):
    bad = {name: [step] * 3 for name, step in TRANSIENT.items()}
    server = serving({name: list(steps) for name, steps in bad.items()})
    names = [*bad, *(f"good {i}" for i in range(9))]
    random.Random(0).shuffle(names)
    replies = asked(server, provider, [Request(name, name) for name in names], timeout=0.5)
    assert sorted(replies) == sorted(names)
    for name, reply in replies.items():
        assert (reply.error is not None) == (name in bad), reply
        assert reply.attempts == (3 if name in bad else 1)
        assert reply.error is None or reply.text is None and "\n" not in reply.error
    assert "no whole reply in 0.5 s" in replies["dripping"].error
    assert "500" in replies["500"].error and "gave up after 3 attempts" in replies["500"].error


def test_a_request_that_the_server_dislikes_is_not_repeated(serving, provider):
    server = serving({"bad": [status(400, "picture too large")], "forbidden": [status(403, "flagged")]})
    replies = asked(server, provider, [Request("bad", "bad"), Request("forbidden", "forbidden"), Request("ok", "ok")])
    assert "picture too large" in replies["bad"].error and "flagged" in replies["forbidden"].error
    assert replies["ok"].text == "It is (B)." and len(server.seen) == 3


@pytest.mark.parametrize("step, named", [
    (status(401, f"wrong key {KEY}"), "wrong key"), (status(404, "no model m"), "no model m"),
    (status(429, "You exceeded your quota (insufficient_quota)"), "insufficient_quota"),
    (status(400, "Your credit balance is too low"), "credit balance"), (status(402, "pay"), "pay"),
])  # fmt: skip
def test_what_every_request_would_meet_ends_the_run_in_one_line(serving, provider, step, named):
    server = serving({f"q{i}": [step] * 3 for i in range(50)})
    with pytest.raises(Refused, match=named) as error:
        asked(server, provider, [Request(f"q{i}", f"q{i}") for i in range(50)], parallel=2)
    assert len(server.seen) <= 4 and "\n" not in str(error.value) and KEY not in str(error.value)


@pytest.mark.parametrize("step, named", [
    (status(400, "Unsupported value: temperature"), "Unsupported value"), (status(403, "not allowed"), "not allowed"),
    (status(429, headers=[("Retry-After", "90")]), "asked to wait 90 s"),
])  # fmt: skip
def test_twenty_failures_in_a_row_end_the_run_and_fewer_do_not(serving, provider, step, named):
    plan = {f"q{i}": [step] * 3 for i in range(300) if not 0 < i < 60 or i % 15}  # of the first 60 every 15th is answered
    server = serving(plan)
    replies = []
    url = server.url + ("/v1" if provider == "openai" else "")
    with pytest.raises(Refused, match=f"20 requests in a row failed, the last: .*{named}") as error:
        for reply in ask((Request(f"q{i}", f"q{i}") for i in range(300)), provider=provider, model="m", base_url=url,
                         parallel=1, max_wait=0.2):  # fmt: skip
            replies.append(reply)
    assert "\n" not in str(error.value) and sum(reply.error is None for reply in replies) == 3
    assert len(replies) == 46 + 19 and len(server.seen) == 46 + 20


def test_a_dead_server_ends_the_run(provider, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        drawn = []
        requests = (drawn.append(i) or Request(f"{i}", "q") for i in range(10_000))
        with pytest.raises(Refused, match="20 requests in a row failed, the last: gave up after 2 attempts"):
            for reply in ask(requests, provider=provider, model="m", attempts=2, max_wait=0.01,
                             base_url=f"http://127.0.0.1:{taken.getsockname()[1]}"):  # fmt: skip
                assert reply.error
    assert len(drawn) < 100


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize("headers, least", [
    ([("Retry-After", "1")], 1.0), ([("retry-after-ms", "700")], 0.7), ([("Retry-After", "soon")], 0.0),
    ([("Retry-After", "nan")], 0.0), ([("Retry-After", "-3")], 0.0),
])  # fmt: skip
def test_retry_after_is_kept(serving, provider, headers, least):
    server = serving({"q": [status(429, headers=headers)]})
    assert asked(server, provider, [Request("q", "q")], max_wait=2.0)["q"].attempts == 2
    (_, _, _, first), (_, _, _, second) = server.asked("q")
    assert second - first >= least


def test_retry_after_as_a_date_and_unreadable():
    assert 50 < retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60
    for text in (formatdate(time.time() - 60, usegmt=True), "soon", "", "inf"):
        assert retry_after({"retry-after": text}) is None
    assert retry_after({}) is None


def test_a_429_holds_back_the_others_too(serving, provider):
    server = serving({"first": [status(429, headers=[("Retry-After", "1")])]})
    asked(server, provider, [Request("first", "first"), *(Request(f"{i}", f"{i}") for i in range(4))], parallel=1,
          max_wait=2.0)  # fmt: skip
    start = server.asked("first")[0][3]
    assert all(seen - start >= 1.0 for question, _, _, seen in server.seen[1:])


def test_a_server_that_asks_for_too_long_a_pause_fails_the_request_at_once(serving, provider):
    server = serving({"q": [status(429, headers=[("Retry-After", "3600")])] * 3})
    reply = asked(server, provider, [Request("q", "q")])["q"]
    assert "asked to wait 3600 s" in reply.error and len(server.seen) == 1


def test_parallel_is_a_limit_and_is_used(serving, provider):
    class Slow(Handler):
        def say(self, *args, **options):
            time.sleep(0.05)
            super().say(*args, **options)

    server = serving(handler=Slow)
    assert len(asked(server, provider, (Request(f"{i}", "q") for i in range(24)), parallel=3)) == 24
    assert server.most_busy == 3


def test_requests_are_drawn_one_by_one_and_an_early_end_stops_them(serving, provider):
    server = serving({"slow": [silent]})
    drawn = []
    requests = (drawn.append(i) or Request(f"{i}", "slow" if i == 0 else "q") for i in range(1000))
    replies = ask(requests, provider=provider, model="m", base_url=server.url, parallel=2, timeout=5)
    start = time.monotonic()
    for _ in range(3):
        next(replies)
    replies.close()
    assert time.monotonic() - start < 2, "the slow request must be cancelled, not waited for"
    time.sleep(0.2)
    count = len(server.seen)
    time.sleep(0.2)
    assert len(server.seen) == count < 1000 and len(drawn) < 1000


def test_an_error_of_the_callers_own_requests_reaches_the_caller(serving, provider):
    def requests():
        yield Request("a", "a")
        raise KeyError("my mistake")

    with pytest.raises(KeyError, match="my mistake"):
        asked(serving(), provider, requests())


# ---------------------------------------------------------------- what is sent and read


def test_pictures_come_first_and_arrive_as_they_are(serving, provider, tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    server = serving()
    request = Request("q", "Where?", images=(str(tmp_path / "a.png"), data, Image.new("RGB", (6, 4), "red")),
                      system="Be short.", max_tokens=9, temperature=0.0)  # fmt: skip
    assert asked(server, provider, [request])["q"].error is None
    [(_, body, headers, _)] = server.seen
    content = body["messages"][-1]["content"]
    assert content[-1] == {"type": "text", "text": "Where?"} and len(content) == 4
    if provider == "openai":
        sent = [part["image_url"]["url"].removeprefix("data:image/png;base64,") for part in content[:3]]
        assert body["messages"][0] == {"role": "system", "content": "Be short."}
    else:
        sent = [part["source"]["data"] for part in content[:3]]
        assert body["system"] == "Be short."
    assert KEY in (headers.get("authorization") or headers["x-api-key"])
    assert base64.b64decode(sent[0]) == base64.b64decode(sent[1]) == data
    assert Image.open(io.BytesIO(base64.b64decode(sent[2]))).getpixel((0, 0)) == (255, 0, 0)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.0) and "seed" not in body


def test_a_broken_picture_fails_its_request_only_and_sends_nothing(serving, provider, tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    server = serving()
    images = {"absent": str(tmp_path / "no.png"), "torn": str(tmp_path / "torn.png"), "text": b"no picture"}
    replies = asked(server, provider, [*(Request(name, "q", (image,)) for name, image in images.items()),
                                       Request("good", "good", (str(tmp_path / "a.png"),))])  # fmt: skip
    assert all("cannot be read" in replies[name].error for name in images) and replies["good"].error is None
    assert [question for question, *_ in server.seen] == ["good"]


@pytest.mark.parametrize("limit", [200_000, 60_000, 8_000])
def test_large_pictures_are_squeezed_under_the_limit(limit):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8))
    kind, data = picture_data(noise, limit, 8000)
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert len(data) < limit and kind == "image/jpeg" and abs(shown.width / shown.height - 0.75) < 0.02


def test_pictures_are_turned_upright_and_kept_within_the_longest_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "a.jpg", exif=exif)
    _, data = picture_data(tmp_path / "a.jpg", 10**6, 8000)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (20, 40)
    _, data = picture_data(Image.new("RGB", (400, 20)), 10**6, 100)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (100, 5)


@pytest.mark.parametrize("said, finish", [("stop end_turn", "stop"), ("length max_tokens", "length"),
                                          ("content_filter refusal", "refused")])  # fmt: skip
def test_why_a_reply_ended(serving, provider, said, finish):
    word = said.split()[provider == "anthropic"]
    server = serving({"q": [lambda handler: handler.say(200, handler.reply("Hm", word))]})
    reply = asked(server, provider, [Request("q", "q")])["q"]
    assert (reply.text, reply.finish, reply.tokens_in, reply.tokens_out) == ("Hm", finish, 100, 7)


def test_a_reply_without_text_or_usage_is_an_empty_answer(serving, provider):
    bare = {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}],
            "content": [], "stop_reason": "end_turn"}  # fmt: skip
    reply = asked(serving({"q": [says(bare)]}), provider, [Request("q", "q")])["q"]
    assert (reply.text, reply.tokens_in, reply.error) == ("", None, None)


# ---------------------------------------------------------------- keys and settings


def test_the_key_stands_in_no_reply_error_or_log(serving, provider, caplog, capfd):
    def echo(code):
        sent = ("authorization", "x-api-key")
        return lambda handler: status(code, f"you sent {[handler.headers[name] for name in sent]}")(handler)

    server = serving({"a": [echo(400)], "b": [echo(500)] * 3, "c": [says(f"<b>{KEY}</b>".encode(), "text/html")] * 3,
                      "d": [says({"error": KEY})] * 3})  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        replies = asked(server, provider, [Request(name, name) for name in "abcd"])
    assert all(reply.error for reply in replies.values()) and "***" in replies["a"].error
    assert any(KEY in str(headers) for _, _, headers, _ in server.seen), "it was sent, so it could have leaked"
    out, err = capfd.readouterr()
    assert KEY not in repr(replies) + caplog.text + out + err


def test_a_missing_key_is_one_line_and_a_served_model_needs_none(serving, provider, monkeypatch):
    monkeypatch.delenv(providers.KEYS[provider])
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=f"{providers.KEYS[provider]} is not set: export it"):
        ask([], provider=provider, model="m")
    assert asked(serving(), provider, [Request("q", "q")])["q"].error is None


def test_unusable_settings(monkeypatch):
    with pytest.raises(ValueError, match="unknown: choose openai or anthropic"):
        ask([], provider="google", model="m")
    with pytest.raises(ValueError, match="holds a user, a password or a query"):
        ask([], provider="openai", model="m", base_url="http://me:secret@host/v1")


def test_money():
    assert cost("gpt-4o-2024-05-13", 1_000_000, 100_000) == pytest.approx(6.5)
    assert cost("mine", 2_000_000, 0, price=(0.5, 1.0)) == pytest.approx(1.0)
    assert cost("mine", 1, 1) is None
