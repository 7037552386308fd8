"""transformers' layouts of BLIP-2 and InstructBLIP: which models fit, and a model's weights in one.

Their LLM is a decoder or an encoder-decoder, whole and as it is. Shapes: Q queries, W the
Q-Former's width.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlm_tune.config.connectors import QFormerConnector
from vlm_tune.config.towers import Tower, TransformersTower
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.chat.template import Piece
from vlm_tune.data.types import Conversation
from vlm_tune.exporting.hf_layout import IMAGE_TOKEN, Target, Weights, vision_of, written_tokenizer
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.model.families.blip import DECODERS, ENCODER_DECODERS, QFORMER_LAYER
from vlm_tune.model.pretrained.connector_weights import QFORMER_STEM
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

VISION_TYPES = {"Blip2": "blip_2_vision_model", "InstructBlip": "instructblip_vision_model"}
"""transformers' types of the towers, by the beginning of the names of its classes."""
NAMES = {"Blip2": "BLIP-2", "InstructBlip": "InstructBLIP"}
EXAMPLE = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{folder}"
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
inputs = processor(
    images=Image.open("image.png"), text="What does the image show?", return_tensors="pt"
)
generated = model.generate(**inputs, max_new_tokens=64)
start = 1 if model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
print(processor.decode(generated[0, start:], skip_special_tokens=True))
"""


def _reasons(stem: str, config: VisionLanguageConfig, text: Any) -> list[str]:
    tower = config.model.tower
    assert isinstance(tower, Tower)  # by `target_of`
    connector = config.model.connector
    vision = config.tower_rebuild.get("vision_config", {}).get("model_type")
    reads = stem == "InstructBlip"
    fits = isinstance(connector, QFormerConnector) and not connector.norm
    same_text = isinstance(connector, QFormerConnector) and (
        (connector.text, connector.vocab_size is not None) == (reads, reads)
    )
    known = ENCODER_DECODERS if text is None else DECODERS.values()
    return [
        *applying(
            (
                not isinstance(tower, TransformersTower)
                or vision != VISION_TYPES[stem]
                or not (tower.final_norm and tower.class_token),
                f"its tower is no {NAMES[stem]}'s with its last norm on the features and its "
                "class token (model.tower.final_norm, class_token)",
            ),
            (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
            (
                bool(tower.tiles) or tower.split is not None or tower.resize != "squash",
                "its images are not squashed to one square (model.tower.resize, tiles and split)",
            ),
            (not fits, "its connector is no Q-Former without a norm (model.connector)"),
            (
                fits and not same_text,
                "its Q-Former reads the question with embeddings of its own, and BLIP-2's does not"
                if not reads
                else "its Q-Former has no embeddings for the question, and InstructBLIP's has",
            ),
            (
                config.template.get("name") not in known,
                f"its chat format is none of {NAMES[stem]}'s, {' and '.join(sorted(known))} "
                "(data.template)",
            ),
        ),
        *bidirectional_reasons(config),
    ]


# --- the processor --------------------------------------------------------------------------------


def _processor(stem: str, model: VisionLanguageNetwork) -> Any:
    """A processor whose tokenizer's chat template writes the text that the processor takes.

    The processor itself adds images and special tokens.
    """
    import transformers

    tokenizer = written_tokenizer(model)
    # The processor leaves the start token, and an encoder's end token, to the tokenizer.
    original: Any = model.processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = original.backend_tokenizer.post_processor
    ours = model.processor.template
    texts = ours.model_copy(update={"start": [], "user": [Piece(content="words")]})
    tokenizer.chat_template = processor_jinja(texts, model.processor.system, IMAGE_TOKEN)
    tower, _ = vision_of(model)
    images = transformers.BlipImageProcessor(
        size={"height": tower.image_size, "width": tower.image_size},
        image_mean=list(tower.mean),
        image_std=list(tower.std),
    )
    connector: Any = model.connector
    words = {"qformer_tokenizer": connector.reader.tokenizer} if connector.reader else {}
    return getattr(transformers, f"{stem}Processor")(
        images, tokenizer, num_query_tokens=len(connector.queries), **words
    )


def _inputs(processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    """A processor's inputs of messages: of each image its own, and the question with it.

    The processor takes one image a text; the model takes several.
    """
    answered = messages[-1]["role"] == "assistant"
    write = functools.partial(processor.tokenizer.apply_chat_template, tokenize=False)
    text = write(messages)
    images = [
        part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"
    ]
    shown = [processor(images=image, text=text, return_tensors="pt") for image in images]
    inputs = shown[0]
    slots = inputs["input_ids"][:, : processor.num_query_tokens]
    inputs["input_ids"] = torch.cat([*[slots] * (len(images) - 1), inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in shown])
    if "qformer_input_ids" in inputs:
        prompt = write(messages[:-1] if answered else messages)
        question = processor(text=prompt, return_tensors="pt")
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[name] = question[name].expand(len(images), -1)
    return inputs


def _comparable(row: Conversation) -> Conversation | None:
    """A row's first question and answer, if they have an image: the model takes no text alone."""
    roles = [message.role for message in row.messages]
    if "assistant" not in roles:
        return None
    answer = roles.index("assistant")
    cut = replace(row, messages=row.messages[: answer + 1])
    return cut if cut.media and row.messages[answer].trained else None


