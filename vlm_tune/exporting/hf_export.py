"""Export to a folder of one of transformers' own models, verified with plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_tune.compat import cap_logits
from vlm_tune.config.model import NativeSection
from vlm_tune.config.towers import Tower
from vlm_tune.data.images.decode import decode_image, encoded_bytes
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media
from vlm_tune.errors import ModelError
from vlm_tune.exporting.blip_layout import BLIP2, INSTRUCTBLIP
from vlm_tune.exporting.card import described_parts, model_card
from vlm_tune.exporting.gemma3_layout import GEMMA3
from vlm_tune.exporting.hf_layout import Target, vision_of, written_model
from vlm_tune.exporting.idefics3_layout import IDEFICS3, SMOLVLM
from vlm_tune.exporting.internvl_layout import INTERNVL
from vlm_tune.exporting.llava_layout import LLAVA
from vlm_tune.exporting.llava_next_layout import LLAVA_NEXT
from vlm_tune.exporting.llava_onevision_layout import LLAVA_ONEVISION
from vlm_tune.exporting.merge import check_output
from vlm_tune.exporting.mistral3_layout import MISTRAL3, PIXTRAL
from vlm_tune.exporting.paligemma_layout import PALIGEMMA
from vlm_tune.exporting.source import (
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
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.checkpoint import find_single
from vlm_tune.model.hub import config_source
from vlm_tune.model.pretrained.tokenizer import pin_tokenizer
from vlm_tune.model.restoring import read_config
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters, check_loading
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import quoted, reason_of
from vlm_tune.version import __version__

PIXEL = 1e-3
"""Allowed difference of normalised pixels; one level of 255 is more than ten times that."""


TARGETS = {
    "blip_2_vision_model": BLIP2,
    "instructblip_vision_model": INSTRUCTBLIP,
    "idefics3_vision": IDEFICS3,
    "smolvlm_vision": SMOLVLM,
    "internvl_vision": INTERNVL,
    "pixtral": PIXTRAL,
}
"""The layouts of models that have one of their own, by transformers' type of their tower."""

TARGETS_BY_SPLIT = {
    "gemma3": GEMMA3,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
}
"""The layouts of models whose tower is another family's too, by how they cut images."""

TARGETS_BY_CONNECTOR = {"patch_merger": MISTRAL3}
"""The layouts of models whose connector no other has."""


def target_of(config: VisionLanguageConfig) -> Target:
    """The layout that a model is written in: that of one of its parts, or LLaVA's."""
    tower = config.model.tower
    if not isinstance(tower, Tower):
        return LLAVA
    if config.llm.bidirectional == "prompt":
        return PALIGEMMA
    if tower.split and tower.split.kind in TARGETS_BY_SPLIT:
        return TARGETS_BY_SPLIT[tower.split.kind]
    if config.model.connector.kind in TARGETS_BY_CONNECTOR:
        return TARGETS_BY_CONNECTOR[config.model.connector.kind]
    return TARGETS.get(config.tower_rebuild.get("vision_config", {}).get("model_type"), LLAVA)


def transformers_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    """The reasons why no layout of transformers can express a model, from configs alone.

    `text` is the LLM's transformers config, None for an encoder-decoder.
    """
    if isinstance(config.model, NativeSection):
        return []
    return target_of(config).reasons(config, text)


def _check_target(target: Target, config: VisionLanguageConfig, text: Any) -> None:
    reasons = target.reasons(config, text)
    if reasons:
        raise ModelError(
            f"this model can't be exported as {target.name}: {'; '.join(reasons)}. "
            "`vlm-tune merge` writes a self-contained folder"
        )


