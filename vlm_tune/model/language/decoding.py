"""Settings of decoding, greedy argmax, and the clean-up of a model's generation config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm_tune.errors import ArgumentError
from vlm_tune.quoting import quoted

MOST = 1_000_000
"""The largest number of tokens or beams that is accepted; more is taken for a mistake."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLED = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "transformers_version",
    "_from_model_config",
    "max_length",
    "use_cache",
)
"""Settings of sampling and lengths in a generation config, which do not change answers here."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: greedily, or by beam search with `num_beams` above 1."""

    max_new_tokens: int
    num_beams: int = 1

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        check_count("num_beams", self.num_beams)


def check_count(name: str, value: Any, most: int = MOST) -> None:
    """Raises `ArgumentError` unless a value is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ArgumentError(f"{name} is a whole number from 1 to {most:,}, got {quoted(value)}")


def largest(logits: torch.Tensor, block: int = 256) -> torch.Tensor:
    """The argmax of logits [..., V] over the last dimension, the first one of equals.

    On a CPU it takes the maximum of each block of logits first, as torch's argmax is not vectorized
    there.
    """
    if logits.device.type != "cpu" or logits.shape[-1] <= block:
        return logits.argmax(-1)
    size = logits.shape[-1]
    whole = size // block * block
    tops = logits[..., :whole].unflatten(-1, (-1, block)).amax(-1)
    if whole < size:
        tops = torch.cat([tops, logits[..., whole:].amax(-1, keepdim=True)], -1)
    # Places past the end are clamped to the last one; gathering it again changes no argmax, as the
    # first of equals wins.
    places = (tops.argmax(-1, keepdim=True) * block + torch.arange(block)).clamp(max=size - 1)
    return places.gather(-1, logits.gather(-1, places).argmax(-1, keepdim=True)).squeeze(-1)


def plain_generation(model: Any) -> dict[str, Any]:
    """Removes all but the special ids from a model's generation config.

    Answers, greedy or by beam search, then follow the model's logits alone: they are the same one
    by one, in batches, as branches and exported.

    Returns:
        The removed settings that would have changed answers.
    """
    from transformers import GenerationConfig

    original = getattr(model, "generation_config", None)
    if original is None:
        return {}
    ids = {name: getattr(original, name, None) for name in IDS}
    model.generation_config = GenerationConfig(
        **{name: value for name, value in ids.items() if value is not None}
    )
    changed = original.to_diff_dict().items()
    return {
        name: value
        for name, value in changed
        if name not in (*IDS, *SAMPLED) and value is not None and value is not False
    }
