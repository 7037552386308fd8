"""The command that hands an export over to vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer

from vlm_tune.cli.entry import app
from vlm_tune.errors import ModelError
from vlm_tune.serving.handover import vllm_command
from vlm_tune.serving.limits import Limits

DEFAULTS: dict[str, Any] = {"name": None, "host": "127.0.0.1", "port": 8000, "dtype": None}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder that looks like an export."""
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    return tmp_path / "shown"


def test_the_command_of_an_export(export: Path, tmp_path: Path) -> None:
    command = vllm_command(export, adapters={}, limits=Limits(), **DEFAULTS)
    assert command[:3] == ["vllm", "serve", str(export)]
    assert "--served-model-name shown --max-num-seqs 32" in " ".join(command)
    # No host is allowed, while vLLM itself allows all.
    assert "--allowed-media-domains none.invalid" in " ".join(command)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 24}))
    limits = Limits(
        image_root=tmp_path,
        cors=("https://a.example",),
        api_key="secret",
        allow_hosts=("b.example", "c.example"),
    )
    options = DEFAULTS | {"name": "mine", "dtype": "bf16", "adapters": {"more": tmp_path}}
    text = " ".join(vllm_command(export, limits=limits, **options))
    assert "--served-model-name mine" in text and "--dtype bfloat16" in text
    assert f"--enable-lora --max-lora-rank 32 --lora-modules more={tmp_path}" in text
    assert f"--allowed-local-media-path {tmp_path}" in text and "secret" not in text
    assert "--allowed-media-domains b.example c.example --" in text


def test_other_folders_are_refused_with_the_way_to_an_export(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no export that vLLM loads.*vlm-tune export"):
        vllm_command(tmp_path, adapters={}, limits=Limits(), **DEFAULTS)
    with pytest.raises(ModelError, match=r"no PEFT adapter.*--format adapter"):
        vllm_command(export, adapters={"a": tmp_path}, limits=Limits(), **DEFAULTS)


def test_the_command_line_becomes_vllms(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["serve", str(export), "--engine", "vllm", "--api-key", "secret", "--port", "9000"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="vLLM is not installed"):
        app(arguments, standalone_mode=False)
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    became: list[list[str]] = []

    def become(program: str, command: list[str]) -> None:
        became.append(command)
        raise typer.Exit

    monkeypatch.setattr(os, "execvp", become)
    monkeypatch.setenv("VLLM_API_KEY", "")
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "1")
    app(arguments, standalone_mode=False)
    assert became[0][:2] == ["vllm", "serve"] and "9000" in became[0]
    assert os.environ["VLLM_API_KEY"] == "secret"
    assert os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
