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
BLIP2 = Family("BLIP-2", ("blip2",), LAYOUT, _blip, _language, by_language=DECODERS)
INSTRUCTBLIP = Family("InstructBLIP", ("blip2",), LAYOUT, _blip, _language, by_language=DECODERS)
