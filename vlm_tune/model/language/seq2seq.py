"""Encoder-decoders: T5 and its like."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.masks import additive, packing_reason, same_sample
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix, SoftPrompt


class Seq2SeqLLM(LanguageModel):
    """An encoder-decoder: T5, Flan-T5, mT5, UL2."""

    layout = "seq2seq"

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
        # A prefix stands before what the decoder writes.
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
        """What the decoder reads, int64[B, T], to write labels [B, T]: its start token, then the labels but the last."""
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                f"{type(self.model).__name__}'s config names no decoder_start_token_id (T5's is its pad_token_id)"
            )
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            return self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        inputs = pad(labels[:, :-1], (1, 0), value=start)
        return inputs.masked_fill(inputs == IGNORE_INDEX, self.model.config.pad_token_id)

    def _prefix(self, rows: int, dtype: torch.dtype) -> Any:
        """transformers' cache of a decoder that begins with the prefix; None where there is none."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache = None if self.prompt is None else self.prompt.cache(rows, dtype)
        return None if cache is None else EncoderDecoderCache(cache, DynamicCache())

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.shifted(batch.labels)
        embeds, mask = self.prompted(embeds, batch.attention_mask)
        self.check_length(mask.shape[1])
        mask, seen, order = mask.long(), mask.long(), None
        if batch.samples is not None and batch.label_samples is not None:
            self.check_joined()
            if self.virtual:
                raise ModelError(
                    "virtual tokens stand before one sample of an encoder-decoder: it takes no packed rows (data.packing)"
                )
            own = batch.samples
            said = batch.label_samples
            # Every sample's decoder begins with the start token. Relative positions are differences, so those inside
            # a sample are what they would be without its neighbours.
            inputs[:, 1:][said[:, 1:] != said[:, :-1]] = self.model.config.decoder_start_token_id
            earlier = torch.ones(
                said.shape[1], said.shape[1], dtype=torch.bool, device=said.device
            ).tril()
            mask = additive(same_sample(own, own), embeds.dtype)
            seen = additive(same_sample(said, own), embeds.dtype)
            order = additive(same_sample(said, said) & earlier, embeds.dtype)
        encoded = self.model.get_encoder()(
            inputs_embeds=embeds, attention_mask=mask
        ).last_hidden_state
        hidden = self.model.get_decoder()(
            input_ids=inputs,
            attention_mask=order,
            encoder_hidden_states=encoded,
            encoder_attention_mask=seen,
            use_cache=False,
            **{cache_name(): self._prefix(len(embeds), embeds.dtype)},
        ).last_hidden_state
        supervised = batch.labels != IGNORE_INDEX
        return hidden[supervised], batch.labels[supervised]

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
        encoded = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask.long())
        options = self._options(decoding, pad_id, stop_ids)
        first = 1
        if isinstance(self.prompt, KeyValuePrefix):
            # transformers wants the whole output so far beside a cache, and drops what the cache stands for.
            first += self.virtual
            options[cache_name()] = self._prefix(len(embeds) * decoding.num_beams, embeds.dtype)
            options["decoder_input_ids"] = mask.new_full(
                (len(embeds), first), self.model.config.decoder_start_token_id, dtype=torch.int64
            )
        ids = self.model.generate(encoder_outputs=encoded, attention_mask=mask.long(), **options)
        return ids[:, first:]
