"""Reads the configuration of another framework: YAML, JSON, or the arguments in a shell script."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlm_tune.config.yaml_source import read_yaml_text
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import is_file, shown_path
from vlm_tune.quoting import quoted
from vlm_tune.recipe_writer.converting.shell import commands, words_of

LARGEST = 1_000_000
"""Bytes of a configuration."""
PROGRAMS = ("swift", "megatron", "trl", "llamafactory-cli")
"""Commands that take flags themselves; a Python file among them is a flag's value."""
CONFIGURATIONS = (".yaml", ".yml", ".json")
SCRIPTS = (".sh", ".bash", ".slurm", ".sbatch")
PROGRAM = (".py", ".ipynb")
TRAINER = "(trainer)"
"""The key of the trainer that a script's command names beside its flags: TRL's, but SFTTrainer."""
TRAINERS = re.compile(
    r"(dpo|kto|grpo|orpo|cpo|ppo|rloo|gkd|gold|bco|xpo|nash_md|online_dpo|mpo|reward|prm)(_.*)?"
)
"""Names of TRL's commands and example scripts."""
NAMED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)


def read_configuration(path: Path) -> dict[str, Any]:
    """The keys and values of a configuration.

    Of a shell script they are the flags of its training command, and the variables set for it.

    Raises:
        RecipeError: there is no such file, or it holds no mapping and no command with flags.
    """
    place = shown_path(path)
    if not is_file(path):
        raise RecipeError([Problem(place, "no such file: --from takes a configuration's file")])
    try:
        content = path.read_bytes()
        text = content[: LARGEST + 1].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Problem(place, f"can't be read as text: {error}")]) from None
    if len(content) > LARGEST:
        message = f"has {len(content):,} bytes, too many for a configuration"
        raise RecipeError([Problem(place, message)])
    if path.suffix.lower() in PROGRAM:
        message = (
            "is a program, which is not run: --from takes a configuration (YAML, JSON) or a shell "
            "script with the command that trains"
        )
        raise RecipeError([Problem(place, message)])
    if path.suffix.lower() in SCRIPTS or text.startswith("#!"):
        values: Any = _script(text, place)
    elif path.suffix.lower() == ".json":
        values = json_value(text, place)
    else:
        values = read_yaml_text(text, place).value
    if not isinstance(values, dict):
        message = f"expected a mapping of keys and values, got {quoted(values)}"
        raise RecipeError([Problem(place, message)])
    return values


def json_value(text: str, place: str) -> Any:
    """The value of a JSON text. Raises `RecipeError` with its place for another text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError([Problem(place, f"not JSON: {error}")]) from None


def _script(text: str, place: str) -> dict[str, Any]:
    """The flags of the command with the most flags, and the variables set before it."""
    variables: dict[str, str] = {}
    best: dict[str, Any] = {}
    files: list[str] = []
    for line in commands(text):
        try:
            command = words_of(line, variables)
        except ValueError as error:
            raise RecipeError([Problem(place, f"not a shell script: {error}")]) from None
        files += [word for word in command if word.endswith(CONFIGURATIONS)]
        while command and (match := NAMED.fullmatch(command[0])):
            variables[match[1]] = match[2]
            command.pop(0)
            if command and command[0] == "export":
                command.pop(0)
        if command and command[0] == "export":
            named = filter(None, map(NAMED.fullmatch, command))
            variables |= {match[1]: match[2] for match in named}
        flags = _flags(command)
        if len(flags) > len(best):
            best = {**flags, **_trainer(command)}
    if not best:
        message = "no command with flags (--key value) is in this script"
        if files:
            message += f"; it names {shown_path(files[0])}: give that file"
        raise RecipeError([Problem(place, message)])
    return {key: value for key, value in variables.items() if key in ENVIRONMENT} | best


ENVIRONMENT = ("MAX_PIXELS", "MIN_PIXELS", "VIDEO_MAX_PIXELS", "FPS_MAX_FRAMES")
"""Variables by which ms-swift learns how large images may be."""


def _trainer(words: list[str]) -> dict[str, str]:
    """The trainer of TRL that a command names, as `trl dpo` or `dpo_vlm.py`."""
    if Path(words[0]).name == "trl":
        named = words[1:2]
    else:
        named = [Path(word).stem for word in words if word.endswith(".py")][:1]
    match = TRAINERS.fullmatch(named[0]) if named else None
    return {TRAINER: match[1]} if match else {}


def _flags(words: list[str]) -> dict[str, Any]:
    """The flags of a command, without those of the launcher before the script."""
    launched = not words or Path(words[0]).name not in PROGRAMS
    scripts = [place for place, word in enumerate(words) if launched and word.endswith(".py")]
    flags: dict[str, list[str]] = {}
    name: str | None = None
    for word in words[scripts[0] + 1 if scripts else 0 :]:
        if word in ("|", "&&", ";", ">", "2>&1", "&"):
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        elif name is not None:
            flags[name].append(word)
    return {
        name: True if not values else values[0] if len(values) == 1 else values
        for name, values in flags.items()
    }
