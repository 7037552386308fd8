"""Export of the LLM's adapter to a PEFT folder, verified with plain PEFT."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_tune.config.model import NativeSection
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import ModelError
from vlm_tune.exporting.card import model_card
from vlm_tune.exporting.merge import check_output
from vlm_tune.exporting.native_adapter import (
    SINGLE,
    TOWER_TRAINED,
    WORDS_ADDED,
    single_trained,
    write_native_adapter,
)
from vlm_tune.exporting.native_model import write_adapter_over_native
from vlm_tune.exporting.source import EXACT, ExportReport, commit_export
from vlm_tune.exporting.verify import probe_rows
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.checkpoint import find_single, load_model
from vlm_tune.model.committed_folders import verify_folder
from vlm_tune.model.families.registry import find_vlm
from vlm_tune.model.hub import read_json
from vlm_tune.model.lora import PREFIX
from vlm_tune.model.pretrained.language_model import load_llm, make_room
from vlm_tune.model.restoring import ADAPTERS, read_config
from vlm_tune.model.restoring import BESIDE as OWN
from vlm_tune.model.vlm import VisionLanguageConfig
from vlm_tune.model.weights import read_safetensors, write_safetensors
from vlm_tune.quoting import applying, quoted

BESIDE = (
    "bases.json",
    "connector.safetensors",
    "tower.safetensors",
    "tower_adapter",
    "connector_adapter",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Files and folders that are copied with an adapter, if the model's folder has them."""
CONNECTOR_NOTE = (
    "a server of adapters, such as vLLM, loads the LLM's LoRA alone, and not the connector in "
    "modules_to_save: serve a merged model instead, as `vlm-tune export --format transformers` "
    "writes it"
)


def adapter_reasons(recipe: Recipe, config: VisionLanguageConfig) -> list[str]:
    """The reasons why a recipe's result can't be exported as an adapter over a named model."""
    rules = [rule for _, stage in recipe.resolved_stages() for rule in stage.tune]
    native = isinstance(config.model, NativeSection)
    of_llm = [rule for rule in rules if native or rule.match.split(".")[0] in ("llm", "*")]
    name = config.llm.name
    tower = [rule for rule in rules if rule.match.split(".")[0] == "tower"]
    whole = not native and name is not None and find_vlm(name) is not None and not _is_part(name)
    trained = not native and config.llm.quantize is None and any(r.trains_base for r in of_llm)
    return applying(
        (all(rule.how != "lora" for rule in of_llm), "no rule puts LoRA on the llm"),
        (
            name is None,
            "its language model starts from random weights, and has no name to be an adapter over",
        ),
        (name is not None and trained, "its language model's own weights are trained too"),
        (
            not native and name is not None and not trained and _is_part(name),
            f"its language model is a part of {name}, which PEFT can't load alone",
        ),
        (whole and any(rule.how != "frozen" for rule in tower), TOWER_TRAINED),
        (whole and config.llm.words, WORDS_ADDED),
        *((whole and _trains(recipe, config, one), single_trained(one)) for one in SINGLE),
    )


def export_adapter(
    path: Path, output: Path, dtype: str | None, verify: bool, base: BaseChoice
) -> ExportReport:
    """Writes the LLM's adapter as a PEFT folder.

    Raises `ModelError` for a model without an adapter, or whose base has no name.
    """
    source = find_single(path)
    config = read_config(source, base)
    verify_folder(source)
    if not (source / ADAPTERS["llm"]).is_dir():
        raise ModelError(f"{source} has no adapter of the language model to export")
    if (source / "llm").is_dir() or config.llm.name is None:
        raise ModelError(
            f"the adapter's base has no hub name or folder of its own, it is in {source}: use "
            "merge, or --format transformers"
        )
    native = isinstance(config.model, NativeSection)
    vlm = None if native else find_vlm(config.llm.name)
    if not native and _is_part(config.llm.name):
        raise ModelError(
            f"the adapter's base is a part of {config.llm.name}, which PEFT can't load alone: use "
            "merge, or --format transformers"
        )
    if dtype is not None:
        raise ModelError("an adapter is exported as it was trained; leave out --dtype")
    check_output(output, path)

    def write_native(folder: Path) -> tuple[ExportReport, str]:
        assert vlm is not None
        report = write_native_adapter(folder, path, source, vlm, base, verify=verify)
        report = replace(report, output=str(output), notes=[CONNECTOR_NOTE])
        return report, _adapter_card(path, config, report)

    def write(folder: Path) -> tuple[ExportReport, str]:
        shutil.copytree(source / ADAPTERS["llm"], folder, dirs_exist_ok=True)
        for name in () if native else BESIDE:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / OWN).is_file():
            _add_own_weights(folder, source)
        if native:
            report = write_adapter_over_native(folder, path, source, base, verify=verify)
            report = replace(report, output=str(output), notes=_server_notes(folder))
            return report, _adapter_card(path, config, report)
        tensors = read_safetensors(folder / "adapter_model.safetensors")
        report = ExportReport(
            str(output), "adapter", "fp32", [], sum(map(torch.numel, tensors.values())), None, None
        )
        unserved = _server_notes(folder)
        if verify:
            difference, allowed, rows, notes = verify_adapter(folder, path, source, base)
            report = replace(report, difference=difference, allowed=allowed, rows=rows, notes=notes)
        report = replace(report, notes=[*report.notes, *unserved])
        return report, _adapter_card(path, config, report)

    return commit_export(output, write if vlm is None else write_native)


