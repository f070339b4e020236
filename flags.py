"""The command line of the scripts that have presets: --help by sections, one line for what does not exist or cannot work.

A section of Config begins with a line that is only a comment (`# sampling`) after an empty line; a flag's help is the
comment behind it, or the comment lines right above it.
"""

import inspect
import math
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (.*))?$")


def sections(config: type) -> dict[str, list[tuple[str, str]]]:
    """{section: [(field, help)]} of a dataclass, from its source."""
    found, above, section, after_empty = {}, [], "what and where", True
    for line in inspect.getsource(config).splitlines():
        comment = re.fullmatch(r"    # (.*)", line)
        if comment and after_empty:
            section, above = comment[1], []
        elif comment:
            above.append(comment[1])
        elif field := FIELD.match(line):
            found.setdefault(section, []).append((field[1], field[2] or " ".join(above)))
            above = []
        after_empty = not line.strip()
    return found


def help_text(arguments: list[str], config: type, presets: Mapping[str, tuple[str, object]], about: str) -> str:
    """Without a preset: the presets, what each is for and costs. With one: its flags by section, with its own values."""
    script, chosen = Path(arguments[0]).name, next((name for name in arguments[1:] if name in presets), None)
    if chosen is None:
        width = max(map(len, presets))
        lines = [about, "", f"usage: python {script} PRESET [--flag value ...]      python {script} PRESET --help: its flags", ""]
        for name, (description, _) in presets.items():
            lines += textwrap.wrap(description, 120, initial_indent=f"  {name:{width}s}  ", subsequent_indent=" " * (width + 4))
        return "\n".join(lines)
    description, values = presets[chosen]
    lines = [f"{script} {chosen}: {description}", "a flag that is on by default is turned off by --no-FLAG"]
    for section, fields in sections(config).items():
        lines += ["", section]
        for name, told in fields:
            head = f"  --{name.replace('_', '-')} {getattr(values, name)!r}"
            indent = " " * 34
            if len(head) > 32:
                lines.append(head)
                head = ""
            lines += textwrap.wrap(told, 124, initial_indent=f"{head:34s}", subsequent_indent=indent) or [head]
    return "\n".join(lines)


def check(arguments: list[str], config: type, presets: Mapping[str, tuple[str, object]], about: str) -> None:
    """Answers --help, and ends with one line for a first argument that is no preset: before tyro, whose help is one long
    list and whose answer to a wrong word is a page."""
    if {"-h", "--help"} & set(arguments[1:]):
        print(help_text(arguments, config, presets, about))
        sys.exit(0)
    first = arguments[1] if len(arguments) > 1 else ""
    if first not in presets and not first.startswith("--tyro-"):  # tyro's own: shell completion
        given = f"{first} stands before the preset" if first.startswith("-") else f"unknown preset {first!r}" if first else "no preset given"
        raise SystemExit(f"error: {given}: {Path(arguments[0]).name} takes one of {', '.join(presets)}, then flags (--help)")


# ---------------------------------------------------------------- values that cannot work, in one line each


def check_choices(cfg, **known: tuple[str, ...]) -> None:
    for name, names in known.items():
        if getattr(cfg, name) not in names:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: one of {', '.join(names)}")


def check_numbers(cfg, *, limits: str = "", above: str = "", from_zero: str = "") -> None:
    """Names of settings, between spaces: limits are above 0 and may be infinite, which cuts nothing; the others are finite."""
    for names, fits, least in (
        (limits, lambda x: x > 0, "above 0"), (above, lambda x: 0 < x < math.inf, "above 0"),
        (from_zero, lambda x: 0 <= x < math.inf, "from 0 on"),
    ):  # fmt: skip
        for name in names.split():
            if not fits(value := getattr(cfg, name)):  # nan fits nothing
                raise ValueError(f"--{name.replace('_', '-')} {value}: give a number {least}")


def check_sizes(cfg, *names: str) -> None:
    for name in names:
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if cfg.min_pixels > cfg.max_pixels:
        raise ValueError(f"--min-pixels {cfg.min_pixels} is more than --max-pixels {cfg.max_pixels}")
