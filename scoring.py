"""Which reward scores a run, and where it is computed: names and files become functions, outside code gets a pool.

    with RewardPool("my_reward.py:score", failures=run / "failures.jsonl") as pool:
        results = pool.score(responses, rows)            # one dict a response, in order, each with "total"

The built-in rewards are total functions (any text gives finite numbers in linear time), so they run in this process. A
reward from outside may hang, raise, or take its process down with it: it runs in processes of its own, and costs its
sample instead of the run (rule 10).

The workers are fresh interpreters started by subprocess, not by multiprocessing: its spawn imports the main script
again in every worker, which for train_grpo.py means torch and transformers, seconds and hundreds of megabytes each,
also when a hung worker is replaced in the middle of a step. This way they know nothing of CUDA either, whenever the
pool is made.
"""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import traceback
import types
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

BUILT_IN = ("spatialthinker", "vanilla", "vanilla-scene", "spacer")
SIMILARITIES = ("lexical", "exact", "spacy")
MODES = ("upstream", "corrected")
MEDIA = ("images", "video")  # kept from every reward, so that rows travel light: a reward reads text
CHUNK = 64  # samples sent to a worker at once: enough to hide the round trip, few enough to balance slow ones
RESERVED = ("error", "length", "truncated", "failed")  # beside the parts of a reward, in results and metrics
START_LIMIT = 120.0  # s for a worker to import the reward's file, which may import torch
ORPHAN_GRACE = 5.0  # s beyond the time limit after which a hung worker whose parent is gone ends itself
KEPT_FAILURES = 1000  # failing texts kept in the file; a reward that always fails must not fill the disk

Reward = Callable[[str, dict], dict]


# ---------------------------------------------------------------------------------------------------------------------
# from a name to a function

def resolve_reward(spec: str, *, mode: str = "upstream", similarity: str = "lexical",
                   sources: dict[str, str] | None = None) -> Reward:
    """The function f(response, row) -> {"total": float, part: float, ...} that `spec` names.

    `spec` is "spatialthinker", "vanilla", "vanilla-scene", "spacer" (design section 4, with `mode` and `similarity`) or
    "path/to/file.py:function", which gets neither; f raises ValueError when that function returns anything but a dict
    of finite numbers with a key "total". Raises ValueError or FileNotFoundError, one line each, for a name, file or
    function that is not there. `sources` maps the specs of files to their text as it was when the run began.
    """
    if mode not in MODES:
        raise ValueError(f"unknown reward mode {mode!r}: one of {', '.join(MODES)}")
    if spec in BUILT_IN:
        return _built_in(spec, mode, resolve_similarity(similarity, sources=sources))
    function = _function_of(spec, "reward", BUILT_IN, sources)

    def reward(response: str, row: dict) -> dict:
        return _checked(function(response, row), spec)
    return reward


def _built_in(spec: str, mode: str, similarity: Callable[[str, str], float]) -> Reward:
    import rewards
    if spec == "spatialthinker":
        return lambda response, row: rewards.spatialthinker_reward(
            response, rewards.solution_text(row), row["size"], mode=mode, similarity=similarity, options=row["options"])
    if spec == "spacer":  # gold is the bare letter here: the published rule is equality
        return lambda response, row: rewards.spacer_reward(
            response, f"<answer>{row['gold']}</answer>", rewards.PROBLEM_TYPES.get(row["kind"], row["kind"]),
            gold_map=row["map"], mode=mode, options=row["options"])
    scene = spec == "vanilla-scene"
    return lambda response, row: rewards.vanilla_reward(response, rewards.solution_text(row), scene=scene, mode=mode,
                                                        options=row["options"])


def resolve_similarity(name: str, *, sources: dict[str, str] | None = None) -> Callable[[str, str], float]:
    """The function of two labels that `name` names: lexical, exact, spacy, or file.py:function; errors as above."""
    if name not in SIMILARITIES:
        return _function_of(name, "similarity", SIMILARITIES, sources)
    import rewards
    function = rewards.SIMILARITIES[name]
    try:
        function("left", "right")  # spacy loads its model now, not in the middle of the first step
    except ImportError as error:
        raise ValueError(str(error)) from error
    return function


