"""What README.md promises a newcomer, run as it stands there: own rows, own reward, own benchmark."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, search_path
from PIL import Image

README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The code block of README.md that holds a text."""
    (found,) = [text for kind, text in re.findall(r"```(\w+)\n(.*?)```", README, re.S) if kind == language and containing in text]
    return found


def python(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first-hour")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (224, 168), "white").save(folder / name)
    text = block("jsonl", "Where is the cup?").replace("\n ", " ")
    (folder / "my_rows.jsonl").write_text(text)
    (folder / "my_reward.py").write_text(block("python", "def score("))
    return folder


def test_the_rows_pass_the_check(folder):
    assert [json.loads(line)["gold"] for line in (folder / "my_rows.jsonl").read_text().splitlines()] == ["A", "2"]
    assert "2 rows" in python("-m", "data.dataset", "--check", "my_rows.jsonl", cwd=folder)


def test_rows_and_reward_train(folder):
    python(str(ROOT / "train_grpo.py"), "demo", "--model", "random:tiny", "--data", "my_rows.jsonl", "--val-data", "None", "--name",
           "mine", "--steps", "2", "--reward", "my_reward.py:score", "--prompts-per-step", "2", "--max-completion-tokens", "8",
           "--device", "cpu", "--reward-workers", "1", cwd=folder)  # fmt: skip
    lines = [json.loads(line) for line in (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 <= line["reward/total"] <= 1.1 and "reward/right" in line for line in lines)


def test_rows_fine_tune(folder):
    python(str(ROOT / "train_sft.py"), "sft-3b", "--model", "random:tiny", "--data", "my_rows.jsonl", "--name", "baseline", "--steps",
           "2", "--rows-per-step", "2", "--workers", "0", "--device", "cpu", cwd=folder)  # fmt: skip
    lines = [json.loads(line) for line in (folder / "runs" / "baseline" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["loss/sft"] > 0 for line in lines)
    assert (folder / "runs" / "baseline" / "step_2" / "model.safetensors").exists()


def test_the_benchmark_entry_reads_records(folder):
    record = {"question": "Which is nearer?", "choices": ["cup", "plate"], "answer": "plate", "image": "a.png", "task": "depth"}
    (folder / "my-bench.jsonl").write_text(json.dumps(record) + "\n")
    code = "import data.benchmarks as b\nfrom data.benchmarks import *\n" + block("python", "def my_bench(")
    code += f"\n(row,) = b.load_benchmark('my-bench', root={str(folder)!r})\nprint(row['gold'], row['category'], row['images'])"
    assert python("-c", code, cwd=folder).split()[:2] == ["B", "depth"]


def test_every_file_that_readme_names_is_there():
    tree = README.partition("## The files")[2].partition("## GRPO here")[0]
    names = set(re.findall(r"\b[\w-]+\.(?:py|md)\b", tree))
    everything = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert names and names <= everything, names - everything
    ours = {path.name for path in ROOT.glob("*.py")}
    assert ours <= names, f"not in the README's tree: {ours - names}"
