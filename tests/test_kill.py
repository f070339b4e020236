"""Rule 12 under SIGKILL: a run that is killed anywhere, with no chance to say anything, goes on as if nothing had been.

Each case is a process that kills itself at a chosen call of a chosen step, another with --resume, and a comparison with
a run that nobody disturbed: with HFRollout bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_vllm

pytestmark = pytest.mark.slow
STEPS = 4
REWARD = """
import zlib

def score(response, row):
    value = zlib.crc32(response.encode()) % 101 / 100
    return {"total": value, "accuracy": float(value > 0.5)}
"""
# Two optimiser steps a rollout, KL on, a schedule, a checkpoint every second step of which one is kept.
SETTINGS = (
    "demo", "--data", "scenes:easy@train", "--val-data", "None", "--limit", "10", "--max-pixels", "12544",
    "--prompts-per-step", "4", "--group-size", "2", "--mini-batches", "2", "--kl", "k3", "--kl-coef", "0.05",
    "--lr", "3e-3", "--schedule", "cosine", "--warmup-steps", "2", "--steps", str(STEPS), "--save-every", "2",
    "--keep", "1", "--samples-every", "1", "--reward", "reward.py:score", "--reward-workers", "0", "--dtype", "float32",
    "--device", "cpu",
)  # fmt: skip
HF = ("--model", "random:tiny", "--rollout", "hf", "--max-completion-tokens", "7")
VLLM = ("--model", "random:demo", "--rollout", "vllm", "--max-completion-tokens", "12", "--save-every", "1")

# Imports once (ten seconds), then forks a child for each [folder, phase@step, arguments]; the child runs
# train_grpo.main, writes down the rows and the seed of every step, and kills itself where `phase@step` says.
PARENT = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import model, optim, rollout, runs, sampling, shutil, torch, train_grpo, tyro
torch.set_num_threads(1)

def patch(owner, name, *, number=1, after=False):
    "The number-th call of owner.name in step `wanted` is the last thing that happens, before or after it did its work."
    inner, calls = getattr(owner, name), []
    def killing(*args, **kwargs):
        if step != wanted:
            return inner(*args, **kwargs)
        calls.append(1)
        if after:
            result = inner(*args, **kwargs)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else inner(*args, **kwargs)
    setattr(owner, name, killing)

def in_engine():
    start = train_grpo.start_rollout
    def start_rollout(*args):
        engine = start(*args)
        patch(engine.llm.llm_engine, "step", number=4)
        return engine
    train_grpo.start_rollout = start_rollout

def in_sync():
    weights = sampling.weights
    def half(*args, **kwargs):
        for i, item in enumerate(weights(*args, **kwargs)):
            if i == 40 and step == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item
    sampling.weights = half

PHASES = dict(
    nothing=lambda: None,
    wake=lambda: patch(rollout.HFRollout, "wake"),
    sync=in_sync,  # half of the weights are in the engine
    generate=lambda: patch(rollout, "sample", number=4),
    engine=in_engine,
    reward=lambda: patch(sampling, "score", after=True),
    update=lambda: patch(optim.MasterOptimizer, "step", after=True),  # the first of two optimiser steps is done
    logged=lambda: patch(runs, "log_metrics", after=True),
    save=lambda: patch(train_grpo, "save_hf", after=True),  # the weights are there, the optimiser is not
    rename=lambda: patch(os, "rename"),  # all is written
    renamed=lambda: patch(os, "rename", after=True),
    delete=lambda: patch(shutil, "rmtree"),  # the new checkpoint is in place, the old one is going
)

def child(folder, phase, arguments):
    global step, wanted, take
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)  # all jobs of a folder in one file
    sys.argv = ["train_grpo.py", *arguments]
    cfg = tyro.extras.overridable_config_cli(train_grpo.PRESETS)
    step, wanted, take = -1, int(phase.partition("@")[2] or -1), sampling.take  # -1 until the first step begins
    def noting(rows, cursor, count, seed):
        global step
        step, out = cursor // count, take(rows, cursor, count, seed)
        with open("steps.jsonl", "a") as file:
            file.write(json.dumps([step, [row["id"] for row in out], sampling.sampling_seed(cfg, step, 0)]) + chr(10))
        return out
    sampling.take = noting
    PHASES[phase.partition("@")[0]]()
    train_grpo.main(cfg)

if __name__ == "__main__":
    import matplotlib.pyplot
    model.load_model("random:tiny")
    jobs, codes = json.load(sys.stdin), []
    if any("vllm" in arguments for *_, arguments in jobs):
        rollout.set_engine_environment()
        import vllm
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            try:
                child(*job)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    json.dump(codes, sys.stdout)
"""


