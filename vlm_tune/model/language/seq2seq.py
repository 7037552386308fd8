"""Encoder-decoders: T5 and its like."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.kv_cache import (
    enlarge_cache,
    static_cache,
    steps_of_room,
    takes_static_cache,
)
from vlm_tune.model.language.masks import additive, packing_reason
from vlm_tune.model.language.seq2seq_attention import Seq2SeqAttention
from vlm_tune.model.language.seq2seq_rows import Seq2SeqRows
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix, SoftPrompt


class Seq2SeqLLM(LanguageModel):
    """An encoder-decoder: T5, Flan-T5, mT5, UL2."""

    layout = "seq2seq"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.attention = Seq2SeqAttention()

    @property
    def bodies(self) -> list[nn.Module]:
        return [self.model.get_decoder()]

    def prefill(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, decoder_input_ids=input_ids, use_cache=True)[
            cache_name()
        ].self_attention_cache

    def prompted(
        self, embeds: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A prefix of keys and values is the decoder's, so the encoder's input has none.
        if isinstance(self.prompt, SoftPrompt):
            return super().prompted(embeds, mask)
        return embeds, mask

    def theirs(self, batch: Batch) -> torch.Tensor:
        return self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            labels=batch.labels,
            use_cache=False,
        ).logits

    @cached_property
    def unjoined(self) -> str | None:
        return packing_reason(self.model)

    def shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's input ids int64[B, T]: the start token, then labels [B, T] but the last."""
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                f"{type(self.model).__name__}'s config names no decoder_start_token_id "
                "(T5's is its pad_token_id)"
            )
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            return self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        inputs = pad(labels[:, :-1], (1, 0), value=start)
        return inputs.masked_fill(inputs == IGNORE_INDEX, self.model.config.pad_token_id)

    def _prefix(self, rows: int, dtype: torch.dtype) -> Any:
        """The decoder's transformers cache that holds the prefix, None if there is no prefix."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache = None if self.prompt is None else self.prompt.cache(rows, dtype)
        return None if cache is None else EncoderDecoderCache(cache, DynamicCache())

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.shifted(batch.labels)
        embeds, batch_mask = self.prompted(embeds, batch.attention_mask)
        self.check_length(batch_mask.shape[1])
        label_samples = batch.label_samples
        if label_samples is not None:
            self.check_joined()
            if self.virtual:
                raise ModelError(
                    "virtual tokens stand before one sample of an encoder-decoder: it takes no "
                    "packed rows (data.packing)"
                )
            # In the decoder every sample begins with the start token.
            inputs[:, 1:][label_samples[:, 1:] != label_samples[:, :-1]] = (
                self.model.config.decoder_start_token_id
            )
        # The keys of a prefix are in no mask but transformers' own.
        prefixed = isinstance(self.prompt, KeyValuePrefix)
        attention = Seq2SeqAttention() if prefixed else self.attention
        mask, cross_mask, causal_mask = attention.masks(
            batch_mask, batch.samples, label_samples, inputs.shape[1], embeds.dtype
        )
        encoded = self.model.get_encoder()(
            inputs_embeds=embeds, attention_mask=mask
        ).last_hidden_state
        hidden = self.model.get_decoder()(
            input_ids=inputs,
            attention_mask=causal_mask,
            encoder_hidden_states=encoded,
            encoder_attention_mask=cross_mask,
            use_cache=False,
            **{cache_name(): self._prefix(len(embeds), embeds.dtype)},
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.supervised_at), batch.targets

    @property
    def uncontinued(self) -> str | None:
        return None if self.prompt is None else "its rows begin with virtual tokens"

    def branches(
        self, embeds: torch.Tensor, batch: Batch, leaves: torch.Tensor, new_tokens: int
    ) -> Seq2SeqBranches:
        """Encodes rows of one prompt each, whose answers then grow; see the base class."""
        self.check_length(batch.attention_mask.shape[1])
        return self.encoded(embeds, batch.attention_mask, new_tokens)

    def encoded(
        self, embeds: torch.Tensor, row_mask: torch.Tensor, new_tokens: int
    ) -> Seq2SeqBranches:
        """Encodes rows [B, L, E] of one prompt each, and takes their first decode step.

        `row_mask` bool[B, L] is False for padding.
        """
        return Seq2SeqBranches(self, embeds, row_mask, new_tokens)

    @property
    def unbatched(self) -> str | None:
        return self.uncontinued or self.unjoined

    def rows(self) -> Seq2SeqRows:
        """No rows yet, see the base class."""
        return Seq2SeqRows(self)

    def generate(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        decoding: Decoding,
        pad_id: int,
        stop_ids: list[int],
        **options: Any,
    ) -> torch.Tensor:
        embeds, mask = self.prompted(embeds, batch.attention_mask)
        self.check_length(mask.shape[1])
        encoded = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask.long())
        options |= self._options(decoding, pad_id, stop_ids)
        first = 1
        if isinstance(self.prompt, KeyValuePrefix):
            # transformers takes the whole output so far beside a cache, and drops the part that is
            # cached.
            first += self.virtual
            options[cache_name()] = self._prefix(len(embeds) * decoding.num_beams, embeds.dtype)
            options["decoder_input_ids"] = mask.new_full(
                (len(embeds), first), self.model.config.decoder_start_token_id, dtype=torch.int64
            )
        ids = self.model.generate(encoder_outputs=encoded, attention_mask=mask.long(), **options)
        return ids[:, first:]


class Seq2SeqBranches:
    """Answers to encoded rows, one a row, which grow by a token per decode step, see `Branches`."""

    def __init__(
        self, llm: Seq2SeqLLM, embeds: torch.Tensor, row_mask: torch.Tensor, new_tokens: int
    ) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        device = embeds.device
        on_gpu = device.type == "cuda"
        # As in training, transformers would look whether a mask of rows has padding.
        self.mask = additive(row_mask[:, None, None], embeds.dtype) if on_gpu else row_mask.long()
        self.decoder = llm.model.get_decoder()
        self.encoded = llm.model.get_encoder()(
            inputs_embeds=embeds, attention_mask=self.mask
        ).last_hidden_state
        growing: Any = DynamicCache()
        # The columns of a cache of fixed size, and how many of them are filled.
        self.columns: torch.Tensor | None = None
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        # The start token takes the first of as many steps as there are new tokens.
        self.steps_taken = 0
        self.steps_left = new_tokens
        if takes_static_cache(llm.model, device):
            room = steps_of_room(0, new_tokens)
            # The decoder may have more layers than the encoder, whose number the model's has.
            growing = static_cache(self.decoder.config, room, device)
            self.columns = torch.arange(room, device=device)
        self.cache = EncoderDecoderCache(growing, DynamicCache())
        start = llm.shifted(torch.zeros_like(row_mask[:, :1], dtype=torch.int64))
        self.hidden = self.step(start)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """A decode step, see `Branches`."""
        mask = None
        if self.columns is not None:
            if self.steps_taken == len(self.columns):
                self._enlarge(self.columns.device)
            filled = (self.columns <= self.filled).expand(len(tokens), 1, 1, -1)
            mask = additive(filled, self.encoded.dtype)
            self.filled += 1
        self.steps_taken += 1
        self.steps_left -= 1
        return self.decoder(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=self.encoded,
            encoder_attention_mask=self.mask,
            use_cache=True,
            **{cache_name(): self.cache},
        ).last_hidden_state

    def _enlarge(self, device: torch.device) -> None:
        """Moves the cache of fixed size to one with room for as many steps again."""
        length = self.steps_taken + steps_of_room(self.steps_taken, self.steps_left)
        enlarge_cache(self.cache.self_attention_cache, length)
        self.columns = torch.arange(length, device=device)

    def select(self, places: torch.Tensor) -> None:
        """Drops no branch: there is one a row."""
