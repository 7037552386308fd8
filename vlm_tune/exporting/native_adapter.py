"""Export of what was trained over a whole model of transformers as a PEFT folder with its names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_tune.errors import ModelError
from vlm_tune.exporting.hf_export import compared, exact_attention, target_of
from vlm_tune.exporting.source import ExportReport, expected_of
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.build import TOWER
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.families.base import Vlm, part_tensors
from vlm_tune.model.hub import config_source, read_json
from vlm_tune.model.lora import PREFIX, merge_adapter
from vlm_tune.model.pretrained.tokenizer import pin_tokenizer
from vlm_tune.model.restoring import ADAPTERS, BESIDE
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import read_safetensors, write_safetensors

Tensors = dict[str, torch.Tensor]
TOWER_TRAINED = "the tower is trained too, and the adapter is that of the language model"
WORDS_ADDED = "the checkpoint lacks rows for model.llm.added_tokens"
"""The reasons why what was trained over a whole model is no adapter."""
SINGLE = {"connector.newline": "newline", "connector.queries": "query_tokens"}
"""The connector's parameters that are in no module of their own, and their names in a checkpoint's
connector: the token for rows' ends, and a Q-Former's queries."""


def single_trained(name: str) -> str:
    """The reason why an adapter has no place for a trained parameter of `SINGLE`."""
    return (
        f"{name} is trained too, and PEFT's adapters have no place for a single parameter: "
        f'begin tune with {{match: "{name}", how: frozen}}'
    )


def write_native_adapter(
    folder: Path, path: Path, source: Path, vlm: Vlm, base: BaseChoice, *, verify: bool
) -> ExportReport:
    """Writes LoRA on the LLM, and the connector as `modules_to_save`, by the whole model's names.

    The connector's own LoRA is merged into its weights, and the model's processor is beside them.
    Plain PEFT over the checkpoint must give the model's token ids, pixels, logits and greedy text.

    Args:
        folder: where it is written.
        path: the run that the model is of, for rows to compare by.
        source: the model's folder, which has an adapter of the LLM.
        vlm: the checkpoint that the adapter is over.
        base: where the checkpoint lies, if not in its recorded place.
        verify: whether the folder is compared with the model.

    Returns:
        The report, without the output folder's name.

    Raises:
        ModelError: a part that was trained has no place in the folder, or what PEFT computes
            differs.
    """
    if (source / TOWER).is_file() or (source / ADAPTERS["tower"]).is_dir():
        raise ModelError(f"{TOWER_TRAINED}: use merge, or --format transformers")
    model = load_model(source, dtype=torch.float32, quantize=False, base=base)
    if model.config.llm.words:
        raise ModelError(f"{WORDS_ADDED}: use merge, or --format transformers")
    config = read_json(source / ADAPTERS["llm"] / "adapter_config.json")
    lora = _renamed(vlm, read_safetensors(source / ADAPTERS["llm"] / "adapter_model.safetensors"))
    if "connector" in model.adapters:
        # PEFT keeps a module whole or adapts it, and a connector's own weights may have been
        # trained as well.
        merge_adapter(model, "connector")
    whole = _renamed(vlm, _without_single(vlm, _trained_whole(model, source)))
    config |= {
        "base_model_name_or_path": vlm.name,
        # By full names: the tower's layers have the same last names as the LLM's.
        "target_modules": sorted({name.partition(".lora_")[0] for name in lora}),
        "modules_to_save": _outermost({name.rpartition(".")[0] for name in whole}),
        "layers_to_transform": None,
        "exclude_modules": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {f"{PREFIX}{name}": value for name, value in {**lora, **whole}.items()}
    write_safetensors(tensors, folder / "adapter_model.safetensors")
    target = target_of(model.config)
    target.processor(model).save_pretrained(folder)
    pin_tokenizer(folder)
    report = ExportReport(
        "", "adapter", "fp32", [], sum(map(torch.numel, tensors.values())), None, None
    )
    if not verify:
        return report
    expected = expected_of(path, model, target.comparable)
    allowed = expected.tolerance("fp32")
    difference = compared(_over_checkpoint(folder, vlm), folder, model, expected, allowed)
    return replace(
        report, difference=difference, same_text=True, rows=len(expected.rows), allowed=allowed
    )


def _outermost(names: set[str]) -> list[str]:
    """The names of modules, sorted, without those inside of another one."""
    return sorted(
        name for name in names if not any(name.startswith(f"{other}.") for other in names)
    )


def _trained_whole(model: VisionLanguageNetwork, source: Path) -> Tensors:
    """The weights that are written whole: the connector's, and the LLM's own that were trained."""
    state = model.connector.state_dict()
    tensors = {f"connector.{name}": value.cpu() for name, value in state.items()}
    if (source / BESIDE).is_file():
        tensors |= read_safetensors(source / BESIDE)
    return tensors


def _without_single(vlm: Vlm, tensors: Tensors) -> Tensors:
    """The tensors without the parameters of `SINGLE`.

    Raises `ModelError` if one is not the checkpoint's.
    """
    for name, theirs in SINGLE.items():
        trained = tensors.pop(name, None)
        if trained is None:
            continue
        untrained = part_tensors(vlm, "connector")[theirs].reshape(trained.shape)
        if not torch.equal(trained.float(), untrained.float()):
            raise ModelError(f"{single_trained(name)}, or use merge, or --format transformers")
    return tensors


def _renamed(vlm: Vlm, tensors: Tensors) -> Tensors:
    """Tensors by the names in the whole model."""
    return {_native(vlm, name.removeprefix(PREFIX)): value for name, value in tensors.items()}


def _native(vlm: Vlm, name: str) -> str:
    """The whole model's name of a tensor of the LLM, or of the connector after `connector.`."""
    for ours, theirs in vlm.family.modules.items():
        match = re.match(re.escape(ours).replace(r"\*", r"(\d+)"), name)
        if match:
            return theirs.replace("*", "".join(match.groups())) + name[match.end() :]
    raise ModelError(
        f"{name} has no place in {vlm.family.name}: use merge, or --format transformers"
    )


def _over_checkpoint(folder: Path, vlm: Vlm) -> Any:
    """transformers' model of the checkpoint with the adapter by plain PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    whole: Any = AutoModelForImageTextToText.from_pretrained(
        config_source(vlm.name), dtype=torch.float32, **exact_attention(vlm.name)
    )
    return PeftModel.from_pretrained(whole, str(folder)).eval()
