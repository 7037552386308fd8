"""Names of models: local folders or hub names, checks of them, and whether the hub is reachable."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vlm_tune.errors import ModelError
from vlm_tune.paths import exists, shown_path
from vlm_tune.quoting import REASON, cut, quoted
from vlm_tune.resources import resource_folder

SECONDS = 3.0
"""Timeout of the request that tests whether the hub is reachable."""
OURS = "vlm_tune"
"""The model type in the config.json of a vlm_tune model folder."""
CONNECTOR_ADAPTER = "connector_adapter"
ADAPTERS = ("adapter", "tasks", "tower_adapter", CONNECTOR_ADAPTER, "prompt", "llm.safetensors")
"""Names in a model folder of trained values that are not merged into its weights."""


@cache
def hub_answers() -> bool:
    """Whether the model hub is reachable, tested once per process.

    If it is not, its libraries are switched to their caches: otherwise they retry each request for
    minutes.
    """
    import ssl
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        return True  # an error status is an answer too
    except OSError as error:
        # Certificate errors are left to the hub's library, which has its own list of certificates.
        if isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError):
            return True
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def config_source(name: str) -> str:
    """The name or folder from which a model's config is loaded.

    That is its name, or a config shipped with vlm_tune if neither a folder, the hub nor the cache
    has it.
    """
    if exists(name) or is_path(name) or hub_answers():
        return name
    from huggingface_hub import try_to_load_from_cache

    shipped = resource_folder("data_templates") / "models" / name
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    return str(shipped) if not cached and (shipped / "config.json").is_file() else name


def is_path(name: str) -> bool:
    """Whether a name can only be a path: hub names are `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def load_reason(name: str, error: Exception) -> str:
    """The reason why a model could not be loaded, in one line for a message.

    Where no folder of that name exists, the line says what to do.
    """
    line = cut((str(error).strip().splitlines() or [type(error).__name__])[0], REASON)
    if exists(name):
        return line
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            "there is no folder of that name, it is not in the cache of the hub's models, and "
            f"{constants.ENDPOINT} can't be reached; name a local folder, or try again when the "
            "hub can be reached"
        )
    return f"{line} (there is no folder of that name, so it was looked up on the hub)"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model folder.

    Raises `ModelError` for a file that is missing, truncated, or has another content.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it was truncated or changed"
        raise ModelError(f"{path}: can't be read as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def is_ours(folder: Path) -> bool:
    """Whether a folder is a vlm_tune model folder.

    Raises `ModelError` for a config.json that can't be read.
    """
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get(
        "model_type"
    ) == OURS


def unmerged(folder: Path) -> list[str]:
    """The names of the trained values in a vlm_tune model folder that are not merged.

    These are adapters, virtual tokens, and individually trained weights.
    """
    return [name for name in ADAPTERS if (folder / name).exists()]


def check_base(name: str, key: str) -> None:
    """Checks that a name in a recipe can be that of a complete model.

    Args:
        name: a local folder or a hub name.
        key: its key in the recipe, such as `model.llm.name`.

    Raises:
        ModelError: it is a path that does not exist, a PEFT adapter, a run, or a vlm_tune model
            folder; the message says what to name instead.
    """
    folder = Path(name)
    if not exists(folder):
        if is_path(name):
            hint = "; write the full path, ~ is not expanded" if name.startswith("~") else ""
            raise ModelError(f"{key}: no such folder: {shown_path(name)}{hint}")
        hub_answers()
        return
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{key}: {quoted(name)} is a PEFT adapter over {quoted(base)}, not a whole model, "
            "and training would replace it; "
            "merge it first (PEFT's merge_and_unload, then save_pretrained) "
            "and name the merged folder, or name the base"
        )
    if (folder / "recipe.yaml").is_file() and any(
        (folder / part).is_dir() for part in ("model", "stages")
    ):
        raise ModelError(
            f"{key}: {quoted(name)} is a run of vlm_tune; "
            f"{_folder_to_take(folder / 'model', name, key)}"
        )
    if is_ours(folder):
        raise ModelError(
            f"{key}: {quoted(name)} is a model of vlm_tune with all its parts; "
            f"{_folder_to_take(folder, name, key)}"
        )
    if folder.name == "llm" and is_ours(folder.parent) and unmerged(folder.parent):
        beside = ", ".join(unmerged(folder.parent))
        raise ModelError(
            f"{key}: {quoted(name)} is the language model without what was trained beside it "
            f"({beside}); "
            f"run `vlm-tune merge {folder.parent} --output merged` and name merged/llm"
        )


def _folder_to_take(folder: Path, name: str, key: str) -> str:
    """The part of a message that says what to name instead of a run or vlm_tune model folder."""
    if not (folder / "config.json").is_file() or unmerged(folder):
        return (
            f"run `vlm-tune merge {name} --output merged`, then name merged/llm here, "
            "or model.pretrained: merged for all parts"
        )
    whole = f"model.pretrained: {folder} for all parts"
    if key == "model.llm.name" and (folder / "llm").is_dir():
        return f"name its language model, {folder / 'llm'}, or {whole}"
    return f"take {whole}"