def export_transformers(
    path: Path, output: Path, dtype: str | None, max_shard_size: str, verify: bool, base: BaseChoice
) -> ExportReport:
    """Writes a model of transformers with processor, card and report; see `export`."""
    source = find_single(path)
    config = read_config(source, base)
    check_prompt(source)
    text = text_config(source, config)
    target = target_of(config)
    _check_target(target, config, text if config.llm.kind == "causal" else None)
    check_output(output, path)
    parameters = count_parameters(text, config)
    # The model is merged and compared in fp32.
    check_room(parameters, output, DTYPES[dtype or config.precision].itemsize, copies=1)
    model, merged = whole_model(path, source, output, dtype, base)
    dtype = model.config.precision
    expected = expected_of(path, model, target.comparable) if verify else None
    cast_parameters(model, DTYPES[dtype])

    def write(folder: Path) -> tuple[ExportReport, str]:
        processor = target.processor(model)
        image_token = processor.tokenizer.convert_tokens_to_ids(target.image_token)
        written_model(target, model, image_token, DTYPES[dtype]).save_pretrained(
            folder, max_shard_size=max_shard_size
        )
        processor.save_pretrained(folder)
        pin_tokenizer(folder)
        report = ExportReport(str(output), "transformers", dtype, merged, parameters, None, None)
        if expected is not None:
            allowed = expected.tolerance(dtype)
            difference, same = verify_transformers(folder, model, expected, allowed)
            report = replace(
                report,
                difference=difference,
                same_text=same,
                rows=len(expected.rows),
                allowed=allowed,
            )
        return report, transformers_card(path, model, report, target)

    return commit_export(output, write)


def verify_transformers(
    folder: Path, model: VisionLanguageNetwork, expected: Expected, tolerance: float
) -> tuple[float, bool]:
    """Compares an exported folder with the model.

    The folder is opened by transformers' own classes, which compute in fp32.

    Returns:
        The largest difference of logits, and True: the greedy text is the same.

    Raises:
        ModelError: token ids, pixels, logits or greedy text differ.
    """
    from transformers import AutoModelForImageTextToText

    opened: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **exact_attention(str(folder))
    )
    theirs, info = opened
    check_loading(info, "nothing was written: the exported weights do not fit")
    return compared(theirs.eval(), folder, model, expected, tolerance), True


def exact_attention(name: str) -> dict[str, str]:
    """transformers' option for attention that caps its scores, where a model's config says so.

    sdpa, its default, leaves the cap out.
    """
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(config_source(name)).get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def compared(
    theirs: Any, folder: Path, model: VisionLanguageNetwork, expected: Expected, tolerance: float
) -> float:
    """The largest difference of logits of transformers' model `theirs` from the model's.

    `folder` has its processor. Raises `ModelError` as `verify_transformers`.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    theirs = theirs.to(model.device)
    cap_logits(theirs)
    processor: Any = AutoProcessor.from_pretrained(folder)
    # Pillow resizes as our own preprocessing does. torchvision, which transformers prefers, is off
    # by a level or two.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    logits = []
    texts = []
    for row in expected.rows:
        try:
            logits.append(_their_logits(theirs, processor, model, row))
            texts.append(_their_answer(theirs, processor, model, row))
        except (RuntimeError, ValueError) as error:
            # Mistral 3's own forward pass fails on a single image of one token, for one.
            raise ModelError(
                f"transformers' own model fails on the row {quoted(row.id)}, which the export is "
                f"compared by: {reason_of(error)}; --no-verify leaves the comparison out"
            ) from None
    exported = torch.cat(logits)[:, : expected.logits.shape[1]] * _own_scale(model)
    return check_answers(expected, exported, texts, tolerance)


def _own_scale(model: VisionLanguageNetwork) -> float:
    """The factor from the logits of the model's layout to those of the LLM's own class."""
    language: Any = model.llm.model
    scaled = language.config.model_type in target_of(model.config).scaled
    return (model.llm.rule.scale or 1.0) if scaled and model.llm.rule else 1.0


def messages_of(
    model: VisionLanguageNetwork, row: Conversation, *, prompt: bool = False
) -> list[dict[str, Any]]:
    """A conversation in the form that a model's exported processor takes, with decoded images."""
    reasoning = model.processor.template.reasoning

    def part(one: str | Media) -> dict[str, Any]:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        return {"type": "image", "image": decode_image(encoded_bytes(one), one.name)}

    turns = row.messages[:-1] if prompt and row.messages[-1].role == "assistant" else row.messages
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [part(one) for one in turn.parts]} for turn in turns
    ]
    for message, turn in zip(messages, turns, strict=True):
        if reasoning is not None and turn.reasoning:
            message[reasoning.name] = turn.reasoning
    return messages


def their_inputs(
    processor: Any, model: VisionLanguageNetwork, messages: list[dict[str, Any]], *, prompt: bool
) -> Any:
    """The arguments of a forward pass that an exported processor makes of messages."""
    make = target_of(model.config).inputs
    if make is not None:
        return make(processor, messages).to(model.device)
    return processor.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)


