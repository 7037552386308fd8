"""Virtual tokens before an LLM's input: soft prompts and prefixes of keys and values.

Soft prompts are arXiv:2104.08691, prefixes arXiv:2101.00190.

Shapes: B rows, L tokens, n virtual tokens, E LLM width, G key heads, D head width.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.errors import ModelError
from vlm_tune.model.weights import read_safetensors, write_safetensors
from vlm_tune.quoting import reason_of

TOKENS = 20
"""Default number of virtual tokens."""
KEY = "prompt_embeddings"
"""The name of the values in PEFT's files."""


class VirtualTokens(nn.Module):
    """Trained `values` fp32[n, ...] that every row begins with; `config` is PEFT's."""

    values: nn.Parameter

    def __init__(self, config: Any, values: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.values = nn.Parameter(values.detach().float().clone())

    @property
    def tokens(self) -> int:
        """n, the number of virtual tokens."""
        return len(self.values)

    def before(self, embeds: torch.Tensor) -> torch.Tensor:
        """Puts the virtual tokens' embeddings, if they have any, before the input [B, L, E]."""
        raise NotImplementedError

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        """A transformers cache that holds the virtual tokens' keys and values; None for others."""
        raise NotImplementedError


class SoftPrompt(VirtualTokens):
    """Trained embeddings [n, E] before the input."""

    def before(self, embeds: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.values.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], dim=1)

    def cache(self, rows: int, dtype: torch.dtype) -> None:
        return None


class KeyValuePrefix(VirtualTokens):
    """Trained keys and values of every layer's self-attention, [n, layers * 2 * G * D].

    All tokens of a decoder attend to them. An encoder-decoder has them in its decoder, as in PEFT;
    its encoder has none. PEFT's config then counts two layers for each one of the decoder
    (`_laid_out`).
    """

    def before(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        from transformers import DynamicCache

        heads = self.config.num_attention_heads
        values = self.values.to(dtype).view(
            self.tokens, -1, 2, heads, self.config.token_dim // heads
        )
        cache = DynamicCache()
        # [layers, 2, G, n, D]
        for number, (layer_keys, layer_values) in enumerate(values.permute(1, 2, 3, 0, 4)):
            cache.update(
                layer_keys.expand(rows, -1, -1, -1), layer_values.expand(rows, -1, -1, -1), number
            )
        return cache


KINDS: dict[str, type[VirtualTokens]] = {"prompt": SoftPrompt, "prefix": KeyValuePrefix}
"""The classes by the tuning rule's `how`."""


def _laid_out(config: Any, values: torch.Tensor) -> torch.Tensor:
    """The values in PEFT's layout.

    In an encoder-decoder's prefix, each layer's values are followed by zeros for cross-attention,
    which PEFT drops.
    """
    if config.peft_type != "PREFIX_TUNING" or config.num_transformer_submodules == 1:
        return values
    layers = values.view(len(values), -1, 2 * config.token_dim)
    return torch.stack([layers, torch.zeros_like(layers)], dim=2).flatten(1)


def _taken_in(config: Any, laid_out: torch.Tensor) -> torch.Tensor:
    """The inverse of `_laid_out`: values from PEFT's layout."""
    if config.peft_type != "PREFIX_TUNING" or config.num_transformer_submodules == 1:
        return laid_out
    return laid_out.view(len(laid_out), -1, 2, 2 * config.token_dim)[:, :, 0].flatten(1)


def write_prompt(config: Any, values: torch.Tensor, folder: Path) -> None:
    """Writes a standard PEFT folder of prompt or prefix tuning."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = deepcopy(config)
    plain.inference_mode = True
    plain.save_pretrained(folder)
    write_safetensors({KEY: _laid_out(config, values)}, folder / "adapter_model.safetensors")


def read_prompt(folder: Path) -> VirtualTokens:
    """Reads the virtual tokens of a PEFT folder.

    Raises:
        ModelError: The folder is unreadable, or holds something else.
    """
    from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: no prompt ({reason_of(error)})") from None
    kind = SoftPrompt if isinstance(config, PromptTuningConfig) else KeyValuePrefix
    if not isinstance(config, PromptTuningConfig | PrefixTuningConfig):
        raise ModelError(f"{folder}: {config.peft_type} is neither prompt nor prefix tuning")
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    width = config.token_dim * (1 if kind is SoftPrompt else 2 * (config.num_layers or 0))
    expected = {KEY: [config.num_virtual_tokens, width]}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ModelError(
            f"{folder}: the prompt does not fit its config: {shapes}, expected {expected}"
        )
    return kind(config, _taken_in(config, tensors[KEY]))
