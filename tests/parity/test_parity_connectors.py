"""Connectors against transformers' modules of their architecture, with tiny weights in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.tiny_models import largest
from vlm_tune.config.connectors import (
    MlpConnector,
    PixelShuffleConnector,
    QFormerConnector,
    ResamplerConnector,
)
from vlm_tune.model.connectors.instruction import Text
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.pretrained.connector_weights import QFORMER_LAYER

QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "encoder_hidden_size": 24,
    "cross_attention_frequency": 2,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}


def stir(module: nn.Module) -> Any:
    """The module in eval mode with every parameter random, norms and biases too.

    A swapped one shows.
    """
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            0.2 if parameter.dim() > 1 else 0.5
        )
    return module.eval()


def as_identity(layer: nn.Linear) -> None:
    layer.weight.data, layer.bias.data = (
        torch.eye(layer.in_features),
        torch.zeros(layer.out_features),
    )


def copy_qformer(ours: Any, theirs: Any, norm: nn.LayerNorm) -> None:
    """Copies a transformers Q-Former.

    What of its weights is left over is none that its output depends on.
    """
    known = theirs.encoder.layer.state_dict()
    tensors = {}
    for name in ours.layers.state_dict():
        place, rest = name.split(".", 1)
        stem, kind = rest.rsplit(".", 1)
        tensors[name] = known.pop(f"{place}.{QFORMER_LAYER[stem]}.{kind}")
    ours.layers.load_state_dict(tensors)
    ours.norm.load_state_dict(norm.state_dict())
    as_identity(ours.project)
    last = len(ours.layers) - 1
    assert all(name.startswith((f"{last}.intermediate.", f"{last}.output.")) for name in known), (
        sorted(known)
    )


def qformer(**changes: Any) -> Any:
    settings = {"queries": 5, "width": 32, "depth": 4, "heads": 4, "every": 2} | changes
    return stir(build_connector(QFormerConnector(kind="qformer", **settings), 24, 32))


@torch.no_grad()
def test_qformer_equals_blip2() -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    theirs = stir(Blip2QFormerModel(Blip2QFormerConfig(**QFORMER)))
    ours = qformer()
    copy_qformer(ours, theirs, theirs.layernorm)
    features = torch.randn(3, 9, 24)
    queries = ours.queries.expand(3, -1, -1)
    expected = theirs(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    assert largest(ours(features), expected) <= 1e-5
    assert largest(ours(features.flip(0)), expected) > 1e-2


@torch.no_grad()
def test_text_conditioned_qformer_equals_instructblip() -> None:
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    theirs = stir(InstructBlipQFormerModel(InstructBlipQFormerConfig(**QFORMER)))
    ours = qformer(text=True, max_text=16)
    copy_qformer(ours, theirs, theirs.embeddings.layernorm)
    as_identity(ours.words)
    ours.positions.weight.data = theirs.embeddings.position_embeddings.weight.data
    features, ids = torch.randn(3, 9, 24), torch.randint(1, 50, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    text = Text(theirs.embeddings.word_embeddings(ids), mask, ids)
    expected = theirs(
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(3, 5, dtype=torch.long), mask.long()], 1),
        query_embeds=ours.queries.expand(3, -1, -1),
        encoder_hidden_states=features,
    ).last_hidden_state[:, :5]
    assert largest(ours(features, text), expected) <= 1e-5
    other = Text(text.embeds, torch.ones_like(mask), ids)
    assert largest(ours(features, other)[0], expected[0]) <= 1e-5
    assert largest(ours(features, other)[1:], expected[1:]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("head_width", [None, 12])
def test_resampler_equals_idefics(head_width: int | None) -> None:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        vision_config={"embed_dim": 32}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    theirs = stir(
        IdeficsPerceiverResampler(
            config, 32, depth=3, n_heads=4, head_dim=head_width or 8, n_latents=6
        )
    )
    ours: Any = build_connector(
        ResamplerConnector(kind="resampler", latents=6, depth=3, heads=4, head_width=head_width),
        32,
        32,
    ).eval()
    ours.latents.data = theirs.latents.data
    ours.norm.load_state_dict(theirs.layer_norm.state_dict())
    as_identity(ours.project)
    for layer, (attention, feed) in zip(ours.layers, theirs.blocks, strict=True):
        layer.context_norm.load_state_dict(attention.context_layer_norm.state_dict())
        layer.latents_norm.load_state_dict(attention.latents_layer_norm.state_dict())
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "output_proj"}
        layer.attention.load_state_dict(
            {f"{name}.weight": getattr(attention, their).weight for name, their in names.items()}
        )
        layer.feed_norm.load_state_dict(feed.ln.state_dict())
        layer.feed.load_state_dict({"0.weight": feed.fc.weight, "2.weight": feed.c_proj.weight})
    features = torch.randn(2, 9, 32)
    assert largest(ours(features), theirs(features)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_equals_idefics3(factor: int) -> None:
    from transformers import Idefics3Config, SmolVLMConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    ours: Any = build_connector(
        PixelShuffleConnector(kind="pixel_shuffle", factor=factor, depth=1), 8, 12
    ).eval()
    features = torch.randn(2, 36, 8)
    assert ours.tokens(36) == 36 // factor**2
    for config, kind in ((Idefics3Config, Idefics3Connector), (SmolVLMConfig, SmolVLMConnector)):
        settings = config(scale_factor=factor)
        settings.vision_config.hidden_size, settings.text_config.hidden_size = 8, 12
        theirs = stir(kind(settings))
        ours.layers[0].weight.data, ours.layers[0].bias.data = (
            theirs.modality_projection.proj.weight.data,
            torch.zeros(12),
        )
        assert largest(ours(features), theirs(features)) <= 1e-5


@torch.no_grad()
def test_pixel_shuffle_with_a_norm_equals_internvl() -> None:
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import (
        InternVLModel,
        InternVLMultiModalProjector,
    )

    settings = InternVLConfig(downsample_ratio=0.5)
    settings.vision_config.hidden_size, settings.text_config.hidden_size = 8, 12
    theirs = stir(InternVLMultiModalProjector(settings))
    ours: Any = build_connector(
        PixelShuffleConnector(kind="pixel_shuffle", norm=True), 8, 12
    ).eval()
    ours.norm.load_state_dict(theirs.layer_norm.state_dict())
    ours.layers[0].load_state_dict(theirs.linear_1.state_dict())
    ours.layers[2].load_state_dict(theirs.linear_2.state_dict())
    features = torch.randn(2, 36, 8)
    shuffled = InternVLModel.pixel_shuffle(
        None,  # type: ignore[arg-type]
        features.unflatten(1, (6, 6)),
        scale_factor=0.5,
    )
    assert largest(ours(features), theirs(shuffled.flatten(1, 2))) <= 1e-5


@torch.no_grad()
def test_mlp_equals_llava() -> None:
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    settings = LlavaConfig()
    settings.vision_config.hidden_size, settings.text_config.hidden_size = 8, 12
    theirs = stir(LlavaMultiModalProjector(settings))
    ours: Any = build_connector(MlpConnector(kind="mlp"), 8, 12).eval()
    ours.layers[0].load_state_dict(theirs.linear_1.state_dict())
    ours.layers[2].load_state_dict(theirs.linear_2.state_dict())
    features = torch.randn(2, 9, 8)
    assert largest(ours(features), theirs(features)) <= 1e-5
