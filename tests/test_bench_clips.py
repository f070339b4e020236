"""bench/clips.py without its runs: their command lines, what the controls show, the numbers of the report."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

import flags
import train_grpo
import train_sft
from bench.clips import CONTROLS, Config, frames, report, stages
from data.scenes import scene_rows

SCRIPTS = {"train_sft.py": train_sft, "train_grpo.py": train_grpo}


def parsed(command: list[str], monkeypatch):
    """The Config that a command line gives, by the script's own way."""
    script = SCRIPTS[command[0]]
    monkeypatch.setattr(sys, "argv", command)
    flags.check(sys.argv, script.Config, script.PRESETS, "")
    return tyro.extras.overridable_config_cli(script.PRESETS, args=command[1:])


def test_every_run_starts_from_the_one_before(monkeypatch):
    cfg = Config(out=Path("some/here"), sees_steps=7, careless_steps=3, grpo_steps=5, prompts=4)
    sees, careless, grpo = (parsed(command, monkeypatch) for command in stages(cfg).values())
    assert sees.model == "runs/clips-here-start" and careless.model == "runs/clips-here-sees/step_7"
    assert grpo.model == "runs/clips-here-careless/step_3" and (sees.careless, careless.careless) == (0.0, 0.5)
    for one in (sees, careless, grpo):
        assert (one.reward, one.reward_mode, one.style, one.data) == ("spacer", "corrected", "short_map", "scenes:clip_small@train")
    assert sees.val_data == "scenes:clip_small@val" and careless.val_data is None and grpo.val_data is None
    assert sees.repeat == careless.repeat == 57_600 and sees.seed > 0  # load_rows, and so GRPO, takes the clips of seed 0
    assert grpo.limit == 20 and grpo.steps == 5 and grpo.group_size == 8  # no clip twice
    assert "careless" not in stages(Config(out=Path("x"), careless=0.0))


def test_controls_change_the_frames_and_nothing_else():
    rows = scene_rows(2, level="clip_small")
    own = frames(rows, 0, "none")
    assert own is rows[0]["video"] and frames(rows, 1, "other room") is own
    shuffled = frames(rows, 0, "shuffled")
    assert shuffled != own and sorted(map(id, shuffled)) == sorted(map(id, own))
    grey = frames(rows, 0, "grey")
    assert {frame.getcolors()[0][1] for frame in grey} == {(128, 128, 128)} and len(grey) == len(own)
    assert [frame.size for frame in grey] == [frame.size for frame in own]


def test_the_report_compares_question_by_question():
    def answers(correct: list[float]) -> dict:
        one = {f"{way} {m}": correct for way in ("greedy", "sampled") for m in ("map", "format", "answer", "correct")}
        return {"category": ["counting", "counting", "rel_distance", "rel_distance"], **dict.fromkeys(CONTROLS, one)}

    text = report({"careless": answers([0, 0.5, 0, 0.5]), "grpo": answers([1, 0.5, 1, 0.5])})
    assert "| grpo | own | 0.750 ± 0.144 |" in text and "| correct counting |" in text
    line = next(line for line in text.splitlines() if line.startswith("| map: grpo - careless"))
    assert line == "| map: grpo - careless | +0.500 ± 0.289 | +1.7 |"
    assert "| correct: grpo, own - other room | +0.000 ± 0.000 | +0.0 |" in text


def test_an_unknown_flag_would_be_noticed(monkeypatch):
    command = stages(Config(out=Path("x"), more="--no-such-flag 3"))["grpo"]
    with pytest.raises(SystemExit):
        parsed(command, monkeypatch)


def test_repeated_rows_come_in_the_same_batches_again(tiny):
    cfg = train_sft.Config(data="scenes:clip_small@train", style="short_map", repeat=4, rows_per_step=2, steps=10)
    batches = train_sft.Batches(cfg, None, tiny.processor, tiny.config, 0, 1)
    ids = [[packed.ids.tolist() for packed in batches[step]] for step in (0, 1, 2, 5)]
    assert ids[0] == ids[2] != ids[1] == ids[3]
    endless = train_sft.Batches(replace(cfg, repeat=None), None, tiny.processor, tiny.config, 0, 1)
    assert [packed.ids.tolist() for packed in endless[2]] != ids[0]
    with pytest.raises(ValueError, match="--repeat 5 is no multiple of --rows-per-step 2"):
        train_sft.check_config(replace(cfg, repeat=5))
    for other in (dict(limit=8), dict(data="OX-PIXL/STVQA-7K@train")):
        with pytest.raises(ValueError, match="--repeat 4: only for scenes without --limit"):
            train_sft.check_config(replace(cfg, **other))