# --- the model ------------------------------------------------------------------------------------


def _model(
    stem: str, model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    import transformers

    language: Any = model.llm.model
    section = model.config.model.connector
    assert isinstance(section, QFormerConnector)
    vision_config, vision = _vision(model.tower)
    text_config = copy.deepcopy(language.config)
    # The LLM generates inside the whole model, by its own settings.
    text_config.eos_token_id = model.processor.stop_ids
    settings: dict[str, Any] = {"vocab_size": section.vocab_size} if section.text else {}
    former = getattr(transformers, f"{stem}QFormerConfig")(
        hidden_size=section.width,
        num_hidden_layers=section.depth,
        num_attention_heads=section.heads,
        intermediate_size=4 * section.width,
        max_position_embeddings=section.max_text,
        cross_attention_frequency=section.every,
        encoder_hidden_size=vision_config.hidden_size,
        **settings,
    )
    config = getattr(transformers, f"{stem}Config")(
        vision_config=vision_config,
        qformer_config=former,
        text_config=text_config,
        num_query_tokens=section.queries,
        image_token_index=image_token,
        dtype=dtype,
    )
    with torch.device("meta"):
        written = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    shapes = {key: value.shape for key, value in written.state_dict().items()}
    weights = {
        **{f"vision_model.{key}": value for key, value in vision.items()},
        **_connector(model.connector.state_dict(), shapes),
        **{f"language_model.{key}": value for key, value in language.state_dict().items()},
    }
    return written, {"model": (written, weights)}


def _vision(tower: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The config and the tensors of a BLIP tower with its last norm."""
    config = copy.deepcopy(tower.model.config)
    state = dict(tower.model.state_dict())
    if tower.options:
        # Positions for another image size are interpolated here once, instead of in every forward.
        embeddings = tower.model.embeddings
        side = tower.side * config.patch_size
        shape = (1, tower.side**2 + 1, config.hidden_size)
        with torch.no_grad():
            state["embeddings.position_embedding"] = embeddings.interpolate_pos_encoding(
                torch.empty(shape, device=embeddings.position_embedding.device), side, side
            )
    config.image_size = tower.image_size
    config.num_hidden_layers = len(tower.model.encoder.layers)
    norm = {f"post_layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    return config, {**state, **norm}


def _connector(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """A Q-Former's tensors by transformers' names, of which `shapes` has all.

    What InstructBLIP's last layer makes of the text is read by nobody, and zero.
    """
    named = {_name(key, shapes): value for key, value in state.items()}
    named["query_tokens"] = named["query_tokens"][None]
    unread = {
        key: torch.zeros(shape)
        for key, shape in shapes.items()
        if key.startswith("qformer.") and key not in named
    }
    return {**unread, **named}


def _name(key: str, shapes: Mapping[str, torch.Size]) -> str:
    """transformers' name of a Q-Former's tensor."""
    stem, _, kind = key.rpartition(".")
    if key == "queries":
        return "query_tokens"
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    if layer:
        return f"qformer.encoder.layer.{layer[1]}.{QFORMER_LAYER[layer[2]]}.{kind}"
    names = [f"{theirs}.{kind}" for theirs, ours in QFORMER_STEM.items() if ours == stem]
    return next(name for name in names if name in shapes)


def _target(stem: str) -> Target:
    return Target(
        NAMES[stem],
        functools.partial(_reasons, stem),
        functools.partial(_processor, stem),
        functools.partial(_model, stem),
        inputs=_inputs,
        comparable=_comparable,
        example=EXAMPLE,
    )


BLIP2 = _target("Blip2")
INSTRUCTBLIP = _target("InstructBlip")
