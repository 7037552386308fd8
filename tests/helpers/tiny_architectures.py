"""Every language model that transformers can build, tiny.

Whatever scales, caps or shifts its logits is set off neutral.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy

from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.model.language.registry import LLMS

Layout = Literal["causal", "seq2seq"]
VOCABULARY = 96
SIZES = {
    r"vocab_size|n_vocab|.*_vocab_size": VOCABULARY,
    r"hidden_size|d_model|n_embd|embedding_size|embed_dim|dim|n_embed|embed_size|"
    r"decoder_hidden_size|attention_hidden_size|lru_width"
    r"|pooler_hidden_size|output_embedding_size|input_embedding_size|dim_model|model_dim|"
    r"embedding_dim": 32,
    r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|"
    r"num_encoder_layers|num_decoder_layers|num_blocks": 2,
    r"num_attention_heads|n_heads?|num_heads|encoder_attention_heads|"
    r"decoder_attention_heads|num_encoder_attention_heads"
    r"|num_decoder_attention_heads|attention_heads": 4,
    r"num_key_value_heads|n_kv_heads|kv_n_heads|num_kv_heads": 2,
    r"intermediate_size|d_ff|ffn_dim|n_inner|ffn_hidden_size|encoder_ffn_dim|"
    r"decoder_ffn_dim|dim_ff|dff|d_inner|.*_ffn_dim|hidden_dim"
    r"|intermediate_dim|.*_intermediate_size|.*ffn_hidden_size|.*intermediate_dim": 48,
    r"head_dim|d_kv|kv_channels|attention_head_dim|.*_head_dim|d_head|dim_head": 8,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|"
    r"seq_length|max_encoder_position_embeddings"
    r"|max_decoder_position_embeddings|max_source_positions|max_target_positions|"
    r"model_max_length": 64,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|"
    r"n_experts": 4,
    r"num_experts_per_tok|num_experts_per_token|moe_k|top_k_experts|num_selected_experts|"
    r"moe_topk|experts_per_token": 2,
    r"n_group|topk_group|num_expert_groups|n_groups": 1,
    r"q_lora_rank|kv_lora_rank": 16,
    r"rotary_dim": 4,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_d_ssm": 64,
    r"mamba_d_head|mamba_d_state|state_size|mamba_d_state|ssm_state_size|"
    r"hidden_size_per_layer_input": 8,
    r"mamba_chunk_size|chunk_size": 16,
    r"vocab_size_per_layer_input": VOCABULARY,
}
OFF_NEUTRAL = re.compile(
    r"(scal(e|ing)(_factor)?|multiplier|cap(ping)?|alpha|logits?_bias|temperature)s?$|logit"
)
"""Such settings get an odd value, so that leaving one out makes a difference.
"""
ODD = 0.37
IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_bos_token_id": None,
}


def shrunk(config: Any) -> dict[str, Any]:
    """The arguments that make a config of the same class tiny."""
    changes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
        if size is not None and value > size:
            changes[name] = size
    if getattr(config, "kv_lora_rank", None):
        changes["num_key_value_heads"] = 4  # latent attention has no groups of heads
    if getattr(config, "head_dim", 0) is None:
        changes["head_dim"] = 8
    if hasattr(config, "num_kv_shared_layers"):
        changes["num_kv_shared_layers"] = 0
    return changes | layers(config)


def layers(config: Any) -> dict[str, Any]:
    """As many layers as there are kinds of them, at least two, where a config lists kinds."""
    kinds = config.to_dict().get("layer_types")
    if not kinds:
        return {}
    kinds = list(dict.fromkeys(kinds))
    return {
        "layer_types": (kinds * 2)[: max(len(kinds), 2)],
        "num_hidden_layers": max(len(kinds), 2),
    }


def tiny_config(kind: type[Any], layout: Layout) -> Any:
    """A tiny config of a class, its parts tiny too, with odd scales, caps and multipliers."""
    plain = kind()
    decoder = {"is_decoder": True} if layout == "causal" and hasattr(plain, "is_decoder") else {}
    changes = {**shrunk(plain), **IDS, **odd(plain), **decoder, **SPECIAL.get(kind.__name__, {})}
    for name in getattr(plain, "sub_configs", {}):
        part = getattr(plain, name, None)
        if part is not None and hasattr(part, "to_dict"):
            inner = {
                **part.to_dict(),
                **shrunk(part),
                **odd(part),
                **{key: value for key, value in IDS.items() if hasattr(part, key)},
            }
            inner |= SPECIAL.get(type(part).__name__, {})
            # What is counted by layers is made anew for two of them.
            changes[name] = {
                key: value
                for key, value in inner.items()
                if not isinstance(value, list) or key == "layer_types"
            }
    try:
        return kind(**changes)
    except StrictDataclassError:  # a setting of this kind that counts something
        whole = {
            name: value
            for name, value in plain.to_dict().items()
            if isinstance(value, int) and name in odd(plain)
        }
        if not whole:
            raise
        return kind(**changes | whole)


def odd(config: Any) -> dict[str, float]:
    """The settings that scale, cap or multiply, each at an odd value."""
    settings: dict[str, float] = {}
    for name, value in config.to_dict().items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            OFF_NEUTRAL.search(name)
            and (number or (value is None and "logit" in name))
            and name not in KEPT
        ):
            settings[name] = ODD
    return settings


DECODERS = (
    "Bart BigBirdPegasus Blenderbot BlenderbotSmall Marian MBart Mvp Pegasus PLBart TrOCR Whisper"
)
UNSHIFTED = {"XLMWithLMHeadModel", *(f"{name}ForCausalLM" for name in DECODERS.split())}
"""Decoders of encoder-decoders, whose own loss takes labels that are shifted already."""
NO_LOSS = {"GitForCausalLM", "ModernBertDecoderForCausalLM"}
"""Models whose own loss of text alone raises: it is computed of their logits."""
KEPT = {"num_logits_to_keep", "router_aux_loss_coef", "logits_to_keep", "output_router_logits"}
SPECIAL: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Mamba2Config": {"num_heads": 8},
    "XmodConfig": {"default_language": "en_XX"},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "XLMConfig": {"n_words": VOCABULARY, "emb_dim": 32, "causal": True},
    "LEDConfig": {"attention_window": [8, 8]},
}
LARGEST = 5_000_000


def tiny(kind: type[Any], model: Any, layout: Layout) -> Any:
    """A tiny model of a config class with random weights, biases and buffers too."""
    config = tiny_config(kind, layout)
    config._attn_implementation = "eager"
    factory = model[0] if isinstance(model, tuple) else model
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in factory(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    network = factory(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in network.named_buffers():
            if "bias" in name and buffer.is_floating_point() and "logits" in name:
                buffer.add_(torch.randn(buffer.shape, generator=generator))
    return network.eval()


@dataclass(frozen=True)
class Compared:
    """Our loss and transformers' own for the same weights and labels, and how far logits differ.

    The difference is relative to the largest.
    """

    ours: float
    theirs: float
    logits: float

    @property
    def same(self) -> bool:
        return (
            abs(self.ours - self.theirs) <= 1e-4 * max(1.0, abs(self.theirs))
            and self.logits <= 1e-4
        )


def mappings() -> list[tuple[Layout, type[Any], Any]]:
    """Every config class that transformers maps to a language model, and its model class.

    Causal and seq2seq ones.
    """
    from transformers.models.auto import modeling_auto

    both: tuple[tuple[Layout, Any], ...] = (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    )
    return [
        (layout, kind, mapping[kind])
        for layout, mapping in both
        for kind in dict.fromkeys(mapping.keys())
    ]


@torch.no_grad()
def compare(layout: Layout, model: Any) -> Compared:
    """Compares the loss of two rows of nine tokens."""
    llm = LLMS[layout](model).eval()
    llm.check()
    ids, targets = (
        torch.randint(10, 90, (2, 9), generator=torch.Generator().manual_seed(seed))
        for seed in (2, 3)
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    if layout == "causal":
        labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], 1)
        labels[:, :3] = IGNORE_INDEX
        given = torch.cat([torch.full((2, 1), IGNORE_INDEX), labels[:, :-1]], 1)
        if type(model).__name__ in UNSHIFTED:
            given = labels
    else:
        labels = given = targets.index_fill(1, torch.tensor([3, 4]), IGNORE_INDEX)
    batch = Batch(
        ["a", "b"], ids, mask, torch.zeros_like(mask), labels, torch.zeros(0, dtype=torch.int64)
    )
    supervised = labels != IGNORE_INDEX
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if type(model).__name__ in NO_LOSS:
        expected = model(**inputs)
        loss = cross_entropy(expected.logits[supervised], labels[supervised])
    else:
        expected = model(**inputs, labels=given)
        loss = expected.loss
    our_loss = llm(llm.embed(ids), batch)
    logits, wanted = (
        llm.supervised_logits(llm.embed(ids), batch),
        expected.logits[supervised].float(),
    )
    return Compared(
        float(our_loss.sum) / our_loss.count,
        float(loss),
        float((logits - wanted).abs().max() / wanted.abs().max()),
    )
