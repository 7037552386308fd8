"""BLIP-2 and InstructBLIP: a ViT, a Q-Former and an LLM, a decoder or an encoder-decoder.

InstructBLIP's Q-Former reads the question.
"""

from __future__ import annotations

from typing import Any

from vlm_tune.config.connectors import QFormerConnector
from vlm_tune.config.towers import TransformersTower
from vlm_tune.model.families.base import (
    Family,
    Layout,
    Vlm,
    VlmParts,
    refuse,
    square_images,
    whole_config,
)

QFORMER_TOKENIZER = "qformer_tokenizer"
"""The subfolder of InstructBLIP's second tokenizer."""


def _blip(vlm: Vlm) -> VlmParts:
    """The parts of a BLIP-2 or InstructBLIP; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    former = whole.qformer_config
    text = vlm.family is INSTRUCTBLIP
    expected = {
        "hidden_act": "gelu",
        "intermediate_size": 4 * former.hidden_size,
        "layer_norm_eps": 1e-12,
    }
    expected |= {"use_qformer_text_input": False} if vlm.family is BLIP2 else {}
    for key, value in expected.items():
        if getattr(former, key, value) != value:
            refuse(vlm, f"a Q-Former whose {key} is {getattr(former, key)}", str(value))
    text_options = (
        {
            "tokenizer": vlm.name,
            "vocab_size": former.vocab_size,
            "max_text": former.max_position_embeddings,
        }
        if text
        else {}
    )
    connector = QFormerConnector(
        kind="qformer",
        queries=whole.num_query_tokens,
        width=former.hidden_size,
        depth=former.num_hidden_layers,
        heads=former.num_attention_heads,
        every=former.cross_attention_frequency,
        text=text,
        weights=vlm.name,
        **text_options,
    )
    # transformers' tower includes the norm after the last block; the features of all tokens are
    # used.
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=-1,
        final_norm=True,
        class_token=True,
        **square_images(vlm, whole.vision_config.image_size),
    )
    return tower, connector, "seq2seq" if whole.text_config.is_encoder_decoder else "causal"


def _language(vlm: Vlm) -> Any:
    return whole_config(vlm).text_config


LAYOUT = Layout(
    r"^vision_model\.",
    r"^(?=qformer\.|query_tokens$|language_projection\.)",
    {r"^language_model\.": ""},
)
DECODERS = {"opt": "blip2_opt", "llama": "instructblip"}
"""The chat formats of models over a decoder, by its type."""
ENCODER_DECODERS = ("blip2",)
"""Those of models over an encoder-decoder."""
QFORMER_LAYER = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "cross.query": "crossattention.attention.query",
    "cross.key": "crossattention.attention.key",
    "cross.value": "crossattention.attention.value",
    "cross.out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "feed.0": "intermediate_query.dense",
    "feed.2": "output_query.dense",
    "feed_norm": "output_query.LayerNorm",
    "text_feed.0": "intermediate.dense",
    "text_feed.2": "output.dense",
    "text_norm": "output.LayerNorm",
}
"""The names of a Q-Former layer's modules here, and in transformers."""
LANGUAGE = {
    f"{beginning}.": f"language_model.{beginning}."
    for beginning in ("model", "lm_head", "shared", "encoder", "decoder")
}
AROUND = {
    "connector.project.": "language_projection.",
    "connector.words.": "qformer.embeddings.word_embeddings.",
    "connector.positions.": "qformer.embeddings.position_embeddings.",
}
LAYERS = {
    f"connector.layers.*.{ours}.": f"qformer.encoder.layer.*.{theirs}."
    for ours, theirs in QFORMER_LAYER.items()
}


def _family(name: str, norm: str) -> Family:
    """A family whose whole model has the norm of the Q-Former's input at this name."""
    modules = LANGUAGE | AROUND | LAYERS | {"connector.norm.": norm}
    return Family(name, ENCODER_DECODERS, LAYOUT, _blip, _language, modules, by_language=DECODERS)


BLIP2 = _family("BLIP-2", "qformer.layernorm.")
INSTRUCTBLIP = _family("InstructBLIP", "qformer.embeddings.layernorm.")
