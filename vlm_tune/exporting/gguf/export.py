"""Export to the two GGUF files of llama.cpp, read back and verified before they get their names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from vlm_tune.config.model import NativeSection
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.data.images.decode import image_size
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media
from vlm_tune.errors import ModelError
from vlm_tune.exporting.card import described_parts, model_card
from vlm_tune.exporting.gguf.language import (
    FAMILIES,
    ROPE_FACTORS,
    decoder_reasons,
    decoder_tensors,
    describe_decoder,
)
from vlm_tune.exporting.gguf.mmproj import Mmproj, mmproj_reasons, projector_of, write_mmproj
from vlm_tune.exporting.gguf.projector import IMAGE_SLOT
from vlm_tune.exporting.gguf.sentencepiece import described_of, pieces_notes
from vlm_tune.exporting.gguf.tokenizer import MARKER, read_tokenizer, tokenizer_reasons
from vlm_tune.exporting.gguf.writer import (
    TYPES,
    WIDTHS,
    as_stored,
    check_gguf,
    read_fields,
    read_tensors,
    write_gguf,
)
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.exporting.merge import check_output
from vlm_tune.exporting.source import (
    EXACT,
    Expected,
    ExportReport,
    check_answers,
    check_ids,
    check_prompt,
    check_room,
    commit_export,
    count_parameters,
    expected_of,
    text_config,
    whole_model,
)
from vlm_tune.exporting.verify import largest_difference, observe
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.checkpoint import find_single
from vlm_tune.model.pretrained.tokenizer import load_tokenizer
from vlm_tune.model.restoring import read_config
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters, check_loading
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import applying
from vlm_tune.version import __version__

HELD = (
    "llama.cpp holds a decoder, two linear layers with GELU between them, and one CLIP or SigLIP "
    "ViT without its class token; or an Idefics3 or a SmolVLM"
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
    return [*mmproj_reasons(config), *language, *bidirectional_reasons(config)]


def notes_of(model: VisionLanguageNetwork) -> list[str]:
    """Where llama.cpp's handling of images and text deviates from how the model was trained."""
    pieces = pieces_notes(described_of(model.processor.tokenizer))
    return [*projector_of(model.config).notes(model), *pieces]


@dataclass(frozen=True)
class Files:
    """The two files of an export."""

    language: Path
    mmproj: Path


def write_files(files: Files, model: VisionLanguageNetwork, dtype: str) -> None:
    """Writes the language model in `dtype`, and tower and connector in the model's precision."""
    language: Any = model.llm.model
    rows = model.llm.vocabulary
    name = FAMILIES[language.config.model_type]
    describe = partial(describe_decoder, text=language.config, processor=model.processor, rows=rows)
    write_gguf(files.language, name, describe, decoder_tensors(language), dtype)
    write_mmproj(files.mmproj, model, model.config.precision)


# --- verification ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """How the files' logits and greedy text compare with the model's, and where llama.cpp deviates.

    `difference` is to the model. `allowed` limits the difference to the weights as stored, which
    q8_0 rounds: there `difference` is larger than `allowed`.
    """

    difference: float
    same_text: bool
    notes: list[str]
    allowed: float


def verify_gguf(
    files: Files, model: VisionLanguageNetwork, expected: Expected, dtype: str
) -> Verified:
    """Compares the files with the model: token ids, logits, and greedy text.

    The language model is opened by transformers, the mmproj file computed as llama.cpp does, and
    the tokenizer built from the file's metadata. Raises `ModelError` if anything differs from the
    model as stored, which q8_0 rounds.
    """
    stored = expected
    if dtype == "q8_0":
        for parameter in model.llm.model.parameters():
            parameter.data = as_stored("", parameter.data, dtype).to(parameter.device)
        cast_parameters(model, torch.float32)
        logits, texts = observe(model, expected.rows)
        stored = replace(expected, logits=logits.view_as(expected.logits), texts=texts)
    theirs, fields = _opened(files.language)
    activation = projector_of(model.config).vision(model.tower)[0].hidden_act
    trained = Mmproj(files.mmproj, exact=activation)
    _check_texts(fields, trained, model, expected.rows)
    reader = Reader(theirs.to(model.device), fields, model)
    approximate = Mmproj(files.mmproj)
    file_logits = reader.logits(expected.rows, trained)
    texts = reader.texts(expected.rows, trained)
    allowed = EXACT * max(1.0, float(stored.logits.abs().max()))
    check_answers(stored, file_logits, texts, allowed)
    moved = largest_difference(reader.logits(expected.rows, approximate), file_logits)
    notes = notes_of(model) + applying(
        (
            moved,
            "llama.cpp computes GELU in its tanh form, which moves this model's logits by up to "
            f"{moved:.2g}",
        )
    )
    return Verified(
        largest_difference(file_logits, expected.logits), texts == expected.texts, notes, allowed
    )


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """The language model as transformers reads it from a GGUF file, and the file's metadata.

    Raises `ModelError` for tensors that are missing or misshapen.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = read_fields(path)
    name = path.name
    config = AutoConfig.from_pretrained(path.parent, gguf_file=name)
    # transformers reads the head width for some architectures only.
    config.head_dim = fields[f"{fields['general.architecture']}.attention.key_length"]
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads
            if config.num_hidden_layers == 62
            else config.head_dim
        )
    with redirect_stderr(StringIO()):  # the progress bar can't be switched off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
        )
    theirs, info = loaded
    check_loading(info, "nothing was written: the exported weights do not fit")
    factors = read_tensors(path, only=ROPE_FACTORS).get(ROPE_FACTORS)
    if factors is not None:
        theirs.base_model.rotary_emb.inv_freq /= factors
    return theirs.eval(), fields


