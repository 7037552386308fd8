"""Virtual tokens before an LLM's input: soft prompts (arXiv:2104.08691) and prefixes of keys and values (arXiv:2101.00190).

Shapes: B rows, L tokens, n virtual tokens, E LLM width, H heads of keys and values, D their width.
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

KEY = "prompt_embeddings"
"""The name PEFT gives the values on disk."""


class VirtualTokens(nn.Module):
    """What every row begins with, `values` fp32[n, ...]; `config` is PEFT's."""

    values: nn.Parameter

    def __init__(self, config: Any, values: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.values = nn.Parameter(values.detach().float().clone())

    @property
    def tokens(self) -> int:
        """n, how many virtual tokens there are."""
        return len(self.values)

    def before(self, embeds: torch.Tensor) -> torch.Tensor:
        """The input [B, L, E] with what stands for the virtual tokens before it, where that is part of the input."""
        raise NotImplementedError

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        """transformers' cache with the virtual tokens in it, where they are kept there."""
        raise NotImplementedError


class SoftPrompt(VirtualTokens):
    """Trained embeddings [n, E] before the input."""

    def before(self, embeds: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.values.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], dim=1)

    def cache(self, rows: int, dtype: torch.dtype) -> None:
        return None


class KeyValuePrefix(VirtualTokens):
    """Trained keys and values of every layer's self-attention, [n, layers * 2 * H * D], which all tokens of a decoder attend to.

    An encoder-decoder has them in its decoder, as PEFT does; what is read stays as it is. PEFT's config then counts two
    layers for each of the decoder's (`_laid_out`).
    """

    def before(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        from transformers import DynamicCache

        heads = self.config.num_attention_heads
        values = self.values.to(dtype).view(
            self.tokens, -1, 2, heads, self.config.token_dim // heads
        )
        found = DynamicCache()
        for number, (keys, held) in enumerate(
            values.permute(1, 2, 3, 0, 4)
        ):  # [layers, 2, H, n, D]
            found.update(keys.expand(rows, -1, -1, -1), held.expand(rows, -1, -1, -1), number)
        return found


KINDS: dict[str, type[VirtualTokens]] = {"prompt": SoftPrompt, "prefix": KeyValuePrefix}
"""By the rule's `how`."""


def _laid_out(config: Any, values: torch.Tensor) -> torch.Tensor:
    """Values as PEFT reads them: of an encoder-decoder's prefix with room for cross-attention's, which it drops, after each layer's."""
    if config.peft_type != "PREFIX_TUNING" or config.num_transformer_submodules == 1:
        return values
    own = values.view(len(values), -1, 2 * config.token_dim)
    return torch.stack([own, torch.zeros_like(own)], dim=2).flatten(1)


def _taken_in(config: Any, laid_out: torch.Tensor) -> torch.Tensor:
    """What `_laid_out` was given."""
    if config.peft_type != "PREFIX_TUNING" or config.num_transformer_submodules == 1:
        return laid_out
    return laid_out.view(len(laid_out), -1, 2, 2 * config.token_dim)[:, :, 0].flatten(1)


def write_prompt(config: Any, values: torch.Tensor, folder: Path) -> None:
    """A standard PEFT folder of prompt or prefix tuning."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = deepcopy(config)
    plain.inference_mode = True
    plain.save_pretrained(folder)
    write_safetensors({KEY: _laid_out(config, values)}, folder / "adapter_model.safetensors")


def read_prompt(folder: Path) -> VirtualTokens:
    """The virtual tokens of a PEFT folder. Raises `ModelError` if it holds something else."""
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
    found = {name: list(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise ModelError(
            f"{folder}: the prompt does not fit its config: {found}, expected {expected}"
        )
    return kind(config, _taken_in(config, tensors[KEY]))
