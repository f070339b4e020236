"""SpaceR's path on a real scan with 3-D boxes and a real walk through a home, in minutes on two CPU cores.

    python -m examples.real_clips --realdata ../shared/realdata --out /tmp/real_clips

1. data/spatial_qa.py asks about frames of a room of ARKitScenes, from the boxes of VSI-Bench's annotations; three questions
of OpenEQA about the walk, a video file, stand for general data.    2. python -m data.dataset --check on them
3. three steps of preset spacer-3b, made small, from random weights with the Qwen2.5-VL tokenizer, for each engine: clips,
shuffled frames, both templates    4. evaluate.py asks the checkpoint.

The rooms are VSI-Bench's own, so nothing may be trained on them in earnest; what is shown is that the path carries real
input. Everything is written below --out, which must be empty and outside this repository.
"""

import argparse
import json
import os
import random
from pathlib import Path

from examples.real_input import check_folders, letters, read_lines, run, write_lines

ANNOTATIONS, SCENE = "vsi/meta_info/arkitscenes_meta_info_val.json", "47334096"
WALK, ASKED = "videos/open-eqa/open-eqa-hm3d-demo.mp4", "videos/open-eqa/open-eqa-demo-data.json"
NEEDED = (ANNOTATIONS, f"vsi/scene_{SCENE}_frames", WALK, ASKED, "qwen/Qwen2.5-VL-7B-Instruct/vocab.json")
STEPS = 3
ENGINES = {"hf": "random:tiny", "vllm": "random:demo"}  # vLLM on a CPU has no attention for heads as narrow as tiny's
SMALL = """--prompts-per-step 4 --group-size 4 --max-prompt-tokens 2048 --max-completion-tokens 32 --token-budget 4096 --steps 3
    --save-every 3 --samples-every 1 --rollout-sequences 16 --dtype float32 --device cpu"""
KEYS = ("reward/total", "reward/temporal_term", "shuffled/accuracy", "reward/flat_groups", "optim/grad_norm", "loss/kl",
        "rollout/logprob_gap")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--realdata", default="../shared/realdata", help="folder with vsi/, videos/, qwen/")
    parser.add_argument("--out", default="/tmp/real_clips", help="an empty or new folder outside this repository")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES])
    parser.add_argument("--limit", type=int, default=8, help="questions that the checkpoint is asked")
    args = parser.parse_args(argv)
    real, out = check_folders(Path(args.realdata), Path(args.out), NEEDED)
    os.environ["SPATIAL_GRPO_CLIPS"] = str(out / "clips")

    (out / "scans").mkdir()
    (out / "scans" / SCENE).symlink_to(real / f"vsi/scene_{SCENE}_frames")
    run("-m", "data.spatial_qa", "--annotations", real / ANNOTATIONS, "--videos", "scans", "--fps", "1", "--out", "scan.jsonl",
        out=out)  # fmt: skip
    rows = [json.loads(line) for line in (out / "scan.jsonl").read_text().splitlines()] + walk_rows(real)
    random.Random(0).shuffle(rows)
    write_lines(out / "rows.jsonl", rows)
    run("-m", "data.dataset", "--check", "rows.jsonl", out=out)

    own = f"{Path(__file__).resolve()}:reward"
    for engine in args.engines:
        # The published reward gives random text 0: every group would be flat. This one pays for letters.
        run("train_grpo.py", "spacer-3b", "--name", engine, "--model", ENGINES[engine], "--rollout", engine, "--reward", own,
            "--processor", real / "qwen" / "Qwen2.5-VL-7B-Instruct", "--data", "rows.jsonl", "--lr", "1e-3", *SMALL.split(),
            out=out)  # fmt: skip
        lines = read_lines(out / "runs" / engine / "metrics.jsonl")
        print("\n".join(f"{key:22s}" + "".join(f"{line.get(key, 0.0):11.2e}" for line in lines) for key in KEYS))
    run("evaluate.py", "--model", f"runs/{args.engines[-1]}/step_{STEPS}", "--dataset", "rows.jsonl", "--limit", args.limit,
        "--clips", "eval", "--batch", "4", "--out", "asked", "--device", "cpu", out=out)  # fmt: skip


def walk_rows(real: Path) -> list[dict]:
    """OpenEQA's questions about the walk: free-form, without a map, as SpaceR's general data is."""
    return [{"id": item["question_id"], "source": "open-eqa", "category": item["category"], "video": str(real / WALK),
             "question": item["question"], "gold": item["answer"], "kind": "text"}
            for item in json.loads((real / ASKED).read_text())]  # fmt: skip


def reward(response: str, row: dict) -> dict[str, float]:
    """The share of plain letters, as the part that the temporal term looks at too."""
    share = letters(response, row)["total"]
    return {"total": share, "accuracy": share}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
