"""Rewards by name and by file, and the pool that a bad one cannot hurt (rule 10).

    python -m pytest tests/test_scoring.py
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import rewards
import scoring
from scoring import RewardPool, check_rows, resolve_reward, resolve_similarity

ROOT = Path(__file__).resolve().parent.parent
SCENE = {"objects": [{"id": "cat.1", "bbox": [0, 0, 50, 40]}, {"id": "dog.1", "bbox": [40, 30, 100, 90]}],
         "relationships": [{"subject": "cat.1", "predicate": "left of", "object": "dog.1"}]}
ROW = {"id": "r0", "source": "test", "category": "relation", "images": [], "question": "Where is the cat?",
       "options": ["left", "right"], "gold": "A", "kind": "choice", "size": (100, 90), "scene": SCENE, "map": None,
       "problem": None, "style": None, "meta": {}}
GOOD = f"<observe>o</observe>\n<scene>{json.dumps(SCENE)}</scene>\n<think>t</think>\n<answer>(A) left</answer>"

REWARDS = """
import os, random, sys, time

def length(response, row):
    return {"total": len(response) + row["bonus"], "letters": sum(c.isalpha() for c in response)}

def fragile(response, row):
    if "hang" in response:
        while True: pass
    if "sleep" in response:
        time.sleep(1000)
    if "raise" in response:
        raise KeyError("no such key")
    if "exit" in response:
        os._exit(7)
    if "quit" in response:
        sys.exit("enough")
    if "nan" in response:
        return {"total": float("nan")}
    if "list" in response:
        return [1.0]
    if "taken" in response:
        return {"total": 1.0, "error": 0.25}
    if "empty" in response:
        return {"part": 1.0}
    if "text" in response:
        return {"total": 1.0, "part": "good"}
    if "whole" in response:
        return {"total": 2, "part": 1, "extra": True}
    return {"total": float(response), "part": 0.5}

def announce_and_hang(response, row):
    open(row["started"], "w").close()
    while True: pass

def chance(response, row):
    import numpy
    return {"total": random.random(), "other": numpy.random.rand(), "order": list({"a", "b", "c", "d", "e"}).index("a")}

def changes_its_row(response, row):
    row["scene"]["objects"].append("one more")
    return {"total": len(row["scene"]["objects"])}

def media(response, row):
    return {"total": float("images" in row)}

def process(response, row):
    return {"total": os.getpid(), "torch": "torch" in sys.modules}

def same(a, b):
    return 1.0

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def rows_for(responses: list[str]) -> list[dict]:
    return [{"id": f"row{i}"} for i in range(len(responses))]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# names --------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_rewards():
    assert set(scoring.SIMILARITIES) == set(rewards.SIMILARITIES) and scoring.MODES == rewards.MODES


@pytest.mark.parametrize("mode", scoring.MODES)
def test_built_in_names_call_rewards(mode):
    gold = rewards.solution_text(ROW)
    want = rewards.spatialthinker_reward(GOOD, gold, (100, 90), mode=mode, similarity=rewards.exact)
    assert resolve_reward("spatialthinker", mode=mode, similarity="exact")(GOOD, ROW) == want
    assert want["accuracy"] == 1.0 and want["spatial"] > 0.9
    assert resolve_reward("vanilla", mode=mode)(GOOD, ROW) == rewards.vanilla_reward(GOOD, gold, mode=mode)
    scene = resolve_reward("vanilla-scene", mode=mode)(GOOD, ROW)
    assert scene == rewards.vanilla_reward(GOOD, gold, scene=True, mode=mode) and scene["total"] == 1.0


@pytest.mark.parametrize("kind, gold, answer, upstream, corrected", [
    ("choice", "A", "A", 2.0, 2.0), ("choice", "A", "(A) left", 0.0, 2.0), ("mra", "4", "4", 2.0, 2.0),
    ("number", "1200", "1,200", 0.0, 2.0), ("ocr", "EXIT", "EXIT", 1.0, 1.0), ("regression", "2.5", "2.5", 1.0, 1.0),
])
def test_spacer_by_name_takes_kind_map_and_options_of_the_row(kind, gold, answer, upstream, corrected):
    row = ROW | {"kind": kind, "gold": gold, "options": ROW["options"] if kind == "choice" else [], "map": {"cat": [[1, 2]]}}
    response = f"<think>t <map>{{'cat': [[1, 2]]}}</map></think><answer>{answer}</answer>"
    for mode, want in (("upstream", upstream), ("corrected", corrected)):
        result = resolve_reward("spacer", mode=mode)(response, row)
        assert result["accuracy"] == pytest.approx(want, abs=1e-9) and result["map"] == pytest.approx(1)


