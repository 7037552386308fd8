"""The language model behind two small adapters with the same verbs: embed, forward, generate.

Shapes: B rows, L input tokens, T label tokens, E width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlm_tune.data.types import IGNORE_INDEX

HEAD_ROWS = 4096
"""Supervised positions scored at once: bounds the logits' memory."""


@dataclass
class TokenLoss:
    """Cross-entropy summed over supervised tokens (fp32 scalar), and how many there are."""

    sum: torch.Tensor
    count: int


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: greedy, or beams."""

    max_new_tokens: int
    num_beams: int = 1


class LanguageModel(nn.Module):
    """Base of the adapters; `model` is the transformers model, LoRA layers injected in place."""

    layout: Literal["causal", "seq2seq"]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def width(self) -> int:
        """E, the width of the input embeddings."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def head(self) -> nn.Module:
        """The output head."""
        return self.model.get_output_embeddings()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, L, E] of ids [B, L]."""
        return self.model.get_input_embeddings()(input_ids)

    def forward(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
    ) -> TokenLoss:
        """Loss of the supervised labels, given embeds [B, L, E] and attention_mask bool[B, L]."""
        raise NotImplementedError

    def supervised_logits(self, embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """fp32 logits [S, V] of the supervised tokens, in row order."""
        raise NotImplementedError

    def generate(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, decoding: Decoding, pad_id: int, stop_ids: list[int]
    ) -> torch.Tensor:
        """New ids [B, at most max_new_tokens]; decoders want their rows padded on the left."""
        raise NotImplementedError

    def _options(self, decoding: Decoding, pad_id: int, stop_ids: list[int]) -> dict[str, Any]:
        from transformers import GenerationConfig

        start = getattr(self.model.generation_config, "decoder_start_token_id", None)
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=stop_ids,
            decoder_start_token_id=start,
        )
        return {"generation_config": config}


def branch_mask(attention_mask: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """bool[B, 1, L, L]: token i sees token j <= i of the prefix (branch 0) and of its own branch; padding sees itself."""
    length = branches.shape[1]
    order = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    own = branches[:, :, None] == branches[:, None, :]
    prefix = branches[:, None, :] == 0
    seen = order & (own | prefix) & attention_mask[:, None, :]
    return (seen | torch.eye(length, dtype=torch.bool, device=branches.device))[:, None]


class CausalLLM(LanguageModel):
    """A decoder: Llama, Mistral, Qwen, Gemma, SmolLM, GPT-2, ..."""

    layout = "causal"

    def forward(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
    ) -> TokenLoss:
        rows, targets = self._supervised(embeds, attention_mask, labels, positions, branches)
        total = rows.sum() * 0.0
        # At least once: every rank must run the head, or the others would wait for its gradient.
        for start in range(0, max(len(rows), 1), HEAD_ROWS):
            logits = self.logits(rows[start : start + HEAD_ROWS])
            total = total + cross_entropy(logits, targets[start : start + HEAD_ROWS], reduction="sum")
        return TokenLoss(total.float(), len(targets))

    def _supervised(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states [S, E] that predict supervised tokens, and those tokens [S]."""
        mask = attention_mask.long()
        if branches is not None:
            seen = branch_mask(attention_mask, branches)
            mask = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill_(~seen, torch.finfo(embeds.dtype).min)
        hidden = self.model.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        # The only place where labels shift: the token at i is predicted from the hidden state at i - 1.
        supervised = labels[:, 1:] != IGNORE_INDEX
        return hidden[:, :-1][supervised], labels[:, 1:][supervised]

    def supervised_logits(self, embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.logits(self._supervised(embeds, attention_mask, labels)[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32[..., V] of hidden states [..., E], as the transformers model makes them."""
        logits = self.head(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def generate(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, decoding: Decoding, pad_id: int, stop_ids: list[int]
    ) -> torch.Tensor:
        return self.model.generate(inputs_embeds=embeds, attention_mask=attention_mask.long(), **self._options(decoding, pad_id, stop_ids))


class Seq2SeqLLM(LanguageModel):
    """An encoder-decoder: T5, Flan-T5, mT5, UL2."""

    layout = "seq2seq"

    def forward(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
    ) -> TokenLoss:
        targets = labels[labels != IGNORE_INDEX]
        loss = cross_entropy(self.supervised_logits(embeds, attention_mask, labels), targets, reduction="sum")
        return TokenLoss(loss, len(targets))

    def supervised_logits(self, embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        output = self.model(inputs_embeds=embeds, attention_mask=attention_mask.long(), decoder_input_ids=inputs, use_cache=False)
        return output.logits[labels != IGNORE_INDEX].float()

    def generate(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, decoding: Decoding, pad_id: int, stop_ids: list[int]
    ) -> torch.Tensor:
        mask = attention_mask.long()
        encoded = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
        ids = self.model.generate(encoder_outputs=encoded, attention_mask=mask, **self._options(decoding, pad_id, stop_ids))
        return ids[:, 1:]


LLMS: dict[str, type[LanguageModel]] = {"causal": CausalLLM, "seq2seq": Seq2SeqLLM}
