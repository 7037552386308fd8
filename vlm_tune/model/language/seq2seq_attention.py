"""Attention of an encoder-decoder in training, by masks.

Shapes: B rows, L input tokens, T label tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.model.language.masks import additive, same_sample


class Seq2SeqAttention:
    """Attention by the functions of transformers, with masks."""

    def masks(
        self,
        row_mask: torch.Tensor,
        samples: torch.Tensor | None,
        label_samples: torch.Tensor | None,
        targets: int,
        dtype: torch.dtype,
    ) -> tuple[Any, Any, Any]:
        """The masks of the encoder, of the decoder's look at it, and of the decoder itself.

        Args:
            row_mask: bool[B, L], False for padding.
            samples: [B, L], the numbers of the samples of packed rows; None for rows of one sample.
            label_samples: [B, T], those of the labels. Without `samples` these are several answers
                to the one sample of a row.
            targets: T, the number of label tokens.
            dtype: The type of the embeddings.
        """
        causal = None
        if label_samples is not None:
            # Relative positions are differences, so inside a sample they are what they would be
            # without its neighbours.
            shape = targets, targets
            earlier = torch.ones(shape, dtype=torch.bool, device=row_mask.device).tril()
            causal = additive(same_sample(label_samples, label_samples) & earlier, dtype)
        if samples is not None and label_samples is not None:
            return (
                additive(same_sample(samples, samples), dtype),
                additive(same_sample(label_samples, samples), dtype),
                causal,
            )
        mask = row_mask.long()
        if row_mask.device.type == "cuda":
            # transformers looks whether a mask of rows has padding, for which the host would wait.
            mask = additive(row_mask[:, None, None], dtype)
        return mask, mask, causal
