"""Ask a served model: OpenAI's chat completions (or any server of that form, such as `vllm serve`), Anthropic's messages.

    for reply in ask([Request("r1", "How many cups?", images=("a.png",))], provider="openai", model="gpt-4o"):
        print(reply.id, reply.error or reply.text)

Replies come as they arrive, at most `parallel` requests are under way, and requests are drawn from their iterator only
when one is free, so pictures need not be in memory together. Time-outs, 429 (with Retry-After), 5xx, dropped
connections and malformed replies are tried again with growing pauses; what still fails comes back as a Reply with
`error`. What every request would meet raises Refused: a refused key, an unknown model, no money left, or 20 failures in a
row (a dead server, a setting that it does not take, a pause longer than we wait).

Keys come from OPENAI_API_KEY and ANTHROPIC_API_KEY and stand in no reply, error or file. As in the clients themselves
the key goes to whatever `base_url` names; a server on your own machine needs none.
"""

import asyncio
import base64
import importlib
import io
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageOps

PROVIDERS = ("openai", "anthropic")
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
# Dollars for a million tokens in and out. Only dated models, whose price stands; for others give your own.
PRICES = {"gpt-4o-2024-05-13": (5.0, 15.0), "claude-3-5-sonnet-20240620": (3.0, 15.0)}
# Of one picture in base64, and its longest side: Anthropic refuses more. OpenAI takes 50 MB a request.
PICTURE_LIMITS = {"openai": (20 * 2**20, 8000), "anthropic": (5 * 2**20, 8000)}
RETRIED = (408, 409, 425, 429)  # and 5xx
HOPELESS = (401, 402, 404)  # key, money, model or address: the next request would get the same
DEAD_AFTER = 20  # requests in a row that failed, whatever the reason: the next one will too


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    text: str
    images: tuple = ()  # paths, bytes or PIL pictures; they stand before the text
    system: str | None = None
    max_tokens: int = 2048
    temperature: float | None = None  # None: not sent, for models that take none
    seed: int | None = None  # OpenAI's form only


@dataclass(frozen=True, slots=True)
class Reply:
    id: str
    text: str | None = None  # None if there is an error
    finish: str = ""  # stop, length, refused, or the server's own word
    tokens_in: int | None = None  # None if the server does not say
    tokens_out: int | None = None
    attempts: int = 0
    error: str | None = None  # one line


class Refused(ValueError):
    """The server takes no request of this run."""


class Malformed(ValueError):
    """An answer with status 200 that holds no answer."""


def ask(requests: Iterable[Request], *, provider: str, model: str, base_url: str | None = None, parallel: int = 8,
        timeout: float = 180.0, attempts: int = 6, max_wait: float = 60.0) -> Iterator[Reply]:
    """One Reply a request, in the order in which they arrive. Leaving the loop early cancels what is under way.

    timeout: seconds for one attempt, its whole reply included. attempts: tries of one request. max_wait: longest pause
    between two; a server that asks for a longer one fails the request. Raises ValueError for an unknown provider or a
    missing key, ImportError for a missing client, Refused (see above)."""
    server = open_server(provider, model, base_url, timeout=timeout, attempts=attempts, max_wait=max_wait)
    return serve(server, iter(requests), parallel)


@dataclass
class Server:
    """A provider for the length of one ask()."""

    provider: str
    model: str
    library: ModuleType  # openai or anthropic: their errors have the same names
    client: object
    key: str
    timeout: float
    attempts: int
    max_wait: float
    free_at: float = 0.0  # time.monotonic(): a 429 of one request holds back all
    failed_in_a_row: int = 0


def access_key(provider: str, base_url: str | None) -> str:
    """The key for a provider. Raises ValueError, one line, for an unknown one, a secret in the URL or a missing key."""
    if provider not in PROVIDERS:
        raise ValueError(f"provider {provider!r} is unknown: choose {' or '.join(PROVIDERS)}")
    if base_url and ("@" in base_url or "?" in base_url):
        raise ValueError(f"the base URL holds a user, a password or a query: take it out, give a key in {KEYS[provider]}")
    key = os.environ.get(KEYS[provider], "").strip()
    if not key and not (base_url or os.environ.get(f"{provider.upper()}_BASE_URL")):
        raise ValueError(f"{KEYS[provider]} is not set: export it, or give the base URL of a server that needs no key")
    return key or "no-key-set"


