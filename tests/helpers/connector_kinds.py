"""A tiny connector of every kind, as a recipe gives it, for a tower of 16 tokens."""

from __future__ import annotations

from collections.abc import Callable

TOWER = (
    "{kind: open_clip, config: {layers: 2, width: 64, head_width: 32, patch_size: 8, "
    "image_size: 32}}"
)
"""Gives 4 x 4 tokens of width 64."""

HOW = ("concat", "attention", "gate", "product", "bilinear")
KINDS = {
    "linear": "{kind: linear, norm: true}",
    "mlp": "{kind: mlp, norm: true}",
    "pixel_shuffle": "{kind: pixel_shuffle, norm: true}",
    "avg_pool": "{kind: avg_pool, grid: 2, norm: true}",
    "gemma3": "{kind: gemma3, grid: 2}",
    "resampler": "{kind: resampler, latents: 3, depth: 2, heads: 4}",
    "qformer": "{kind: qformer, queries: 3, width: 32, depth: 2, heads: 4}",
    "qformer-text": (
        "{kind: qformer, queries: 3, width: 32, depth: 3, heads: 4, text: true, max_text: 64}"
    ),
    **{
        f"fusion-{how}": (
            f"{{kind: fusion, how: {how}, heads: 4, base: {{kind: avg_pool, grid: 2, norm: true}}}}"
        )
        for how in HOW
    },
    "cross_attention": (
        "{kind: cross_attention, every: 1, heads: 4, base: {kind: resampler, latents: 3, "
        "depth: 1, heads: 4}}"
    ),
}
SLOTS = {
    "linear": 16,
    "mlp": 16,
    "pixel_shuffle": 4,
    "avg_pool": 4,
    "gemma3": 4,
    "resampler": 3,
    "qformer": 3,
    "qformer-text": 3,
    "cross_attention": 1,
}
SLOTS |= {f"fusion-{how}": 4 for how in HOW}
READS_TEXT = ("qformer-text", *(f"fusion-{how}" for how in HOW))


def with_connector(recipe: str, kind: str) -> str:
    """A tiny recipe's text with a connector of a kind, and a tower of 16 tokens."""
    new = {"  tower:": f"  tower: {TOWER}", "  connector:": f"  connector: {KINDS[kind]}"}
    return "".join(
        next((text for start, text in new.items() if line.startswith(start)), line) + "\n"
        for line in recipe.splitlines()
    )


Tiny = Callable[..., str]
