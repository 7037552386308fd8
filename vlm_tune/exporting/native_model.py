"""Export of a native model in its own layout: its class, config, processor and merged weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_tune.data.batching.collate import collate
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example
from vlm_tune.errors import ModelError
from vlm_tune.exporting.card import model_card
from vlm_tune.exporting.hf_export import EXAMPLE
from vlm_tune.exporting.merge import check_output
from vlm_tune.exporting.source import (
    Expected,
    ExportReport,
    check_answers,
    check_ids,
    commit_export,
    expected_of,
    whole_model,
)
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.checkpoint import find_single, load_model
from vlm_tune.model.pretrained.native_template import chat_inputs
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters, check_loading, read_safetensors
from vlm_tune.precision import DTYPES
from vlm_tune.version import __version__


def export_native(
    path: Path, output: Path, dtype: str | None, max_shard_size: str, verify: bool, base: BaseChoice
) -> ExportReport:
    """Writes a native model with processor, card and report; see `vlm_tune.exporting.export`."""
    check_output(output, path)
    model, merged = whole_model(path, find_single(path), output, dtype, base)
    dtype = model.config.precision
    expected = expected_of(path, model) if verify else None
    cast_parameters(model, DTYPES[dtype])
    language: Any = model.llm.model
    language.generation_config.eos_token_id = model.processor.stop_ids
    language.generation_config.pad_token_id = model.processor.spec.pad_id

    def write(folder: Path) -> tuple[ExportReport, str]:
        language.save_pretrained(folder, max_shard_size=max_shard_size)
        model.processor.images.save(folder)
        parameters = sum(parameter.numel() for parameter in language.parameters())
        report = ExportReport(str(output), "transformers", dtype, merged, parameters, None, None)
        if expected is not None:
            allowed = expected.tolerance(dtype)
            report = replace(
                report,
                difference=native_difference(_opened(folder), folder, model, expected, allowed),
                same_text=True,
                rows=len(expected.rows),
                allowed=allowed,
            )
        return report, _card(path, model, report)

    return commit_export(output, write)


def _opened(folder: Path) -> Any:
    """transformers' model of a folder, in fp32. Raises `ModelError` if weights do not fit."""
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText
    theirs, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    check_loading(info, "nothing was written: the exported weights do not fit")
    return theirs.eval()


def native_difference(
    theirs: Any, folder: Path, model: VisionLanguageNetwork, expected: Expected, tolerance: float
) -> float:
    """The largest difference of the logits of transformers' model `theirs` from the model's.

    `folder` has its processor. Raises `ModelError` if ids, tensors of images, logits or greedy text
    differ.
    """
    from transformers import AutoProcessor

    theirs = theirs.to(model.device)
    processor: Any = AutoProcessor.from_pretrained(folder)
    logits = [_their_logits(theirs, processor, model, row) for row in expected.rows]
    texts = [_their_answer(theirs, processor, model, row) for row in expected.rows]
    return check_answers(expected, torch.cat(logits), texts, tolerance)


@torch.inference_mode()
def _their_logits(
    theirs: Any, processor: Any, model: VisionLanguageNetwork, row: Conversation
) -> torch.Tensor:
    """The export's logits [S, V] at a row's supervised positions."""
    (example,) = model.processor.examples(row)
    template = model.processor.template
    inputs = chat_inputs(processor, row.messages, template, opened=False).to(model.device)
    ids = example.input_ids.tolist()
    given = inputs["input_ids"][0, : len(ids) + 1].tolist()
    # A template that leaves an answer's end to the next turn writes none after the last one.
    ended = [int(example.labels[-1])] if len(given) > len(ids) else []
    check_ids(row, [*ids, *ended], given)
    _check_images(inputs, model, example)
    supervised = torch.from_numpy(example.labels).to(model.device) != IGNORE_INDEX
    return theirs(**inputs).logits[0, : len(ids)].float()[supervised]


def _check_images(inputs: Any, model: VisionLanguageNetwork, example: Example) -> None:
    """Raises `ModelError` if an exported processor prepares images in another way."""
    batch = collate([example], model.processor.spec, fetch=model.processor.images.inputs)
    for name, tensor in batch.native.items():
        given = inputs[name].to(tensor.device)
        if given.shape != tensor.shape or bool((given != tensor).any()):
            raise ModelError(
                f"the exported processor gives another {name} for the media of {example.id} than "
                "the model was trained with; nothing was written"
            )


@torch.inference_mode()
def _their_answer(
    theirs: Any, processor: Any, model: VisionLanguageNetwork, row: Conversation
) -> str:
    answered = row.messages[-1].role == "assistant"
    turns = row.messages[:-1] if answered else row.messages
    template = model.processor.template
    inputs = chat_inputs(processor, turns, template, opened=True).to(model.device)
    ids = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return AnswerReader(model.processor, ()).answer(new, None).text


def write_adapter_over_native(
    folder: Path, path: Path, source: Path, base: BaseChoice, *, verify: bool
) -> ExportReport:
    """Adds a native model's processor to its adapter in a folder, which plain PEFT then opens.

    Args:
        folder: a PEFT folder, over the checkpoint.
        path: the run that the model is of, for rows to compare by.
        source: the model's folder.
        base: where the checkpoint lies, if not in its recorded place.
        verify: whether what PEFT computes over the checkpoint is compared with the model.

    Returns:
        The report, without the output folder's name.

    Raises:
        ModelError: ids, tensors of images, logits or greedy text differ.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = load_model(source, dtype=torch.float32, quantize=False, base=base)
    model.processor.images.save(folder)
    count = sum(map(torch.numel, read_safetensors(folder / "adapter_model.safetensors").values()))
    report = ExportReport("", "adapter", "fp32", [], count, None, None)
    if not verify:
        return report
    expected = expected_of(path, model)
    allowed = expected.tolerance("fp32")
    whole: Any = AutoModelForImageTextToText.from_pretrained(
        str(model.config.llm.name), dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(whole, str(folder)).eval()
    return replace(
        report,
        difference=native_difference(theirs, folder, model, expected, allowed),
        same_text=True,
        rows=len(expected.rows),
        allowed=allowed,
    )


def _card(path: Path, model: VisionLanguageNetwork, report: ExportReport) -> str:
    verified = (
        "not verified"
        if report.difference is None
        else f"logits within {report.difference:.2g} of the model's, same greedy text"
    )
    return model_card(
        {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "base_model": model.config.llm.name,
        },
        f"A {type(model.llm.model).__name__} tuned by vlm_tune {__version__}.",
        [
            f"started from: {model.config.llm.name}",
            f"merged adapters: {', '.join(report.merged) or 'none'}",
            f"{report.parameters:,} parameters in {report.dtype}; {verified}",
        ],
        ("python", EXAMPLE.format(folder=report.output)),
        path,
    )