@torch.inference_mode()
def _their_logits(
    theirs: Any, processor: Any, model: VisionLanguageNetwork, row: Conversation
) -> torch.Tensor:
    """The export's logits [S, V] at a row's supervised positions.

    Raises `ModelError` if the export's processor gives other token ids or pixels than the model's.
    """
    image_token = theirs.config.image_token_id
    (example,) = model.processor.examples(row)
    # The answer of an encoder-decoder is none of its input.
    apart = model.llm.layout == "seq2seq"
    inputs = their_inputs(processor, model, messages_of(model, row, prompt=apart), prompt=False)
    ids = (
        torch.from_numpy(example.input_ids)
        .long()
        .masked_fill(torch.from_numpy(example.image_mask), image_token)
        .tolist()
    )
    ended = [] if apart else [int(example.labels[-1])]
    check_ids(row, [*ids, *ended], inputs["input_ids"][0, : len(ids) + 1].tolist())
    if example.media:
        _check_pixels(inputs["pixel_values"], model, example)
    if apart:
        labels = torch.from_numpy(example.labels).long().to(model.device)
        return theirs(**inputs, labels=labels[None]).logits[0].float()
    return (
        theirs(**inputs)
        .logits[0, : len(ids)]
        .float()[torch.from_numpy(example.labels).to(model.device) != IGNORE_INDEX]
    )


@torch.inference_mode()
def _their_answer(
    theirs: Any, processor: Any, model: VisionLanguageNetwork, row: Conversation
) -> str:
    inputs = their_inputs(processor, model, messages_of(model, row, prompt=True), prompt=True)
    # An encoder-decoder's answer begins with its start token.
    start = 1 if model.llm.layout == "seq2seq" else inputs["input_ids"].shape[1]
    ids = theirs.generate(**inputs, max_new_tokens=16)[0, start:]
    return AnswerReader(model.processor, ()).answer(ids.tolist(), None).text


def _check_pixels(exported: torch.Tensor, model: VisionLanguageNetwork, example: Example) -> None:
    """Raises `ModelError` if an exported processor's pixels [..., 3, H, W] are not the tower's.

    They are those of an example's images, or of the tiles that these are cut in.
    """
    tower, images = vision_of(model)
    frames = exported.flatten(0, -4)
    # The processors of LLaVA-NeXT and OneVision pad images of fewer tiles with frames of zeros.
    frames = frames[frames.flatten(1).any(1)]
    shown = [images(frame).to(model.device) for frame in example.media]
    # Pixtral's processor pads images of several shapes with zeros, below and at the right.
    largest = [max(sides) for sides in zip(*(one.shape for one in shown), strict=True)]
    trained = frames.new_zeros(len(shown), *largest)
    for padded, one in zip(trained, shown, strict=True):
        height, width = one.shape[1:]
        padded[:, :height, :width] = (one.float() * tower.scale - tower.offset)[0]
    if trained.shape != frames.shape or float((trained - frames).abs().max()) > PIXEL:
        names = ", ".join(dict.fromkeys(frame.name for frame in example.media))
        raise ModelError(
            f"the exported image processor gives other pixels for {names} than the model "
            "was trained with; nothing was written"
        )


EXAMPLE = """
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{folder}"
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
content = [
    {{"type": "image", "path": "image.png"}},
    {{"type": "text", "text": "What does the image show?"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
generated = model.generate(**inputs, max_new_tokens=64)
answer = generated[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""


def transformers_card(
    path: Path, model: VisionLanguageNetwork, report: ExportReport, target: Target
) -> str:
    """The README of an exported folder."""
    tower, connector, language = described_parts(model.config.model)
    verified = (
        "not verified"
        if report.difference is None
        else f"logits within {report.difference:.2g} of the model's, same greedy text"
    )
    return model_card(
        {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "base_model": model.config.model.llm.name,
        },
        f"A {target.name} written by vlm_tune {__version__}.",
        [
            f"tower: {tower}",
            f"connector: {connector}",
            f"language model: {language}",
            f"merged adapters: {', '.join(report.merged) or 'none'}",
            f"{report.parameters:,} parameters in {report.dtype}; {verified}",
        ],
        ("python", (target.example or EXAMPLE).format(folder=report.output)),
        path,
    )