def _function_of(spec: str, what: str, names: tuple[str, ...], sources: dict[str, str] | None) -> Callable:
    source = _source(spec, what, names) if sources is None else sources[spec]
    path, _, name = spec.rpartition(":")
    path = Path(path).resolve()
    module = types.ModuleType(f"{what}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up by name
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: the file may import its neighbours, and hides nothing of ours
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"{what} {spec}: the file does not import: {_in_one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise ValueError(f"{what} {spec}: no function {name!r} in the file; it has {', '.join(there) or 'none'}")
    return function


def _source(spec: str, what: str, names: tuple[str, ...]) -> str:
    path = Path(spec.rpartition(":")[0])
    if path.suffix != ".py":
        raise ValueError(f"unknown {what} {spec!r}: one of {', '.join(names)}, or path/to/file.py:function")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (in {spec!r}): give path/to/file.py:function")
    return path.read_text(encoding="utf-8")


def _checked(result, spec: str) -> dict[str, float]:
    if not isinstance(result, dict):
        raise ValueError(f"reward {spec} returned {type(result).__name__}, not a dict with a key 'total'")
    if "total" not in result:
        raise ValueError(f"reward {spec} returned no key 'total', only {', '.join(map(str, result)) or 'nothing'}")
    numbers = {}
    for key, value in result.items():
        if key in RESERVED:
            raise ValueError(f"reward {spec} returned a part named {key}, which the pool and the metrics use: rename it")
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {spec} returned {key}={value!r:.40}, not a number") from error
        if not math.isfinite(numbers[str(key)]):
            raise ValueError(f"reward {spec} returned {key}={value}, not a finite number")
    return numbers


def _in_one_line(error: BaseException) -> str:
    """Type, message and place of an exception, short enough for a line of a log."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400] + place


def check_rows(spec: str, rows: list[dict]) -> None:
    """Refuses rows that the reward could only score 0: ValueError naming the first such row and the cure."""
    if not rows:
        raise ValueError("no rows to score: none was loaded, or every one was dropped")
    if spec == "spacer":
        _check_kinds(rows)
    if spec != "spatialthinker":
        return
    for number, row in enumerate(rows):
        if row.get("scene") is None:
            raise ValueError(f"row {number} ({row.get('id')}) has no gold scene, but the reward spatialthinker needs "
                             "one: give the rows scenes, or take --reward vanilla")


def _check_kinds(rows: list[dict]) -> None:
    from rewards import PROBLEM_TYPES
    for number, row in enumerate(rows):
        if row["kind"] not in PROBLEM_TYPES:
            raise ValueError(f"row {number} ({row.get('id')}) is of kind {row['kind']}, for which the reward spacer has no "
                             f"rule: take rows of kind {', '.join(PROBLEM_TYPES)}")


# ---------------------------------------------------------------------------------------------------------------------
# the worker's side

def work(handle: int) -> None:
    """A worker's life: reads how to make the reward, then chunks of samples; sends an outcome a sample; ends on EOF."""
    connection = Connection(handle)
    spec, mode, similarity, sources, limit = connection.recv()
    # The kernel's own alarm, without a Python handler, ends even a worker that hangs in C code, should the parent be
    # gone and unable to. While the parent lives it is faster.
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT + ORPHAN_GRACE)
    try:
        reward = resolve_reward(spec, mode=mode, similarity=similarity, sources=sources)
    except Exception as error:  # reported, and raised by the parent
        connection.send(str(error) if isinstance(error, (ValueError, FileNotFoundError)) else _in_one_line(error))
        return
    connection.send("")
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            chunk = connection.recv()
        except EOFError:
            return
        for response, row in chunk:
            signal.setitimer(signal.ITIMER_REAL, limit + ORPHAN_GRACE)
            _seed(response)
            connection.send(_outcome(reward, response, pickle.loads(row)))  # a row of its own: it may be changed


def _seed(response: str) -> None:
    # a reward that draws random numbers then gives one text one score, whatever worker it meets, also after a resume
    import numpy
    seed = zlib.crc32(response.encode("utf-8", "surrogatepass"))
    random.seed(seed)
    numpy.random.seed(seed)


