"""Prints pip requirements from pyproject.toml: python .ci/requirements.py newest | oldest | check

`newest` lifts the caps, so that pip takes today's releases; `oldest` pins every floor. `check`
compares the floors and caps with the versions in `[tool.vlm_tune.tried]` and ends with 1 where they
differ.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
BY_MINOR = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes"}
"""Packages capped at the next minor release, since their minors have broken callers.

Others are capped at the next major one.
"""


def load_project() -> dict:
    """pyproject.toml as a dict."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(project: dict) -> list[Requirement]:
    """The dependencies, those of the extra `dev` and of the extras that it names included."""
    extras = project["project"]["optional-dependencies"]
    dev = [Requirement(line) for line in extras["dev"]]
    named = [extra for each in dev if each.name == "vlm_tune" for extra in sorted(each.extras)]
    lines = [
        *project["project"]["dependencies"],
        *(line for extra in named for line in extras[extra]),
    ]
    return [Requirement(line) for line in lines] + [each for each in dev if each.name != "vlm_tune"]


def floor(requirement: Requirement) -> str | None:
    """The version after >= or ==."""
    return next((s.version for s in requirement.specifier if s.operator in (">=", "==")), None)


def cap(requirement: Requirement) -> str | None:
    """The version after <."""
    return next((s.version for s in requirement.specifier if s.operator == "<"), None)


def newest(requirement: Requirement) -> str:
    """The requirement without its cap."""
    return f"{_name(requirement)}>={floor(requirement)}"


def oldest(requirement: Requirement) -> str:
    """The requirement pinned to its floor."""
    return f"{_name(requirement)}=={floor(requirement)}"


def _name(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}"


def expected_cap(name: str, newest_tried: str) -> str:
    """The next minor or major release after the newest that was tried."""
    version = Version(newest_tried)
    if name in BY_MINOR:
        return f"{version.major}.{version.minor + 1}"
    return str(version.major + 1)


def problems(project: dict) -> list[str]:
    """Dependencies whose floor or cap is not what `[tool.vlm_tune.tried]` says was tried.

    Those of extras may be listed there; all others must be.
    """
    tried = project["tool"]["vlm_tune"]["tried"]
    lines = [Requirement(line) for line in project["project"]["dependencies"]]
    extras = [each for each in requirements(project) if each not in lines and each.name in tried]
    names = {each.name for each in [*lines, *extras]}
    wrong = [f"{name}: tried, but no dependency" for name in tried if name not in names]
    for each in [*lines, *extras]:
        if each.name not in tried:
            wrong.append(f"{each.name}: no entry under [tool.vlm_tune.tried]")
            continue
        first, last = tried[each.name]
        if floor(each) != first:
            wrong.append(f"{each.name}: the floor is {floor(each)}, the oldest tried is {first}")
        if cap(each) != expected_cap(each.name, last):
            wrong.append(
                f"{each.name}: the cap is {cap(each)}, "
                f"after {last} it is {expected_cap(each.name, last)}"
            )
    return wrong


def main() -> int:
    """Prints what was asked for; 1 where `check` finds a difference."""
    which = sys.argv[1] if len(sys.argv) == 2 else ""
    project = load_project()
    if which == "check":
        wrong = problems(project)
        print("\n".join(wrong) or "floors and caps are those that were tried")
        return int(bool(wrong))
    form = {"newest": newest, "oldest": oldest}.get(which)
    if form is None:
        print(__doc__, file=sys.stderr)
        return 2
    tools = {"pyright", "pre-commit", "pip-audit"}
    print("\n".join(form(each) for each in requirements(project) if each.name not in tools))
    return 0


if __name__ == "__main__":
    sys.exit(main())
