"""Decoders."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.data.types import Batch
from vlm_tune.model.language.attention import MaskedAttention
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding, largest
from vlm_tune.model.language.masks import joining_reason, tree_mask
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix

SPARED = 0.8
"""Share of unfinished branches below which the finished ones are dropped from the batch."""


class CausalLLM(LanguageModel):
    """A decoder: Llama, Mistral, Qwen, Gemma, SmolLM, GPT-2, ..."""

    layout = "causal"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.attention = MaskedAttention()

    @property
    def bodies(self) -> list[nn.Module]:
        # Bart's body is a wrapper that calls the decoder inside it.
        inner = self.model.get_decoder()
        return [
            self.body,
            *(
                module
                for module in self.body.modules()
                if module is inner and inner is not self.body
            ),
        ]

    def theirs(self, batch: Batch) -> torch.Tensor:
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
        ).logits

    @property
    def supports_intervals(self) -> bool:
        return self._attention().by_intervals(self.model)

    def _attention(self) -> MaskedAttention:
        """The attention for this model's rows: a prefix of keys and values is in no interval."""
        return MaskedAttention() if isinstance(self.prompt, KeyValuePrefix) else self.attention

    @cached_property
    def unjoined(self) -> str | None:
        return joining_reason(self.model, self.body)

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        length = embeds.shape[1]
        virtual = self.virtual
        positions = batch.positions
        visible_until = batch.visible_until
        cache = None if self.prompt is None else self.prompt.cache(len(embeds), embeds.dtype)
        # In joined rows, each sample's positions start from its own beginning.
        if self.longest is not None:
            self.check_length(virtual + batch.longest)
        embeds, mask = self.prompted(embeds, batch.attention_mask)
        if visible_until is not None:
            self.check_joined()
        if virtual and visible_until is not None:
            # Every sample of a joined row sees the virtual tokens, placed before its own tokens.
            visible_until = pad(
                torch.where(visible_until > 0, visible_until + virtual, 0),
                (virtual, 0),
                value=virtual + length,
            )
        if virtual and positions is not None:
            first = torch.arange(virtual, device=positions.device).expand(len(positions), -1)
            positions = torch.cat([first, positions + virtual], dim=1)
        row_positions = None if positions is None else positions[:, -embeds.shape[1] :]
        visible = self._attention().mask(
            self.model,
            mask,
            visible_until,
            positions,
            embeds.dtype,
            embeds.shape[1],
            joinable=self.unjoined is None,
        )
        if row_positions is None and not (isinstance(visible, torch.Tensor) and visible.dim() == 2):
            # Without positions, OPT would count them in the mask, which is none of 0 and 1.
            seen = mask.shape[1]
            row_positions = torch.arange(seen - embeds.shape[1], seen, device=embeds.device)[None]
        output = self.body(
            inputs_embeds=embeds,
            attention_mask=visible,
            position_ids=row_positions,
            use_cache=False,
            **{cache_name(): cache},
        )
        hidden = output.last_hidden_state[:, -length:].flatten(0, 1)
        return hidden.index_select(0, batch.supervised_at), batch.targets

    def generate(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        decoding: Decoding,
        pad_id: int,
        stop_ids: list[int],
    ) -> torch.Tensor:
        embeds, mask = self.prompted(embeds, attention_mask)
        self.check_length(mask.shape[1])
        options = self._options(self.room(decoding, mask.shape[1]), pad_id, stop_ids)
        if isinstance(self.prompt, KeyValuePrefix):
            # transformers takes the whole input beside a cache, and drops the part that is cached.
            options[cache_name()] = self.prompt.cache(
                len(embeds) * decoding.num_beams, embeds.dtype
            )
            embeds = pad(embeds, (0, 0, self.virtual, 0))
        return self.model.generate(inputs_embeds=embeds, attention_mask=mask.long(), **options)

    def continue_branches(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        leaves: torch.Tensor,
        max_new_tokens: int,
        stop_ids: list[int],
    ) -> torch.Tensor:
        """Continues each branch of rows greedily after its last token, `leaves` int64[B, K].

        The rows, embeds [B, L, E], are prefilled once. Then every branch grows by one token per
        decode step, and sees what its leaf sees and its own new tokens.

        Returns:
            New ids [B, K, N], where N is max_new_tokens, or less if the model has fewer positions.
            Ended answers are filled up with the first of `stop_ids`.
        """
        assert batch.visible_until is not None and batch.positions is not None
        rising = self.rule is not None and self.rule.rising
        self.check_length(int(batch.positions.max()) + 1)
        if self.longest is not None:
            max_new_tokens = min(max_new_tokens, self.longest - int(batch.positions.max()))
        rows = torch.arange(len(leaves), device=embeds.device)[:, None]
        visible = tree_mask(batch.visible_until)[:, 0][rows, leaves]
        positions = batch.positions[rows, leaves]
        prefill = self._attention().prefill(
            self.model, self.body, embeds, batch.visible_until, batch.positions, visible
        )
        hidden = prefill.hidden[rows, leaves]
        stops = torch.tensor(stop_ids, device=embeds.device)
        ended = torch.zeros_like(leaves, dtype=torch.bool)
        answers = stops[0].repeat(*leaves.shape, max_new_tokens)
        places = torch.arange(leaves.shape[1], device=embeds.device).expand_as(leaves)
        for step in range(max_new_tokens):
            # The head's outputs suffice where neither the fp32 cast nor a cap changes their argmax.
            tokens = largest(
                self.head(hidden)
                if rising
                else self.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
            )
            answers[..., step].scatter_(1, places, torch.where(ended, stops[0], tokens))
            ended = ended | torch.isin(tokens, stops)
            unfinished = int((~ended).sum(1).max())
            if unfinished == 0 or step + 1 == max_new_tokens:
                break
            positions = positions + 1
            if unfinished < SPARED * ended.shape[1]:
                order = ended.int().argsort(dim=1, stable=True)[:, :unfinished]
                prefill.select(order)
                places, tokens, ended, positions = (
                    each.gather(1, order) for each in (places, tokens, ended, positions)
                )
            hidden = prefill.step(self.embed(tokens), positions)
        return answers
