"""flags.py: --help by sections with the preset's own values, one line for a wrong preset."""

from dataclasses import fields

import pytest

import flags
import train_grpo
import train_sft

SCRIPTS = [train_grpo, train_sft]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_stands_in_one_section_and_says_what_it_does(script):
    found = [field for part in flags.sections(script.Config).values() for field in part]
    assert [name for name, _ in found] == [field.name for field in fields(script.Config)]
    assert [name for name, told in found if not told] == []


def test_help_of_a_preset_shows_its_values(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.check(["train_grpo.py", "demo", "--help"], train_grpo.Config, train_grpo.PRESETS, "about")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 130
    assert text.index("\nprompts\n") < text.index("--style 'short'") < text.index("\nsampling\n") < text.index("--group-size 8")
    assert "the reward's own total" in text, "comments above a flag are its help too"


def test_help_without_a_preset_says_what_each_is(capsys):
    with pytest.raises(SystemExit):
        flags.check(["train_grpo.py", "--help"], train_grpo.Config, train_grpo.PRESETS, "about this script")
    text = capsys.readouterr().out
    assert text.startswith("about this script") and all(name in text for name in train_grpo.PRESETS)
    text = " ".join(text.split())
    assert "seven minutes on two CPU cores" in text and "60 H100-hours" in text


@pytest.mark.parametrize("arguments, said", [(["x.py"], "no preset given"), (["x.py", "dmeo"], "unknown preset 'dmeo'"),
                                             (["x.py", "--steps", "3", "demo"], "--steps stands before the preset")])  # fmt: skip
def test_a_wrong_preset_is_one_line(arguments, said):
    with pytest.raises(SystemExit, match=said):
        flags.check(arguments, train_grpo.Config, train_grpo.PRESETS, "about")
