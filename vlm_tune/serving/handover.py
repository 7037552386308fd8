"""The command with which vLLM serves an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_tune.errors import ModelError
from vlm_tune.paths import shown_path
from vlm_tune.serving.limits import Limits

KINDS = ("llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl", "mistral3")
"""Model types of `vlm-tune export`'s folders that vLLM serves."""
NO_HOST = "none.invalid"
"""A host that no network has (RFC 2606)."""


def vllm_command(
    folder: Path,
    *,
    name: str | None,
    host: str,
    port: int,
    adapters: Mapping[str, Path],
    dtype: str | None,
    limits: Limits,
) -> list[str]:
    """The command `vllm serve` for a folder of `vlm-tune export`.

    The API key is not in it: other users could see it. vLLM takes it from VLLM_API_KEY.

    Raises:
        ModelError: The folder, or an adapter's, is none that vLLM loads.
    """
    if _config(folder, "config.json").get("model_type") not in KINDS:
        raise ModelError(
            f"{shown_path(folder)} is no export that vLLM loads: write one by "
            f"`vlm-tune export MODEL --output FOLDER` and serve FOLDER"
        )
    command = ["vllm", "serve", str(folder), "--host", host, "--port", str(port)]
    command += ["--served-model-name", name or folder.resolve().name]
    command += ["--max-num-seqs", str(limits.batch)]
    command += ["--limit-mm-per-prompt", json.dumps({"image": limits.max_images})]
    if dtype is not None:
        command += ["--dtype", {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]]
    # Without a list vLLM fetches images from every host.
    command += ["--allowed-media-domains", *(limits.allow_hosts or (NO_HOST,))]
    if limits.image_root is not None:
        command += ["--allowed-local-media-path", str(limits.image_root)]
    if limits.cors:
        command += ["--allowed-origins", json.dumps(list(limits.cors))]
    if adapters:
        command.append("--enable-lora")
        command += ["--max-lora-rank", str(max(map(_rank, adapters.values())))]
        command += ["--lora-modules", *(f"{each}={place}" for each, place in adapters.items())]
    return command


def _rank(adapter: Path) -> int:
    """An adapter's rank, rounded up to one that vLLM has."""
    config = _config(adapter, "adapter_config.json")
    if not isinstance(config.get("r"), int):
        raise ModelError(
            f"{shown_path(adapter)} is no PEFT adapter: write one by "
            f"`vlm-tune export MODEL --format adapter --output FOLDER`"
        )
    return next((rank for rank in (8, 16, 32, 64, 128, 256) if rank >= config["r"]), 512)


def _config(folder: Path, name: str) -> dict[str, Any]:
    """A folder's JSON file; empty where there is no such object."""
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
