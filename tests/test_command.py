"""The edges of a command: errors of one line, signals that only set a flag, progress with and without a terminal."""

import io
import os
import signal
import time

import pytest

import command


def test_errors_of_the_user_are_one_line():
    for error in (ValueError("two\nlines"), FileNotFoundError("two\nlines"), ImportError("two lines")):
        with pytest.raises(SystemExit) as caught, command.one_line_errors():
            raise error
        assert caught.value.code == "error: two lines"
    with pytest.raises(KeyError), command.one_line_errors():  # a bug of ours keeps its traceback
        raise KeyError("x")


def test_a_shadowed_kernels_package_is_found_without_importing_it(tmp_path, monkeypatch):
    command.check_shadowed_kernels()
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="'kernels' 0.9.0 .* pip uninstall kernels"):
        command.check_shadowed_kernels()


def test_signals_only_set_a_flag_and_a_second_ctrl_c_interrupts(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = command.StopSignal(stop_file=tmp_path / "stop")
    try:
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert stop.requested
        (tmp_path / "stop").unlink()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # a bytecode on which the handler may run
    finally:
        stop.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_progress_prints_plain_lines_without_a_terminal():
    out = io.StringIO()
    progress = command.Progress(12, start=2, every=0.0, file=out)
    for step in range(2, 12):
        progress.show(step, {"reward": step / 10, "accuracy": 0.5})
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("step 3/12  reward 0.200  accuracy 0.500") and lines[-1].endswith("00:00 left")
    assert " s/step " in lines[0]
    other = io.StringIO()
    command.Progress(3, unit="row", file=other).show(0, {})
    assert other.getvalue().startswith("row 1/3 ") and " s/row " in other.getvalue()
    seldom, quiet = io.StringIO(), io.StringIO()
    for file, rank in ((seldom, 0), (quiet, 1)):
        progress = command.Progress(5, rank=rank, every=1e9, file=file)
        for step in range(5):
            progress.show(step, {"reward": 0.0})
    assert [line.split()[1] for line in seldom.getvalue().splitlines()] == ["1/5", "5/5"], "the first and the last"
    assert quiet.getvalue() == ""


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    progress = command.Progress(4, start=1, file=out)
    progress.show(1, {"reward": 0.25})
    progress.show(3, {"reward": 0.75})
    progress.close()
    last = out.getvalue().split("\r")[-1]
    assert "4/4" in last and "reward 0.750" in last