def test_spacer_refuses_kinds_that_it_has_no_rule_for():
    check_rows("spacer", [ROW, ROW | {"kind": "mra"}])
    with pytest.raises(ValueError, match=r"row 1 \(r7\) is of kind yes_no, .* take rows of kind choice"):
        check_rows("spacer", [ROW, ROW | {"kind": "yes_no", "id": "r7"}])


def test_similarity_by_name_or_file_reaches_the_reward(file):
    assert resolve_similarity("exact")("cat", "dog") == 0.0
    response = GOOD.replace("cat.1", "cow.1").replace("dog.1", "cat.1").replace("cow.1", "dog.1")  # labels exchanged
    strict = resolve_reward("spatialthinker", similarity="exact")(response, ROW)
    blind = resolve_reward("spatialthinker", similarity=f"{file}:same")(response, ROW)
    assert blind["spatial"] > 0.99 > strict["spatial"]


@pytest.mark.parametrize("spec,message", [
    ("spatial-thinker", "unknown reward 'spatial-thinker': one of spatialthinker, vanilla, vanilla-scene, spacer, or path"),
    ("{file}", "unknown reward"),
    ("{file}x.py:length", "no file .*x.py"),
    ("{file}:lenght", "no function 'lenght' in the file; it has length, fragile"),
    ("{file}:number", "no function 'number'"),
    ("{broken}:f", "does not import: SyntaxError"),
    ("{failing}:f", r"does not import: ModuleNotFoundError: No module named 'nowhere_at_all' \(failing.py, line 2\)"),
])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_reward_that_is_not_there_is_one_line(tmp_path, file, spec, message, pooled):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "failing.py").write_text("\nimport nowhere_at_all\n")
    spec = spec.format(file=file, broken=tmp_path / "broken.py", failing=tmp_path / "failing.py")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        RewardPool(spec, workers=1) if pooled else resolve_reward(spec)
    assert "\n" not in str(caught.value)


def test_unknown_mode_and_similarity():
    with pytest.raises(ValueError, match="unknown reward mode 'better': one of upstream, corrected"):
        resolve_reward("vanilla", mode="better")
    with pytest.raises(ValueError, match="unknown similarity 'cosine': one of lexical, exact, spacy, or path"):
        RewardPool("spatialthinker", similarity="cosine")


