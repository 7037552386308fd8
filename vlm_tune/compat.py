"""Names that other libraries changed from one version to the next; the rest of the package asks here."""

from __future__ import annotations

from dataclasses import fields
from functools import cache


@cache
def cache_name() -> str:
    """transformers' name of the KV cache, as an argument and in outputs: `cache` from 5.24 on, `past_key_values` before."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
