"""`vlm-tune env`: what it lists, what it marks as not tried, and what it keeps to itself."""

from __future__ import annotations

import getpass
import json
import platform
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from vlm_tune import system
from vlm_tune.cli.entry import app
from vlm_tune.rendering.system_text import system_text


def test_it_lists_versions_devices_attention_and_kernels_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLM_TUNE_KERNELS", "reference")
    done = CliRunner().invoke(app, ["env", "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["libraries"].keys() == set(system.LIBRARIES)
    for name, library in facts["libraries"].items():
        assert library["version"] == version(name) and library["within"] is not None
    assert facts["python"] == platform.python_version()
    assert facts["cpu"]["threads"] >= facts["cpu"]["usable"] >= 1 and facts["cpu"]["model"]
    assert facts["kernels"] == {"mode": "reference", "reason": "VLM_TUNE_KERNELS=reference"}
    assert "eager" in facts["attention"] and "sdpa math" in facts["attention"]
    assert facts["variables"]["OMP_NUM_THREADS"] == "3"
    text = CliRunner().invoke(app, ["env"]).stdout
    assert f"torch {version('torch')}" in text and facts["cpu"]["model"] in text
    for private in ("hf_secret", str(Path.home()), str(tmp_path), platform.node()):
        assert private not in text and private not in done.stdout
    assert f"/{getpass.getuser()}" not in text


def test_a_version_that_was_not_tried_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cu130", "transformers": "99.0", "timm": "0.1"}
    monkeypatch.setattr(system, "version", lambda name: versions.get(name) or version(name))
    facts = system.system()
    within = {name: facts["libraries"][name]["within"] for name in versions}
    assert within == {"torch": True, "transformers": False, "timm": False}
    lines = system_text(facts).splitlines()
    (line,) = (line for line in lines if line.startswith("transformers"))
    assert line.startswith("transformers 99.0 (not tried: the versions tried are >=")
    assert "torch 2.11.0+cu130" in lines


def test_a_library_that_is_missing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "deepspeed":
            raise system.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(system, "version", installed)
    facts = system.system()
    assert facts["libraries"]["deepspeed"]["version"] is None
    assert facts["libraries"]["deepspeed"]["within"] is None
    assert "deepspeed is not installed" in system_text(facts).splitlines()


def test_a_gpu_and_its_driver_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without one, from what torch and the system would give."""
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Sep 2025\nGCC version: 12\n"
    )
    monkeypatch.setattr(system, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    facts = system.system()
    assert facts["gpus"] == [{"name": "NVIDIA H100", "memory_gb": 85.0, "capability": "9.0"}]
    assert facts["cuda"]["driver"] == "580.95.05"
    assert "GPU 0 NVIDIA H100: 85.0 GB, compute capability 9.0" in system_text(facts)
    monkeypatch.setattr(system, "DRIVER", tmp_path / "none")
    assert system.driver_version() is None


def test_a_compiler_is_named_without_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/nowhere\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert system.compiler_version() == "c++ (it does not run)"
    monkeypatch.setattr(system, "compiler", lambda: None)
    assert system.compiler_version() is None