def _trains(recipe: Recipe, config: VisionLanguageConfig, name: str) -> bool:
    """Whether the connector has a parameter of this name, and a stage trains it."""
    first = (
        next((rule for rule in stage.tune if fnmatch.fnmatchcase(name, rule.match)), None)
        for _, stage in recipe.resolved_stages()
    )
    # The section has an option of the parameter's name: a flag, or a number.
    has_one = getattr(config.model.connector, name.removeprefix("connector."), None)
    return bool(has_one) and any(rule is not None and rule.trains_base for rule in first)


def _is_part(name: str) -> bool:
    """Whether a name is that of a whole model over which no adapter is written."""
    vlm = find_vlm(name)
    return vlm is not None and not vlm.family.modules


def _server_notes(folder: Path) -> list[str]:
    """A note on what was tuned and a server of PEFT adapters, such as vLLM, does not load."""
    saved = read_json(folder / "adapter_config.json").get("modules_to_save")
    parts = applying(
        ((folder / "connector.safetensors").is_file(), "the connector"),
        ((folder / "tower.safetensors").is_file(), "the tower's weights"),
        ((folder / "tower_adapter").is_dir(), "the tower's LoRA"),
        (bool(saved), "the LLM's rows that were trained whole"),
    )
    if not parts:
        return []
    return [
        f"a server of adapters, such as vLLM, loads the LLM's LoRA alone, and not "
        f"{' or '.join(parts)}: serve a merged model instead, as `vlm-tune merge` or "
        f"`vlm-tune export --format transformers` write it"
    ]


def _add_own_weights(folder: Path, source: Path) -> None:
    """Adds the LLM's own trained weights to a PEFT folder, as PEFT's `modules_to_save`.

    A head that shares them is listed too.
    """
    tensors = read_safetensors(source / OWN)
    config = read_json(folder / "adapter_config.json")
    config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in tensors})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    weights = folder / "adapter_model.safetensors"
    write_safetensors(
        read_safetensors(weights) | {f"{PREFIX}{name}": value for name, value in tensors.items()},
        weights,
    )


@torch.inference_mode()
def verify_adapter(
    folder: Path, path: Path, source: Path, base: BaseChoice
) -> tuple[float, float, int, list[str]]:
    """Compares plain PEFT over the base with the model, in fp32, on the text of probe rows.

    Returns:
        The largest difference of logits, the allowed difference, the number of rows, and notes on
        what else the answers of plain PEFT depend on.

    Raises:
        ModelError: the logits differ by more than is allowed, or the adapter changes nothing.
    """
    from peft import PeftModel

    model = load_model(source, dtype=torch.float32, quantize=False, base=base)
    rows = probe_rows(path, model)
    ids = [
        torch.from_numpy(e.input_ids[~e.image_mask]).long()[None].to(model.device)
        for row in rows
        for e in model.processor.examples(row)
    ]
    llm = model.config.llm.model_copy(update={"quantize": None})
    untuned = load_llm(llm, dtype=torch.float32, device=model.device).eval()
    make_room(untuned, len(model.llm.model.get_input_embeddings().weight))
    seq2seq = model.llm.layout == "seq2seq"
    model_logits, base_logits = (
        [_text_logits(module, one, seq2seq) for one in ids] for module in (model.llm.model, untuned)
    )
    theirs = PeftModel.from_pretrained(untuned, str(folder)).eval()
    peft_logits = [_text_logits(theirs, one, seq2seq) for one in ids]
    difference, change = (
        max(float((a - b).abs().max()) for a, b in zip(model_logits, other, strict=True))
        for other in (peft_logits, base_logits)
    )
    if not change > 0:
        raise ModelError(
            "the adapter has no effect: the model's logits equal its base's; nothing was written"
        )
    allowed = EXACT * max(1.0, *(float(one.abs().max()) for one in model_logits))
    if not difference <= allowed:
        raise ModelError(
            "PEFT's logits with the exported adapter differ from the model's by "
            f"{difference:.3g}; nothing was written"
        )
    base_says = ", ".join(f"{key} {quoted(value)}" for key, value in model.llm.dropped.items())
    notes = (
        [
            "the base's generation config changes what plain PEFT answers, and not answers here: "
            f"{base_says}"
        ]
        if base_says
        else []
    )
    return difference, allowed, len(rows), notes


def _text_logits(module: Any, ids: torch.Tensor, seq2seq: bool) -> torch.Tensor:
    """fp32 logits of a text. An encoder-decoder gets it as the input and as the labels."""
    return module(input_ids=ids, **({"labels": ids} if seq2seq else {})).logits.float()


def _adapter_card(path: Path, config: VisionLanguageConfig, report: ExportReport) -> str:
    base = f"{config.llm.name}" + (f" ({config.llm.gguf_file})" if config.llm.gguf_file else "")
    return model_card(
        {"library_name": "peft", "base_model": config.llm.name},
        f"The language model's LoRA adapter of a vision-language model, over {base}: "
        f"{report.parameters:,} parameters.\n"
        "Beside it: `connector.safetensors`, and what was changed of the tower.",
        (),
        None,
        path,
    )
