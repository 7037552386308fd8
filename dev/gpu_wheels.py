"""Gathers the wheels that a GPU machine without network lacks: make gpu-wheels

Run: python dev/gpu_wheels.py [FOLDER]

It is for a machine with Python 3.12, torch 2.11 for CUDA 13, transformers 5.17, accelerate 1.15,
peft, timm, pyarrow and typer. There, in a checkout with FOLDER (`.wheels` by default) in it:

    python3 -m pip install --no-index --no-deps --target .site FOLDER/*.whl
    PYTHONPATH=$PWD:$PWD/.site python3 -m benchmarks.gpu --pass 1

Ends with 1 if the folder is larger than 60 MiB, or a package's bounds exclude that machine's
versions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
MOST_MIB = 60
PYTHON = "3.12"
MACHINE = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0"}
"""Versions that the machine has."""

PACKAGES = (
    "pydantic",
    "ruamel.yaml",
    "rich",
    "trl",
    "datasets",
    "open_clip_torch",
    "bitsandbytes",
    "filelock",
    "jinja2",
    "liger-kernel",
    "easy-vqa",
)
"""Missing there, or older there than our floors; the newest versions that the suite is run with."""

NEEDS = (
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "dill",
    "multiprocess",
    "ftfy",
    "wcwidth",
    "typing-extensions",
)
"""Missing there too, needed by `PACKAGES`, which bound their versions."""

OTHER_LIBRARIES = re.compile(r"libbitsandbytes_(cuda(?!130)|rocm|xpu|hpu)")
"""Members of bitsandbytes' wheel that are for other devices than CUDA 13.0."""

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def download(requirement: str, folder: Path) -> Path:
    """Downloads a package's wheel for the machine, without dependencies.

    A package that is published as source alone is built, if it is plain Python.
    """
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    fetched = subprocess.run(
        [*command, "download", *quiet, *target, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
    )
    if fetched.returncode:
        subprocess.run(
            [*command, "wheel", *quiet, "--wheel-dir", str(folder), requirement], check=True
        )
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def requirements(wheel: Path) -> Iterator[Requirement]:
    """The requirements of a wheel, those of extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or ():
        requirement = Requirement(line)
        environment = {"extra": "", "python_version": PYTHON}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


def trim(wheel: Path) -> None:
    """Rewrites bitsandbytes' wheel without the libraries of other devices."""
    beside = wheel.with_suffix(".trimmed")
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as trimmed,
    ):
        for member in whole.infolist():
            if OTHER_LIBRARIES.search(member.filename):
                continue
            content = whole.read(member.filename)
            if member.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(one for one in lines if not OTHER_LIBRARIES.search(one)).encode()
            trimmed.writestr(member, content)
    beside.replace(wheel)


def bounds() -> dict[str, Requirement]:
    """Our requirements by name, of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["easy-vqa"]]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def tried() -> dict[str, str]:
    """The newest version of each dependency that the suite is run with."""
    versions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["vlm_tune"]["tried"]
    return {canonicalize_name(name): newest for name, (_, newest) in versions.items()}


def excluded(requirement: Requirement) -> bool:
    """Whether a requirement excludes the version that the machine has."""
    version = MACHINE.get(canonicalize_name(requirement.name))
    return version is not None and not requirement.specifier.contains(version, prereleases=True)


def main() -> None:
    """Downloads, trims, checks and prints the total."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".wheels")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ours, newest = bounds(), tried()
    problems = [f"vlm_tune needs {each}" for each in ours.values() if excluded(each)]
    needed: dict[str, Requirement] = {}
    for name in (*PACKAGES, *NEEDS):
        key = canonicalize_name(name)
        known = needed.get(key) or ours.get(key)
        version = f"=={newest[key]}" if key in newest else str(known.specifier) if known else ""
        wheel = download(f"{name}{version}", folder)
        if key == "bitsandbytes":
            trim(wheel)
        for requirement in requirements(wheel):
            needed.setdefault(canonicalize_name(requirement.name), requirement)
            if excluded(requirement):
                problems.append(f"{wheel.name} needs {requirement}")
    total = 0.0
    for wheel in sorted(folder.glob("*.whl")):
        total += wheel.stat().st_size / 2**20
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB {wheel.name}")
    print(f"{total:6.2f} MiB in {folder}, at most {MOST_MIB}")
    there = ", ".join(f"{name} {version}" for name, version in MACHINE.items())
    if total > MOST_MIB:
        problems.append(f"{total:.1f} MiB are more than {MOST_MIB}")
    for problem in problems:
        print(f"does not fit {there}: {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