def _outcome(reward: Reward, response: str, row: dict) -> tuple[dict, str, str]:
    """(result, kind of failure or "", message)."""
    try:
        return reward(response, row), "", ""
    except Exception as error:  # whatever outside code raises; counted, reported and kept by the pool
        return {}, "raised", _in_one_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# the pool

@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    since: float  # when it last began something: its start, or the sample at hand
    ready: bool = False
    todo: deque[int] = field(default_factory=deque)  # samples sent and not answered; the first is at hand


class RewardPool:
    """Scores texts with a reward of any origin; one that raises, hangs or dies scores 0, is counted and kept.

    workers=0 scores in this process, without time limit: the default for built-in rewards. Otherwise that many
    processes, each sample limited to `time_limit` seconds; None takes one a core of this rank, at most 4.
    `failures` is the JSONL file that keeps the failing texts (the first 1,000); `pool.failures` counts them by kind,
    `pool.scored` all texts. The constructor raises ValueError or FileNotFoundError (one line) when the reward cannot be loaded.
    """

    def __init__(self, spec: str, *, mode: str = "upstream", similarity: str = "lexical", workers: int | None = None,
                 time_limit: float = 10.0, failures: Path | None = None):
        self.spec, self.time_limit, self.file = spec, time_limit, failures
        self.failures, self.scored = {"raised": 0, "timeout": 0, "died": 0}, 0
        self.parts: dict[str, None] = {}  # every key a result ever had, in order: batches stay alike
        self.workers: list[_Worker] = []
        self.closed = False
        outside = [(name, what, names) for name, what, names in
                   ((spec, "reward", BUILT_IN), (similarity, "similarity", SIMILARITIES)) if name not in names]
        if workers is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(4, max(1, (os.cpu_count() or 1) // ranks)) if outside else 0
        if workers == 0:
            self.reward = resolve_reward(spec, mode=mode, similarity=similarity)
            return
        # The text of today: a worker replaced hours later must not load a file that was edited meanwhile.
        sources = {name: _source(name, what, names) for name, what, names in outside}
        self.setup = (spec, mode, similarity, sources, time_limit)
        try:
            self.workers = [self._start() for _ in range(workers)]
            while not all(worker.ready for worker in self.workers):
                self._listen({}, deque())
        except BaseException:
            self.close()
            raise

    def score(self, responses: list[str], rows: list[dict]) -> list[dict[str, float]]:
        """Results in the order given, all with the same keys (0.0 where a part is missing); a failed one is all 0.0
        and has the message under "error". rows[i] belongs to responses[i]; the same row may stand there many times."""
        assert not self.closed, "the pool is closed"
        assert len(responses) == len(rows), f"{len(responses)} responses, {len(rows)} rows"
        if not self.workers:
            outcomes = [_outcome(self.reward, response, _light(row))
                        for response, row in zip(responses, rows, strict=True)]
        else:
            try:
                outcomes = self._spread(responses, rows)
            except BaseException:  # Ctrl-C: answers still on their way would be taken for those of the next call
                self.close()
                raise
        for result, _, _ in outcomes:
            self.parts.update(dict.fromkeys(result))
        self.scored += len(outcomes)
        results = []
        for i, (result, kind, message) in enumerate(outcomes):
            results.append({"total": 0.0} | dict.fromkeys(self.parts, 0.0) | result)
            if kind:
                results[-1]["error"] = f"{kind}: {message}"
                self._keep(kind, message, responses[i], rows[i])
        return results

    def close(self) -> None:
        """Ends the workers and reaps them; safe to call twice."""
        self.closed = True
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            try:
                worker.process.wait(0 if worker.todo else 1)
            except subprocess.TimeoutExpired:
                _kill(worker)
        self.workers = []

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        # One seed for the hashes: the order of a set must not differ from worker to worker. A session of its own: the
        # terminal's Ctrl-C and torchrun's signals are for the trainer, which decides when the pool ends.
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                   stdin=subprocess.DEVNULL, start_new_session=True,
                                   env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"})
        theirs.close()
        ours.send(self.setup)
        return _Worker(process, ours, time.monotonic())

    def _spread(self, responses: list[str], rows: list[dict]) -> list[tuple[dict, str, str]]:
        light = {id(row): row for row in rows}  # a row stands there once a completion, and is packed once
        light = {key: pickle.dumps(_light(row)) for key, row in light.items()}
        size = max(1, min(CHUNK, len(rows) // (4 * len(self.workers))))
        queue = deque(list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size))
        outcomes: dict[int, tuple[dict, str, str]] = {}
        while len(outcomes) < len(rows):
            for i, worker in enumerate(self.workers):
                if not queue or not worker.ready or worker.todo:
                    continue
                chunk = queue.popleft()
                try:
                    worker.connection.send([(responses[j], light[id(rows[j])]) for j in chunk])
                except (BrokenPipeError, ConnectionResetError):  # it died while idle: no sample is to blame
                    queue.appendleft(chunk)
                    self._replace(i)
                    continue
                worker.todo, worker.since = deque(chunk), time.monotonic()
            self._listen(outcomes, queue)
        return [outcomes[i] for i in range(len(rows))]

    def _listen(self, outcomes: dict, queue: deque) -> None:
        """Waits for news of any worker, takes it into `outcomes`, and replaces workers that died or overran."""
        busy = [worker for worker in self.workers if worker.todo or not worker.ready]
        patience = min(self._deadline(worker) for worker in busy) - time.monotonic() if busy else 0.0
        heard = wait([worker.connection for worker in self.workers], timeout=max(0.0, patience))
        for i, worker in enumerate(self.workers):
            alive = True
            while worker.connection in heard and alive and worker.connection.poll():
                alive = self._take(worker, outcomes)
            overran = alive and time.monotonic() > self._deadline(worker) and not worker.connection.poll()
            if alive and not overran:
                continue
            if overran:
                kind, message = "timeout", f"no result within {self.time_limit:g} s"
            else:
                kind, message = "died", f"it ended its process (exit code {_exit_code(worker)})"
            if not worker.ready:
                why = f"not done after {START_LIMIT:g} s" if overran else message
                raise ValueError(f"reward {self.spec}: the file does not import: {why}")
            if worker.todo:
                outcomes[worker.todo.popleft()] = ({}, kind, message)
                if worker.todo:
                    queue.appendleft(list(worker.todo))
            self._replace(i)

    def _take(self, worker: _Worker, outcomes: dict) -> bool:
        """Reads one message; False when the worker is gone."""
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            return False
        if not worker.ready and message:
            raise ValueError(message)
        if worker.ready:
            outcomes[worker.todo.popleft()] = message
        worker.ready, worker.since = True, time.monotonic()
        return True

    def _deadline(self, worker: _Worker) -> float:
        if not worker.ready:
            return worker.since + START_LIMIT
        return worker.since + self.time_limit if worker.todo else math.inf

    def _replace(self, i: int) -> None:
        _kill(self.workers[i])
        self.workers[i].connection.close()
        self.workers[i] = self._start()

    def _keep(self, kind: str, message: str, response: str, row: dict) -> None:
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            where = f"; texts in {self.file}" if self.file else ""
            print(f"reward {self.spec} failed on row {row.get('id')} ({kind}: {message}): that sample scores 0, "
                  f"further ones are only counted{where}", file=sys.stderr, flush=True)
        if self.file and sum(self.failures.values()) <= KEPT_FAILURES:
            record = {"id": row.get("id"), "kind": kind, "error": message, "text": response}
            with open(self.file, "ab", buffering=0) as file:  # one write a line: ranks share the file
                file.write((json.dumps(record) + "\n").encode())


def _light(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in MEDIA}


def _kill(worker: _Worker) -> None:
    """Ends a worker and whatever its reward has started, and reaps it."""
    with suppress(ProcessLookupError):  # nothing left to end
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()


def _exit_code(worker: _Worker) -> int:
    """Exit code of a worker that has closed its end; it is helped along if that is all it has done."""
    try:
        return worker.process.wait(1)
    except subprocess.TimeoutExpired:
        _kill(worker)
        return worker.process.returncode


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError):  # the pool was closed meanwhile: nobody is there to tell
        work(int(sys.argv[1]))