def run_all(folder: Path, jobs: list[tuple[str, str, tuple]]) -> None:
    """jobs: (folder below `folder`, phase@step, arguments), one after the other; each must end as its phase says."""
    (folder / "parent.py").write_text(PARENT)
    for name in {name for name, *_ in jobs}:
        (folder / name).mkdir()
        (folder / name / "reward.py").write_text(REWARD)
    sent = [(str(folder / name), phase, SETTINGS + arguments) for name, phase, arguments in jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([sys.executable, "parent.py"], cwd=folder, env=environment, input=json.dumps(sent), text=True,
                          capture_output=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (name, phase, _), code in zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True):
        expected = 0 if phase == "nothing" else -signal.SIGKILL
        assert code == expected, f"{name} {phase}: exit code {code}\n{(folder / name / 'stderr').read_text()}"


def lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics_of(run: Path) -> list[dict]:
    """Lines of metrics.jsonl less what a clock says."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(run / "metrics.jsonl")]


def trainer_state(run: Path) -> dict:
    """state.pt and rank_0.pt as {path: leaf}, so that two of them compare in one line each."""

    def flat(value, path):
        if isinstance(value, dict):
            return {k: v for name, inner in value.items() for k, v in flat(inner, f"{path}.{name}").items()}
        if isinstance(value, list | tuple):
            return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}.{i}").items()}
        return {path: value}

    folder = run / f"step_{STEPS}" / "trainer"
    return {k: v for name in ("state", "rank_0") for k, v in flat(torch.load(folder / f"{name}.pt", weights_only=True), name).items()}


def assert_same_state(a: dict, b: dict) -> None:
    own = ("state.rng.0.python", "state.rng.0.numpy")  # nobody draws from these here; processes start them differently
    a, b = ({k: v for k, v in state.items() if not k.startswith(own)} for state in (a, b))
    assert a.keys() == b.keys() and sum(v.numel() for v in a.values() if isinstance(v, torch.Tensor)) > 100_000
    for path, value in a.items():
        same = torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path]
        assert same, path


# where the run is killed, in which step (from 0), and the checkpoint from which it goes on (0: from the start)
KILLS = {
    "generate@0": 0, "reward@1": 0, "save@1": 0, "wake@2": 2, "logged@2": 2, "generate@3": 2, "update@3": 2,
    "save@3": 2, "rename@3": 2, "renamed@3": 4, "delete@3": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One undisturbed run, and for each kill one that was killed there and resumed."""
    folder = tmp_path_factory.mktemp("kills")
    pairs = [[(kill, kill, HF), (kill, "nothing", (*HF, "--resume"))] for kill in KILLS]
    run_all(folder, [("straight", "nothing", HF), *(job for pair in pairs for job in pair)])
    return folder


def test_the_undisturbed_run_learns_something(folder):
    found = metrics_of(folder / "straight" / "runs" / "demo")
    assert len(found) == STEPS and all(line["optim/grad_norm"] > 0 and line["reward/flat_groups"] < 1 for line in found)


@pytest.mark.parametrize("kill", KILLS)
def test_rule_12_a_killed_run_goes_on_bit_for_bit(folder, kill):
    run, straight = (folder / name / "runs" / "demo" for name in (kill, "straight"))
    assert f"from step {KILLS[kill]}\n" in (folder / kill / "stdout").read_text()
    assert not list(run.glob("*.tmp"))
    assert metrics_of(run) == metrics_of(straight)
    assert_same_state(trainer_state(run), trainer_state(straight))
    for name in ("samples.jsonl", f"step_{STEPS}/model.safetensors"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name


def test_rule_12_with_vllm_a_run_killed_in_every_phase_takes_the_same_rows_and_seeds(tmp_path):
    """One run, killed once a step: with half of the weights sent, in the engine, in the update, in the checkpoint."""
    needs_vllm()
    chain = ["sync@0", "engine@1", "update@2", "save@3", "nothing"]
    jobs = [("killed", phase, (*VLLM, "--resume") if i else VLLM) for i, phase in enumerate(chain)]
    run_all(tmp_path, [("whole", "nothing", VLLM), *jobs])
    once, often = lines(tmp_path / "whole" / "steps.jsonl"), lines(tmp_path / "killed" / "steps.jsonl")
    assert [step for step, *_ in often] == [0, 0, 1, 1, 2, 2, 3, 3] and len(once) == STEPS
    assert often[::2] == often[1::2] == once
    run, whole = (tmp_path / name / "runs" / "demo" for name in ("killed", "whole"))
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3]
    ours, theirs = trainer_state(run), trainer_state(whole)
    assert ours["state.cursor"] == theirs["state.cursor"] == 4 * STEPS
    counts = [path for path in ours if path.endswith(".step")]
    assert counts and all(ours[path] == theirs[path] == 2 * STEPS for path in counts), "optimiser steps"
    sampled = [[(line["step"], line["id"]) for line in lines(r / "samples.jsonl")] for r in (run, whole)]
    assert sampled[0] == sampled[1] and len(sampled[0]) == 4 * 2 * STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_lets_supervised_training_save(tmp_path, number):
    """As torchrun and a terminal send it: the processes that draw rows get it as well, and must not end before the step."""
    command = (sys.executable, str(ROOT / "train_sft.py"), "demo-sees", "--model", "random:tiny", "--steps", "100000", "--workers",
               "2", "--rows-per-step", "4", "--val-data", "None", "--device", "cpu", "--data", "scenes:easy@train")  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    metrics, said = tmp_path / "runs" / "demo-sees" / "metrics.jsonl", tmp_path / "said"
    with open(said, "w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size > 1000):
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, number)
        assert process.wait(60) == 0, said.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert list(metrics.parent.glob("step_*/model.safetensors")), said.read_text()
    assert said.read_text().count("ends when this step is done") == 1


# ---------------------------------------------------------------- an engine that dies, as the user sees it

DEMO = ("demo", "--rollout", "vllm", "--model", "random:demo", "--limit", "12", "--val-data", "None", "--steps", "3",
       "--prompts-per-step", "4", "--group-size", "2", "--max-completion-tokens", "8", "--save-every", "1")  # fmt: skip
DYING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_grpo, tyro
start, calls = train_grpo.start_rollout, []
def start_rollout(*args):
    rollout = start(*args)
    step = rollout.llm.llm_engine.step
    def dying():
        calls.append(1)
        if len(calls) == 22:  # 8 engine steps each: the check at the start, steps 0 and 1
            raise MemoryError("no memory left")
        return step()
    rollout.llm.llm_engine.step = dying
    return rollout
train_grpo.start_rollout = start_rollout
train_grpo.main(tyro.extras.overridable_config_cli(train_grpo.PRESETS))
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=600)  # fmt: skip


def test_a_run_whose_engine_dies_says_so_and_resumes(tmp_path):
    needs_vllm()
    (tmp_path / "dying.py").write_text(DYING)
    died = launch(tmp_path, "dying.py", *DEMO)
    folder = tmp_path / "runs" / "demo"
    assert died.returncode == 1, died.stderr
    last = died.stderr.strip().splitlines()[-1]
    assert "EngineDied: the vLLM engine died in generate: MemoryError: no memory left" in last and "--resume" in last
    assert "VLLMRollout, from step 0" in died.stdout and "log-probs differ by 0.0000 on average" in died.stdout
    assert [p.name for p in folder.glob("step_*")] == ["step_1"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")  # one rank: once the engine never started
    resumed = launch(tmp_path, *torchrun, str(ROOT / "train_grpo.py"), *DEMO, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 1" in resumed.stdout
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and (folder / "step_3" / "trainer" / "state.pt").exists()