@pytest.mark.parametrize("word,message", [
    ("list", "returned list, not a dict with a key 'total'"),
    ("empty", "returned no key 'total', only part"),
    ("nan", "returned total=nan, not a finite number"),
    ("text", "returned part='good', not a number"),
    ("taken", "returned a part named error, which the pool and the metrics use: rename it"),
])
def test_what_a_reward_must_return(file, word, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward(f"{file}:fragile")(word, {})


def test_scene_reward_without_gold_scene_is_refused():
    check_rows("spatialthinker", [ROW, ROW])
    check_rows("vanilla", [ROW | {"scene": None}])
    check_rows("vanilla-scene", [ROW | {"scene": None}])  # it reads the response's scene only
    with pytest.raises(ValueError, match=r"row 1 \(r7\) has no gold scene, .* or take --reward vanilla"):
        check_rows("spatialthinker", [ROW, ROW | {"scene": None, "id": "r7"}])
    with pytest.raises(ValueError, match="no rows"):
        check_rows("vanilla", [])


# the pool -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_is_kept_over_several_calls(file, workers):
    with RewardPool(f"{file}:length", workers=workers) as pool:
        for call in range(3):
            responses = [f"{'x' * (i % 13)}{i}" for i in range(call, 300)]
            rows = [{"id": str(i), "bonus": 1000 * (i // 8)} for i in range(len(responses))]
            want = [{"total": len(text) + row["bonus"], "letters": len(text.rstrip("0123456789"))}
                    for text, row in zip(responses, rows, strict=True)]
            assert pool.score(responses, rows) == want
        assert pool.score([], []) == []
        assert pool.failures == {"raised": 0, "timeout": 0, "died": 0}


def test_any_text_gets_through(file):
    texts = ["", "\ud800 lone", "\x00", "é" * 300_000, "\U0001f600\r\n\u2028"]
    with RewardPool(f"{file}:length", workers=2) as pool:
        assert [result["total"] for result in pool.score(texts, [{"bonus": 0}] * 5)] == [len(text) for text in texts]


@pytest.mark.parametrize("workers", [1, 2])
def test_raising_dying_and_hanging_cost_their_sample_only(file, tmp_path, capfd, workers):
    responses = ["1", "raise", "2", "exit", "3", "hang", "4", "quit", "nan", "sleep", "5", "list", "6", "7"]
    kinds = {"raise": "raised", "exit": "died", "hang": "timeout", "quit": "died", "nan": "raised", "sleep": "timeout",
             "list": "raised"}
    rows = rows_for(responses)
    with RewardPool(f"{file}:fragile", workers=workers, time_limit=1.0, failures=tmp_path / "failures.jsonl") as pool:
        for call in (1, 2):
            results = pool.score(responses, rows)
            for text, result in zip(responses, results, strict=True):
                if text in kinds:
                    assert result.pop("error").startswith(kinds[text])
                    assert result == {"total": 0.0, "part": 0.0}
                else:
                    assert result == {"total": float(text), "part": 0.5}
            assert pool.failures == {"raised": 3 * call, "timeout": 2 * call, "died": 2 * call}
            assert len(pool.workers) == workers, "the dead are replaced"
    kept = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert [(k["id"], k["kind"], k["text"]) for k in kept[:7]] == [
        (rows[i]["id"], kinds[text], text) for i, text in enumerate(responses) if text in kinds]
    assert "KeyError: 'no such key' (my_rewards.py, line 13)" in kept[0]["error"]
    assert "exit code 7" in kept[1]["error"]
    assert len(kept) == 14
    assert capfd.readouterr().err.count("further ones are only counted") == 3, "once a kind"


def test_failures_are_announced_once_a_kind_and_the_file_is_bounded(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "KEPT_FAILURES", 3)
    with RewardPool(f"{file}:fragile", workers=0, failures=tmp_path / "failures.jsonl") as pool:
        pool.score(["raise"] * 5, rows_for(["raise"] * 5))
    assert pool.failures["raised"] == 5
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "failed on row row0 (raised: KeyError" in error


def test_a_sample_alone_in_its_batch_may_fail_and_keys_stay_alike(file):
    with RewardPool(f"{file}:fragile", workers=1, time_limit=1.0) as pool:
        assert pool.score(["exit"], [{}])[0]["total"] == 0.0
        first, second = pool.score(["1", "whole"], [{}, {}])
        assert first == {"total": 1.0, "part": 0.5, "extra": 0.0}
        assert second == {"total": 2.0, "part": 1.0, "extra": 1.0}
        assert set(pool.score(["3", "raise"], [{}, {}])[1]) == {"total", "part", "extra", "error"}


def test_results_depend_on_nothing_but_the_input(file):
    """Random numbers, the order of a set, and a changed row: the same whatever worker, chunk or neighbour."""
    responses, row = [str(i) for i in range(40)], {"scene": {"objects": []}}
    seen = []
    for workers, size in ((1, 40), (3, 40), (2, 7)):
        with RewardPool(f"{file}:chance", workers=workers) as pool:
            parts = [responses[i:i + size] for i in range(0, 40, size)]
            seen.append([result for part in parts for result in pool.score(part, [{}] * len(part))])
    assert seen[0] == seen[1] == seen[2]
    assert len({result["total"] for result in seen[0]}) == 40
    with RewardPool(f"{file}:changes_its_row", workers=2) as pool:
        assert pool.score(responses, [row] * 40) == [{"total": 1.0}] * 40
    assert row == {"scene": {"objects": []}}


def test_the_trainers_generators_are_left_alone(file):
    import random
    random.seed(5)
    want = random.random()
    random.seed(5)
    for workers in (0, 1):
        with RewardPool(f"{file}:length", workers=workers) as pool:
            pool.score(["a"], [{"bonus": 0}])
    assert random.random() == want


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_stay_at_home(file, workers):
    row = {"images": [Image.new("RGB", (4, 4))], "video": "x.mp4", "id": "a"}
    with RewardPool(f"{file}:media", workers=workers) as pool:
        assert pool.score(["a"], [row]) == [{"total": 0.0}]
    assert "images" in row


def test_workers_replaced_later_run_the_reward_as_it_was(file):
    with RewardPool(f"{file}:fragile", workers=1) as pool:
        file.write_text("def fragile(response, row): return {'total': -1.0}")
        assert pool.score(["exit"], [{}])[0]["total"] == 0.0
        assert pool.score(["1"], [{}])[0]["total"] == 1.0


def test_a_worker_killed_while_idle_costs_no_sample(file):
    with RewardPool(f"{file}:process", workers=1) as pool:
        first = int(pool.score(["a"], [{}])[0]["total"])
        os.kill(first, 9)
        while pool.workers[0].process.poll() is None:
            time.sleep(0.01)
        second = int(pool.score(["a"], [{}])[0]["total"])
        assert second not in (0, first) and pool.failures["died"] == 0


def test_closing_leaves_no_process(file):
    with RewardPool(f"{file}:process", workers=3) as pool:
        pids = [worker.process.pid for worker in pool.workers]
        assert {int(result["total"]) for result in pool.score(["a"] * 600, [{}] * 600)} <= set(pids)
        assert all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids), "dead and reaped"
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.score(["a"], [{}])


def test_default_is_in_process_for_built_in_rewards_and_pooled_for_a_file(file):
    with RewardPool("spatialthinker") as pool:
        assert not pool.workers
        assert pool.score([GOOD], [ROW])[0] == resolve_reward("spatialthinker")(GOOD, ROW)
    with RewardPool(f"{file}:length") as pool:
        assert 1 <= len(pool.workers) <= 4
    with RewardPool("spatialthinker", similarity=f"{file}:same") as pool:
        assert pool.workers and pool.score([GOOD], [ROW])[0]["total"] > 0.99


MAIN = """
import os, sys, threading
root, file, reward, limit, started = sys.argv[1:]
sys.path.insert(0, root)
print("main was imported", flush=True)
from scoring import RewardPool
pool = RewardPool(file + ":" + reward, workers=2, time_limit=float(limit))
print(*[worker.process.pid for worker in pool.workers], flush=True)
"""


def start(file: Path, ending: str, *, reward: str, limit: float = 60.0) -> tuple[subprocess.Popen, list[int]]:
    """Runs a script that makes a pool, without any main guard, as its own session; the pids of its workers."""
    path = file.with_name("main.py")
    path.write_text(MAIN + ending)
    process = subprocess.Popen([sys.executable, path, ROOT, file, reward, str(limit), file.with_name("started")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "main was imported\n"
    pids = process.stdout.readline().split()
    assert len(pids) == 2, "workers do not import the main script again"
    return process, [int(pid) for pid in pids]


def running(pid: int) -> bool:
    """Alive and no zombie: an orphan is reaped by process 1, which not every container has do that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return sys.platform != "linux" and alive(pid)


def wait_for(condition, limit: float) -> bool:
    until = time.monotonic() + limit
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("ending", ["", "os._exit(3)", "1 / 0"])
def test_workers_end_with_a_script_that_never_closed_the_pool(file, ending):
    process, pids = start(file, ending, reward="length")
    process.communicate(timeout=90)
    assert wait_for(lambda: not any(map(running, pids)), 10)


def test_ctrl_c_during_scoring_ends_everything_without_worker_tracebacks(file):
    ending = "pool.score(['a'] * 4, [{'started': started}] * 4)"
    process, pids = start(file, ending, reward="announce_and_hang")
    assert wait_for(file.with_name("started").exists, 90)
    os.killpg(process.pid, signal.SIGINT)  # the terminal's Ctrl-C: to the whole group
    _, error = process.communicate(timeout=90)
    assert error.count("Traceback") == 1 and "KeyboardInterrupt" in error
    assert wait_for(lambda: not any(map(running, pids)), 10)


def test_an_orphan_that_hangs_ends_itself(file):
    ending = """
def leave():
    while not os.path.exists(started): pass
    os._exit(1)
threading.Thread(target=leave).start()
pool.score(['a'], [{'started': started}])
"""
    process, pids = start(file, ending, reward="announce_and_hang", limit=1.0)
    process.communicate(timeout=90)
    assert wait_for(lambda: not any(map(running, pids)), 1.0 + scoring.ORPHAN_GRACE + 10)


def test_4096_cheap_completions_take_well_under_a_second(file):
    rows = [{"id": str(i), "bonus": 0, "scene": SCENE} for i in range(512)]
    responses = [f"{'word ' * 300}{i}" for i in range(4096)]
    with RewardPool(f"{file}:length", workers=2) as pool:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            results = pool.score(responses, [rows[i // 8] for i in range(4096)])
            seconds.append(time.perf_counter() - began)
    assert len(results) == 4096 and all(math.isfinite(result["total"]) for result in results)
    assert min(seconds) < 1.0
