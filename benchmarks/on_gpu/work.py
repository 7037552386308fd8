"""Useful operations of a training step, as MFU counts them.

2 a parameter and token for the forward pass, 2 more for the gradient of the input where a trained
weight lies below, 2 more for the gradient of a trained weight; a frozen tower runs forward alone;
4·h·d_h for each pair of tokens that attention may see (12 with its backward pass); the head only
for supervised tokens. Nothing is counted for what is recomputed, nor for padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.ours import Amount, Formula


def tower_operations(vision: Any, blocks: int) -> float:
    """Operations of a frozen vision transformer's forward pass over one image.

    Args:
        vision: Its config: hidden_size, intermediate_size, image_size, patch_size.
        blocks: How many of its blocks are run.
    """
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = patches + 1  # the class token
    d = vision.hidden_size
    weights = 4 * d * d + 2 * d * vision.intermediate_size
    patch_embedding = 2.0 * patches * 3 * vision.patch_size**2 * d
    return patch_embedding + blocks * (2.0 * tokens * weights + 4.0 * tokens**2 * d)


def projector_operations(tokens: int, read: int, written: int) -> float:
    """Operations of a trained projector of two linear layers over a tower without gradients.

    The first layer passes no gradient on.
    """
    return tokens * (4.0 * read * written + 6.0 * written * written)


@dataclass(frozen=True)
class Useful:
    """The useful work of a model: by its language model's amounts, and by images.

    Attributes:
        language: Of the language model with LoRA.
        image: Operations of tower and connector for one image.
    """

    language: Formula
    image: float

    @classmethod
    def of(cls, text: Any, vision: Any, *, blocks: int, rank: int, seq2seq: bool = False) -> Useful:
        """From transformers' configs, with LoRA of `rank` on all linear layers.

        `blocks` are the tower's blocks that are run.
        """
        tokens = (vision.image_size // vision.patch_size) ** 2
        width = text.d_model if seq2seq else text.hidden_size
        return cls(
            Formula(text, rank, seq2seq=seq2seq),
            tower_operations(vision, blocks)
            + projector_operations(tokens, vision.hidden_size, width),
        )

    def operations(self, amount: Amount, images: float) -> float:
        """Operations of so much text and so many passes of the tower."""
        return self.language.operations(amount) + self.image * images


def batch_amount(batch: Any, *, seq2seq: bool) -> Amount:
    """The amounts of one of our batches, on any device; padding is not counted."""
    mask = batch.attention_mask.bool().cpu()
    labels = batch.labels.cpu()
    supervised = int((labels != -100).sum())
    lengths = mask.sum(1)
    if not seq2seq:
        if batch.visible_until is None:
            pairs = float((lengths * (lengths + 1) // 2).sum())
        else:
            ends = batch.visible_until.cpu()
            places = mask.long().cumsum(1) - 1
            pairs = float(((ends - places) * mask).sum())
        return Amount(tokens=float(lengths.sum()), read_pairs=pairs, supervised=supervised)
    total = Amount()
    for row in range(len(mask)):
        read = _sample_sizes(mask[row], None if batch.samples is None else batch.samples[row])
        written = _sample_sizes(
            labels[row] != -100,
            None if batch.label_samples is None else batch.label_samples[row],
        )
        for inputs, targets in zip(read, written, strict=True):
            total += Amount(
                inputs,
                targets,
                float(inputs) ** 2,
                targets * (targets + 1) / 2 + targets * inputs,
                targets,
            )
    return total


def _sample_sizes(mask: Any, samples: Any) -> list[int]:
    """The number of tokens of each sample of a row."""
    if samples is None:
        return [int(mask.sum())]
    return samples.cpu()[mask].bincount().tolist()
