"""Export to the two GGUF files of llama.cpp, read back and verified before they get their names."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_tune.config.model import NativeSection
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.errors import ModelError
from vlm_tune.exporting.card import described_parts, model_card
from vlm_tune.exporting.gguf.language import (
    FAMILIES,
    decoder_reasons,
    decoder_tensors,
    describe_decoder,
)
from vlm_tune.exporting.gguf.mmproj import write_mmproj
from vlm_tune.exporting.gguf.projectors import mmproj_reasons, projector_of
from vlm_tune.exporting.gguf.tokenizer import tokenizer_reasons
from vlm_tune.exporting.gguf.verification import Files, notes_of, verify_gguf
from vlm_tune.exporting.gguf.writer import TYPES, WIDTHS, check_gguf, write_gguf
from vlm_tune.exporting.merge import check_output
from vlm_tune.exporting.source import (
    ExportReport,
    check_prompt,
    check_room,
    commit_export,
    count_parameters,
    expected_of,
    text_config,
    whole_model,
)
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.checkpoint import find_single
from vlm_tune.model.pretrained.tokenizer import load_tokenizer
from vlm_tune.model.restoring import read_config
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters
from vlm_tune.precision import DTYPES
from vlm_tune.version import __version__

HELD = (
    "llama.cpp holds a decoder, two linear layers with GELU between them, and one CLIP or SigLIP "
    "ViT without its class token; or an Idefics3, SmolVLM, Gemma 3, InternVL, Pixtral or Mistral 3"
)


def export_gguf(
    path: Path, output: Path, dtype: str | None, verify: bool, base: BaseChoice
) -> ExportReport:
    """Writes `model-TYPE.gguf` and `mmproj-TYPE.gguf`, a card and a report; see `export`."""
    check_gguf()
    source = find_single(path)
    config = read_config(source, base)
    text = check_target(source, config)
    check_output(output, path)
    parameters = count_parameters(text, config)
    # Two copies: the model, and the one that is read back.
    check_room(parameters, output, WIDTHS[dtype or config.precision], copies=2)
    model, merged = whole_model(path, source, output, None if dtype == "q8_0" else dtype, base)
    dtype = dtype or model.config.precision
    precision = model.config.precision
    expected = expected_of(path, model) if verify else None
    cast_parameters(model, DTYPES[precision])

    def write(folder: Path) -> tuple[ExportReport, str]:
        files = Files(
            folder / f"model-{TYPES[dtype]}.gguf", folder / f"mmproj-{TYPES[precision]}.gguf"
        )
        write_files(files, model, dtype)
        report = ExportReport(
            str(output), "gguf", dtype, merged, parameters, None, None, notes_of(model)
        )
        if expected is not None:
            verified = verify_gguf(files, model, expected, dtype)
            report = replace(report, **asdict(verified), rows=len(expected.rows))
        return report, gguf_card(path, model, files, report)

    return commit_export(output, write)


def check_target(source: Path, config: VisionLanguageConfig) -> Any:
    """transformers' config of the LLM, read before any weights.

    Raises `ModelError` with every reason why the model can't be written as GGUF.
    """
    check_prompt(source)
    text = text_config(source, config) if config.llm.kind == "causal" else None
    reasons = gguf_reasons(config, text)
    if text is not None and not reasons:
        tokenizer = load_tokenizer(config.llm, source)
        template = ChatTemplate.model_validate(config.template)
        reasons = [
            *tokenizer_reasons(tokenizer, text.vocab_size, template),
            *projector_of(config).token_reasons(tokenizer),
        ]
    if reasons:
        raise ModelError(f"this model can't be exported as GGUF: {'; '.join(reasons)}. {HELD}")
    return text


def gguf_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    """The reasons why a model can't be written as GGUF, its tokenizer apart.

    `text` is the LLM's transformers config, None for an encoder-decoder.
    """
    if isinstance(config.model, NativeSection):
        return ["a model of kind: native has the layout of its own checkpoint"]
    language = (
        ["its language model is an encoder-decoder"] if text is None else decoder_reasons(text)
    )
    return [*mmproj_reasons(config, text), *language]


def write_files(files: Files, model: VisionLanguageNetwork, dtype: str) -> None:
    """Writes the language model in `dtype`, and tower and connector in the model's precision."""
    language: Any = model.llm.model
    rows = model.llm.vocabulary
    name = FAMILIES[language.config.model_type]
    describe = partial(
        describe_decoder,
        text=language.config,
        processor=model.processor,
        rows=rows,
        around=projector_of(model.config).around,
    )
    write_gguf(files.language, name, describe, decoder_tensors(language), dtype)
    write_mmproj(files.mmproj, model, dtype)


# --- the card -------------------------------------------------------------------------------------


def gguf_card(path: Path, model: VisionLanguageNetwork, files: Files, report: ExportReport) -> str:
    """The README of an exported folder."""
    tower, connector, language = described_parts(model.config.model)
    proof = (
        "not verified"
        if report.difference is None
        else f"logits within {report.difference:.2g} of the model's"
    )
    return model_card(
        {
            "library_name": "gguf",
            "pipeline_tag": "image-text-to-text",
            "base_model": model.config.model.llm.name,
        },
        f"A vision-language model for llama.cpp, written by vlm_tune {__version__}.",
        [
            f"`{files.language.name}`: the language model, {language}",
            f"`{files.mmproj.name}`: the tower, {tower}, and the connector ({connector})",
            f"merged adapters: {', '.join(report.merged) or 'none'}",
            f"{report.parameters:,} parameters; read back and compared: {proof}",
            *report.notes,
        ],
        (
            "sh",
            f"llama-mtmd-cli -m {files.language.name} --mmproj {files.mmproj.name} --image "
            "image.png -p 'What does the image show?' --temp 0",
        ),
        path,
    )