def open_server(provider: str, model: str, base_url: str | None, **limits) -> Server:
    key = access_key(provider, base_url)
    try:
        library = importlib.import_module(provider)
    except ImportError as error:
        raise ImportError(f"provider {provider} needs its client: pip install {provider}") from error
    make = library.AsyncOpenAI if provider == "openai" else library.AsyncAnthropic
    client = make(api_key=key, base_url=base_url, max_retries=0, timeout=limits["timeout"])
    return Server(provider, model, library, client, key, **limits)


# ---------------------------------------------------------------- many at once


def serve(server: Server, requests: Iterator[Request], parallel: int) -> Iterator[Reply]:
    """Runs the event loop in a thread, so that a slow consumer holds nobody up, and yields what it hands over."""
    replies: queue.SimpleQueue = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(ask_all(server, requests, parallel, replies.put))

    def run() -> None:
        try:
            loop.run_until_complete(task)
            replies.put(None)
        except BaseExceptionGroup as group:
            replies.put(group.exceptions[0])
        except BaseException as error:  # handed to the consumer, who raises it
            replies.put(error)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run, name="ask", daemon=True)
    thread.start()
    try:
        while (reply := replies.get()) is not None:
            if isinstance(reply, BaseException):
                raise reply
            yield reply
    finally:
        with suppress(RuntimeError):  # the loop is closed: nothing is left to cancel
            loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=10)


async def ask_all(server: Server, requests: Iterator[Request], parallel: int, put: Callable) -> None:
    turn = asyncio.Lock()  # a generator of requests cannot be entered twice
    refused: list[Refused] = []

    async def worker() -> None:
        while not refused:
            async with turn:
                request = await asyncio.to_thread(next, requests, None)
            if request is None:
                return
            try:
                put(await ask_one(server, request))
            except Refused as error:  # no new request; those under way may be paid for already, so they arrive first
                refused.append(error)

    async with server.client, asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(worker())
    if refused:
        raise refused[0]


async def ask_one(server: Server, request: Request) -> Reply:
    """The request's reply, after as many attempts as it takes."""
    try:
        body = await asyncio.to_thread(BODIES[server.provider], server, request)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: PIL, broken PNG
        return Reply(request.id, error=f"a picture cannot be read: {one_line(error, server)}")
    for attempt in range(1, server.attempts + 1):
        await asyncio.sleep(server.free_at - time.monotonic())
        pause = min(server.max_wait, 2.0**attempt) * random.uniform(0.25, 0.5)
        try:
            async with asyncio.timeout(server.timeout):
                text, finish, tokens_in, tokens_out = await send(server, body)
            server.failed_in_a_row = 0
            return Reply(request.id, text, finish, tokens_in, tokens_out, attempt)
        except server.library.APIStatusError as error:
            why, status = one_line(error, server), error.status_code
            if status in HOPELESS or "insufficient_quota" in why or "credit balance" in why:
                raise Refused(f"{server.provider}, model {server.model}: {why}") from None
            if status not in RETRIED and status < 500:
                return failure(server, request, attempt, why)
            if asked := retry_after(error.response.headers):
                if asked > server.max_wait:
                    return failure(server, request, attempt, f"asked to wait {asked:.0f} s: {why}")
                pause = max(pause, asked)
                server.free_at = max(server.free_at, time.monotonic() + asked)
        except TimeoutError:
            why = f"no whole reply in {server.timeout:g} s"
        except (server.library.APIConnectionError, ValueError) as error:  # ValueError: Malformed, or no JSON
            why = one_line(error.__cause__ or error, server)
        if attempt < server.attempts:
            await asyncio.sleep(pause)
    return failure(server, request, server.attempts, f"gave up after {server.attempts} attempts: {why}")


def failure(server: Server, request: Request, attempts: int, why: str) -> Reply:
    """The Reply of a request that failed. Raises Refused if so many did in a row: a setting that the server does not take,
    a long pause or a dead server, which every request would meet."""
    server.failed_in_a_row += 1
    if server.failed_in_a_row >= DEAD_AFTER:
        raise Refused(f"{server.provider}: {DEAD_AFTER} requests in a row failed, the last: {why}")
    return Reply(request.id, attempts=attempts, error=why)


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait: milliseconds, seconds or a date; None if it asks nothing legible."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers["retry-after"])
    except KeyError:
        return None
    except ValueError:
        try:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        except (ValueError, KeyError):
            return None
    return seconds if 0 < seconds < float("inf") else None


def one_line(error: BaseException, server: Server) -> str:
    """Class and message, short, and without the key: a server may echo it."""
    text = " ".join(str(error).split()).replace(server.key, "***")[:300]
    return f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------- the two forms