def _check_texts(
    fields: dict[str, Any],
    mmproj: Mmproj,
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
) -> None:
    """Raises `ModelError` if the files' tokenizer, template and frames give other token ids."""
    image_ids = mmproj.projector.image_ids
    tokens = model.processor.spec.tokens_per_image
    tokenizer = read_tokenizer(fields)
    for row in rows:
        turns = [
            {"role": turn.role, "content": [_part(part) for part in turn.parts]}
            for turn in row.messages
        ]
        pieces = tokenizer.apply_chat_template(turns, tokenize=False).split(MARKER)
        file_ids = tokenizer.encode(pieces[0], add_special_tokens=False)
        for media, piece in zip(row.media, pieces[1:], strict=False):
            file_ids += image_ids(tokenizer, mmproj.vision, image_size(media), tokens)
            file_ids += tokenizer.encode(piece, add_special_tokens=False)
        (example,) = model.processor.examples(row)
        ids = (
            torch.from_numpy(example.input_ids)
            .long()
            .masked_fill(torch.from_numpy(example.image_mask), IMAGE_SLOT)
            .tolist()
        )
        check_ids(row, [*ids, int(example.labels[-1])], file_ids[: len(ids) + 1])


def _part(part: str | Media) -> dict[str, str]:
    return {"type": "text", "text": part if isinstance(part, str) else MARKER}


@dataclass(frozen=True)
class Reader:
    """Runs rows through a language model that was read from a GGUF file."""

    theirs: Any
    fields: dict[str, Any]
    model: VisionLanguageNetwork

    @torch.inference_mode()
    def logits(self, rows: Sequence[Conversation], mmproj: Mmproj) -> torch.Tensor:
        """Logits [S, V] of the rows' supervised tokens."""
        logits = []
        for row in rows:
            (example,) = self.model.processor.examples(row)
            supervised = torch.from_numpy(example.labels).to(self.model.device) != IGNORE_INDEX
            logits.append(
                self.theirs(inputs_embeds=self._embeds(example, mmproj))
                .logits[0, supervised]
                .float()
            )
        return torch.cat(logits)

    @torch.inference_mode()
    def texts(self, rows: Sequence[Conversation], mmproj: Mmproj) -> list[str]:
        """Greedy answers to the rows."""
        stops = [
            self.fields[key]
            for kind in ("eos", "eot", "eom")
            if (key := f"tokenizer.ggml.{kind}_token_id") in self.fields
        ]
        pad = self.fields["tokenizer.ggml.padding_token_id"]
        answers = []
        reader = AnswerReader(self.model.processor, ())
        for row in rows:
            embeds = self._embeds(self.model.processor.prompt(row), mmproj)
            ids = self.theirs.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(embeds[..., 0]),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=pad,
            )
            answers.append(reader.answer(ids[0].tolist(), None).text)
        return answers

    def _embeds(self, example: Example, mmproj: Mmproj) -> torch.Tensor:
        ids, mask = (
            torch.from_numpy(one).to(self.model.device)
            for one in (example.input_ids, example.image_mask)
        )
        embeds = self.theirs.get_input_embeddings()(ids.long())
        if example.media:
            pixels = torch.stack([self.model.processor.images(media) for media in example.media])
            embeds[mask] = mmproj.features(pixels).flatten(0, 1).to(embeds.device)
        return embeds[None]


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
