"""The calls of the data engine: requests in, a line a reply appended, what was spent printed.

A caller is one of providers.PROVIDERS (over the network) or of LOCAL (a checkpoint in this process).
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import providers
from command import check_shadowed_kernels
from data.dataset import encode
from data.stvqa_items import hash_seed
from files import append_lines
from providers import Reply, Request

LOCAL = ("hf", "vllm")
MAX_PROMPT = 16384  # tokens of a prompt that a local model is asked


@dataclass(frozen=True)
class Caller:
    """Who is asked, and how hard. The fields are explained in Config of data/generate_stvqa.py."""

    provider: str
    model: str
    base_url: str | None
    max_tokens: int
    parallel: int
    attempts: int
    timeout: float
    price: tuple[float, float] | None
    batch: int
    device: str
    seed: int


def ask(caller: Caller, requests: Iterator[Request]) -> Iterator[list[Reply]]:
    """Replies in the order in which they come, several together where they were made together."""
    if caller.provider in LOCAL:
        yield from ask_local(caller, requests)
        return
    how = {key: getattr(caller, key) for key in ("provider", "model", "base_url", "parallel", "attempts", "timeout")}
    for reply in providers.ask(requests, **how):
        yield [reply]


def ask_local(caller: Caller, requests: Iterator[Request]) -> Iterator[list[Reply]]:
    """A checkpoint in this process answers, through the rollout that training samples with."""
    rollout, processor = open_local(caller)
    while some := list(islice(requests, caller.batch)):
        prompts = [encode(local_row(request), processor, style="row") for request in some]
        fit = [prompt for prompt in prompts if len(prompt.expanded) <= MAX_PROMPT]
        settings = {"max_tokens": caller.max_tokens, "temperature": some[0].temperature or 0.0}
        groups = iter(rollout.generate(fit, n=1, seed=hash_seed(str(caller.seed), some[0].id), **settings) if fit else [])
        replies = []
        for request, prompt in zip(some, prompts, strict=True):
            length = len(prompt.expanded)
            if length > MAX_PROMPT:
                replies.append(Reply(request.id, error=f"a prompt of {length} tokens, more than {MAX_PROMPT}"))
                continue
            [c] = next(groups)
            replies.append(Reply(request.id, c.text, "stop" if c.finished else "length", length, len(c.token_ids), 1))
        yield replies


@lru_cache(maxsize=1)  # verify asks in rounds: one engine for all of them
def open_local(caller: Caller) -> tuple:
    check_shadowed_kernels()  # before transformers is imported
    from rollout import hf_rollout, vllm_rollout  # here: the other writers need no model code

    if caller.provider == "hf":
        return hf_rollout(caller.model, device=caller.device, max_sequences=caller.batch)
    return vllm_rollout(caller.model, device=caller.device, max_prompt_tokens=MAX_PROMPT, max_tokens=caller.max_tokens,
                        max_sequences=caller.batch, max_images=1)  # fmt: skip


def local_row(request: Request) -> dict:
    text = f"{request.system}\n\n{request.text}" if request.system else request.text
    return {"id": request.id, "images": list(request.images), "question": text, "options": [], "size": None,
            "problem": text, "style": "row", "meta": {}}  # fmt: skip


def collect(caller: Caller, path: Path, requests: Iterator[Request], line: Callable[[Reply], dict]) -> None:
    """Appends a line a reply as they come, a failed one with its error, and prints what was spent."""
    first = next(requests, None)
    if first is None:
        return  # no model need be loaded, no server be there
    total, tick = Counter(), ticker()
    try:
        for some in ask(caller, chain([first], requests)):
            append_lines(path, [line(reply) | spent(reply) for reply in some])
            for reply in some:
                total += Counter(calls=1, failed=int(reply.error is not None), retries=max(reply.attempts - 1, 0),
                                 tokens_in=reply.tokens_in or 0, tokens_out=reply.tokens_out or 0)  # fmt: skip
            tick(lambda: f"{path.stem}: {total['calls']} calls, {total['failed']} failed")
    finally:  # also when the server refuses: what was spent is spent
        dollars = providers.cost(caller.model, total["tokens_in"], total["tokens_out"], caller.price)
        print(f"{path}: {total['calls']} calls, {total['failed']} failed, {total['retries']} retries, "
              f"{total['tokens_in']} tokens in, {total['tokens_out']} out"
              + (f", {dollars:.2f} dollars" if dollars is not None else ""))  # fmt: skip
    if total["failed"]:
        print("what failed was not answered, and is asked again by the same command")


def spent(reply: Reply) -> dict:
    return {"error": reply.error} if reply.error else {"tokens": [reply.tokens_in, reply.tokens_out]}


def estimate(caller: Caller, what: str, calls: Iterable[tuple[int, int]], *, tokens_out: int, at_most: int = 1) -> None:
    """Prints the number of calls, tokens and dollars. calls: (characters, picture tokens) of each; four characters are
    taken for a token."""
    n = characters = pictures = 0
    for text, picture in calls:
        n, characters, pictures = n + 1, characters + text, pictures + picture
    tokens_in, tokens_out = characters // 4 + pictures, n * tokens_out
    dollars = providers.cost(caller.model, tokens_in, tokens_out, caller.price)
    price = "price unknown: give --price IN OUT" if dollars is None else f"about {dollars:.2f} dollars"
    print(f"{what}: {n} calls, about {tokens_in} tokens in and {tokens_out} out, {price}")
    if at_most > 1:
        print(f"that is for one try each; at the most {at_most} times as much")


def picture_tokens(size: tuple[int, int], provider: str) -> int:
    """As the providers' pages say: a 750th of the pixels (Anthropic), 85 and 170 a tile of 512 (OpenAI)."""
    if provider == "openai":
        scale = min(1, 2048 / max(size), 768 / min(size))
        return 85 + 170 * -(-int(size[0] * scale) // 512) * -(-int(size[1] * scale) // 512)
    return min(1600, size[0] * size[1] // 750)


def ticker(every: float = 5.0) -> Callable[[Callable[[], str]], None]:
    """A function that prints a line about where we are, at most every few seconds."""
    shown = [time.monotonic()]

    def tick(text: Callable[[], str]) -> None:
        if time.monotonic() - shown[0] >= every:
            shown[0] = time.monotonic()
            print(text(), file=sys.stderr, flush=True)

    return tick
