"""Names of models: which are folders, which can't be what a recipe takes them for, and whether the hub answers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vlm_tune.errors import ModelError
from vlm_tune.paths import exists, shown_path
from vlm_tune.quoting import quoted
from vlm_tune.resources import resource_folder

SECONDS = 3.0
"""How long the hub may take to answer at all."""
OURS = "vlm_tune"
"""The model type in the config.json of a model folder of ours."""
ADAPTERS = ("adapter", "tower_adapter", "prompt", "llm.safetensors")
"""What a model folder holds that is not merged into its weights."""


@cache
def hub_answers() -> bool:
    """Whether the model hub can be reached, tried once a process; where not, its libraries use their caches only.

    Without this each of their requests is tried again for minutes.
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
        return True  # whatever it says, it answers
    except OSError as error:
        # What is wrong with a certificate is for the hub's own library to find, which has its own list of them.
        if isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError):
            return True
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def config_source(name: str) -> str:
    """Where a model's config is read: under its name, or where neither folder, hub nor cache has it, from those shipped."""
    if exists(name) or is_path(name) or hub_answers():
        return name
    from huggingface_hub import try_to_load_from_cache

    shipped = resource_folder("data_templates") / "models" / name
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    return str(shipped) if not cached and (shipped / "config.json").is_file() else name


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder or file: the hub's are `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def load_reason(name: str, error: Exception) -> str:
    """Why a model of a name could not be read, in one line, with what to do where no such folder is the cause."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if exists(name):
        return line
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"there is no folder of that name, it is not in the cache of the hub's models, and {constants.ENDPOINT} "
            "can't be reached; name a local folder, or try again with a network"
        )
    return f"{line} (there is no folder of that name, so it was taken for a name of the hub)"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises `ModelError` for a file that is missing, cut, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it was cut or changed"
        raise ModelError(f"{path}: can't be read as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def is_ours(folder: Path) -> bool:
    """Whether a folder is a model folder of ours. Raises `ModelError` for a config.json that can't be read."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get(
        "model_type"
    ) == OURS


def unmerged(folder: Path) -> list[str]:
    """The adapters, virtual tokens and single weights of a model folder of ours, by the names of their files and folders."""
    return [name for name in ADAPTERS if (folder / name).exists()]


def check_base(name: str, key: str) -> None:
    """Checks that a name in a recipe can be that of a whole model.

    Args:
        name: a local folder or a hub name.
        key: what the recipe calls it, as `model.llm.name`.

    Raises:
        ModelError: it is a path where nothing is, a PEFT adapter, a run, or a model folder of ours; says what to name.
    """
    folder = Path(name)
    if not exists(folder):
        if is_path(name):
            hint = "; write the path out, ~ is not replaced" if name.startswith("~") else ""
            raise ModelError(f"{key}: no such folder: {shown_path(name)}{hint}")
        hub_answers()
        return
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{key}: {quoted(name)} is a PEFT adapter over {quoted(base)}, not a whole model, and training would replace it; "
            "merge it first (PEFT's merge_and_unload, then save_pretrained) and name the merged folder, or name the base"
        )
    if (folder / "recipe.yaml").is_file() and any(
        (folder / part).is_dir() for part in ("model", "stages")
    ):
        raise ModelError(
            f"{key}: {quoted(name)} is a run of vlm_tune; {_folder_to_take(folder / 'model', name, key)}"
        )
    if is_ours(folder):
        raise ModelError(
            f"{key}: {quoted(name)} is a model of vlm_tune with all its parts; {_folder_to_take(folder, name, key)}"
        )
    if folder.name == "llm" and is_ours(folder.parent) and unmerged(folder.parent):
        beside = ", ".join(unmerged(folder.parent))
        raise ModelError(
            f"{key}: {quoted(name)} is the language model without what was trained beside it ({beside}); "
            f"run `vlm-tune merge {folder.parent} --output merged` and name merged/llm"
        )


def _folder_to_take(folder: Path, name: str, key: str) -> str:
    """What to name in the place of a run or a model folder of ours."""
    if not (folder / "config.json").is_file() or unmerged(folder):
        return f"run `vlm-tune merge {name} --output merged`, then name merged/llm here, or model.pretrained: merged for all parts"
    whole = f"model.pretrained: {folder} for all parts"
    if key == "model.llm.name" and (folder / "llm").is_dir():
        return f"name its language model, {folder / 'llm'}, or {whole}"
    return f"take {whole}"
