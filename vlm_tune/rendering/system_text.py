"""The facts of a machine as text for a bug report."""

from __future__ import annotations

from typing import Any


def system_text(facts: dict[str, Any]) -> str:
    """The facts of `vlm_tune.system.system`, a line each."""
    cpu, cuda, kernels = facts["cpu"], facts["cuda"], facts["kernels"]
    lines = [
        f"vlm_tune {facts['vlm_tune']}, Python {facts['python']}, {facts['system']}",
        *(_library(name, library) for name, library in facts["libraries"].items()),
        "CUDA " + ", ".join(f"{name} {_or_none(number)}" for name, number in cuda.items()),
        f"CPU {cpu['model']}: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['usable']} of "
        f"them usable, {cpu['memory_gb']} GB, {cpu['capability']}, "
        f"AMX {'yes' if cpu['amx'] else 'no'}",
        *(
            f"GPU {number} {gpu['name']}: {gpu['memory_gb']} GB, compute capability "
            f"{gpu['capability']}"
            for number, gpu in enumerate(facts["gpus"])
        ),
        *([] if facts["gpus"] else ["GPU none"]),
        f"attention {', '.join(facts['attention'])}",
        f"kernels {kernels['mode']}: {kernels['reason']}",
        f"compiler {_or_none(facts['compiler'])}",
        *(f"{name}={setting}" for name, setting in facts["variables"].items()),
    ]
    return "\n".join(lines)


def _library(name: str, library: dict[str, Any]) -> str:
    """A library's version, and what is to know about it."""
    if library["version"] is None:
        return f"{name} is not installed"
    remark = "" if library["within"] else f" (not tried: the versions tried are {library['tried']})"
    return f"{name} {library['version']}{remark}"


def _or_none(fact: object) -> str:
    return "none" if fact is None else str(fact)