async def send(server: Server, body: dict) -> tuple[str, str, int | None, int | None]:
    """One attempt: text, finish, tokens in, tokens out. Raises Malformed, and what the client raises."""
    openai = server.provider == "openai"
    endpoint = server.client.chat.completions if openai else server.client.messages
    raw = await endpoint.with_raw_response.create(**body)  # raw: the clients build an object of any JSON whatever
    answer = json.loads(raw.http_response.content)
    try:
        return read_openai(answer) if openai else read_anthropic(answer)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Malformed(f"not a reply: {json.dumps(answer)[:200]}") from error


def openai_body(server: Server, request: Request) -> dict:
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
        for kind, data in (picture_data(picture, *PICTURE_LIMITS["openai"]) for picture in request.images)
    ]
    content = [*pictures, {"type": "text", "text": request.text}] if pictures else request.text
    system = [{"role": "system", "content": request.system}] if request.system else []
    # OpenAI's newer models refuse max_tokens, other servers of the form may know only that.
    limit = "max_completion_tokens" if server.client.base_url.host == "api.openai.com" else "max_tokens"
    sampling = {"temperature": request.temperature, "seed": request.seed}
    return {
        "model": server.model, "messages": [*system, {"role": "user", "content": content}], limit: request.max_tokens,
        **{key: value for key, value in sampling.items() if value is not None},
    }  # fmt: skip


def read_openai(answer: dict) -> tuple[str, str, int | None, int | None]:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    message, finish = choice["message"], choice["finish_reason"]
    text = message["content"] if message.get("content") is not None else message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    finish = "refused" if finish == "content_filter" or message.get("refusal") else finish
    return text, finish or "stop", usage.get("prompt_tokens"), usage.get("completion_tokens")


def anthropic_body(server: Server, request: Request) -> dict:
    pictures = [
        {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}
        for kind, data in (picture_data(picture, *PICTURE_LIMITS["anthropic"]) for picture in request.images)
    ]
    # The client knows no temperature any more, because the newest models take none; older models still do.
    sampling = {} if request.temperature is None else {"extra_body": {"temperature": request.temperature}}
    return {
        "model": server.model, "max_tokens": request.max_tokens, **sampling,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": request.text}]}],
        **({"system": request.system} if request.system else {}),
    }  # fmt: skip


FINISHES = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "refusal": "refused",
            "model_context_window_exceeded": "length"}  # fmt: skip


def read_anthropic(answer: dict) -> tuple[str, str, int | None, int | None]:
    usage, finish = answer.get("usage") or {}, answer["stop_reason"]
    text = "".join(part["text"] for part in answer["content"] if part["type"] == "text")
    return text, FINISHES.get(finish, finish or "stop"), usage.get("input_tokens"), usage.get("output_tokens")


BODIES = {"openai": openai_body, "anthropic": anthropic_body}


# ---------------------------------------------------------------- pictures, tokens, money


def picture_data(picture, limit: int, longest: int) -> tuple[str, str]:
    """(media type, base64) of a picture within `limit` characters and `longest` pixels a side: as it is if it fits, else
    PNG, else JPEG of falling quality, then smaller (spec 5.2). Raises what PIL raises."""
    data = Path(picture).read_bytes() if isinstance(picture, str | Path) else picture
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    upright = image.getexif().get(0x0112, 1) == 1  # not every server turns pictures by their EXIF mark
    fits = max(image.size) <= longest and upright and image.format in ("PNG", "JPEG")
    if isinstance(data, bytes) and fits and len(data) * 4 / 3 < limit:
        image.load()  # broken ones are named here, not by the server
        return f"image/{image.format.lower()}", base64.b64encode(data).decode()
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((longest, longest))
    scale = 1.0
    for form, quality in [("PNG", 0), *(("JPEG", quality) for quality in (85, 75, 65, 55, 45)), *[("JPEG", 35)] * 30]:
        buffer = io.BytesIO()
        size = [max(1, round(side * scale)) for side in image.size]
        shown = image if scale == 1 else image.resize(size)
        shown.save(buffer, form, **({"quality": quality} if quality else {}))
        if buffer.tell() * 4 / 3 < limit:
            return f"image/{form.lower()}", base64.b64encode(buffer.getvalue()).decode()
        scale *= 0.85 if quality == 35 else 1
    raise ValueError(f"a picture of {image.size} does not fit {limit} bytes")


def cost(model: str, tokens_in: int, tokens_out: int, price: tuple[float, float] | None = None) -> float | None:
    """Dollars; price: for a million tokens (in, out). None if neither it nor PRICES knows the model."""
    price = price or PRICES.get(model)
    return None if price is None else (tokens_in * price[0] + tokens_out * price[1]) / 1e6
