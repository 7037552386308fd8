"""The command that describes the machine: env."""

from __future__ import annotations

import typer

from vlm_tune.cli.options import JsonOption, print_json, quiet_libraries


def env(as_json: JsonOption = False) -> None:
    """Print versions, devices, attention backends and kernels, for bug reports."""
    quiet_libraries(model_code=False)
    from vlm_tune.rendering.system_text import system_text
    from vlm_tune.system import system

    facts = system()
    print_json(facts) if as_json else typer.echo(system_text(facts))
