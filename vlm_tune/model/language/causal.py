"""Decoders."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.language.attention import MaskedAttention, MaskedPrefill, whole_rows
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.causal_rows import CausalRows
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.kv_cache import crop_cache
from vlm_tune.model.language.masks import (
    Blocks,
    image_blocks,
    joining_reason,
    layer_masks,
    prompt_blocks,
    shared_rotation_reason,
    shortest_window,
)
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix


class CausalLLM(LanguageModel):
    """A decoder: Llama, Mistral, Qwen, Gemma, SmolLM, GPT-2, ...

    Attributes:
        attention: How rows attend, which `acceleration.install` replaces.
        bidirectional: Which tokens of a row see each other both ways; None: none do.
    """

    layout = "causal"
    bidirectional: Literal["images", "prompt"] | None = None

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

    def blocks(self, batch: Batch) -> Blocks | None:
        if self.bidirectional == "prompt":
            return prompt_blocks(batch)
        return image_blocks(batch) if self.bidirectional and len(batch.slots) else None

    @property
    def shares_beginnings(self) -> bool:
        # Else the tokens of a beginning see those that prompts differ in.
        return self.bidirectional != "prompt"

    @property
    def supports_intervals(self) -> bool:
        return self.attention_of_rows.by_intervals(self.model)

    @property
    def attention_of_rows(self) -> MaskedAttention:
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
        blocks = self.blocks(batch)
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
        if virtual and blocks is not None:
            blocks = blocks.padded(before=virtual)
        row_positions = None if positions is None else positions[:, -embeds.shape[1] :]
        visible = self.attention_of_rows.mask(
            self.model,
            mask,
            visible_until,
            positions,
            embeds.dtype,
            embeds.shape[1],
            joinable=self.unjoined is None,
            blocks=blocks,
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

    @property
    def uncontinued(self) -> str | None:
        return "its rows begin with virtual tokens" if self.prompt else self.unjoined

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
        options |= self._options(self.room(decoding, mask.shape[1]), pad_id, stop_ids)
        blocks = self.blocks(batch)
        cached = isinstance(self.prompt, KeyValuePrefix)
        if cached or blocks is not None:
            # transformers takes the whole input beside a cache, and drops the part that is cached.
            cache = self._cached(embeds, mask, blocks)
            cache.batch_repeat_interleave(decoding.num_beams)
            options[cache_name()] = cache
        if cached:
            embeds = pad(embeds, (0, 0, self.virtual, 0))
        return self.model.generate(inputs_embeds=embeds, attention_mask=mask.long(), **options)

    def _cached(self, embeds: torch.Tensor, mask: torch.Tensor, blocks: Blocks | None) -> Any:
        """The KV cache with which transformers' `generate` begins.

        It has a prefix of keys and values, and where blocks see each other both ways all but the
        last tokens of rows [B, L, E], which transformers would prefill by a mask without blocks.
        `mask` is bool[B, C] with the virtual tokens, False for padding on the left.
        """
        from transformers import DynamicCache

        # Without a config it keeps all tokens.
        cache = (
            self.prompt.cache(len(embeds), embeds.dtype)
            if isinstance(self.prompt, KeyValuePrefix)
            else DynamicCache()
        )
        if blocks is None:
            return cache
        columns = mask.shape[1]
        length = embeds.shape[1]
        window = shortest_window(self.model.config)
        if blocks.unlimited is not None and window is not None and columns > window:
            raise ModelError(
                f"a prompt of {columns} tokens, and layers of a {type(self.model).__name__} see "
                f"{window} of them in transformers' generate: leave out beams and virtual tokens"
            )
        blocks = blocks.padded(before=columns - blocks.keys.shape[1]).last(length)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        place = torch.arange(columns, device=embeds.device)
        visible = (place[:, None] >= place)[None, None] & mask[:, None, None]
        visible = visible | torch.eye(columns, dtype=torch.bool, device=embeds.device)
        queries = positions[:, -length:]
        self.body(
            inputs_embeds=embeds,
            attention_mask=layer_masks(
                self.model.config,
                visible[:, :, -length:],
                queries,
                positions,
                embeds.dtype,
                blocks,
            ),
            position_ids=queries,
            use_cache=True,
            **{cache_name(): cache},
        )
        # The last token is computed again, for its logits.
        crop_cache(cache, columns - 1)
        return cache

    def branches(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        leaves: torch.Tensor,
        new_tokens: int,
        cache: Any = None,
    ) -> CausalBranches:
        """Prefills rows whose branches are then continued, each after its last token.

        Args:
            embeds: Input embeddings [B, S, E]; S is L, or less with a `cache`.
            batch: Rows of L tokens, padded on the right.
            leaves: The last tokens of the branches in the rows, int64[B, K].
            new_tokens: The most new tokens of a branch.
            cache: A DynamicCache that holds the rows' first tokens.
        """
        attention = self.attention_of_rows
        return CausalBranches(self, self.body, attention, embeds, batch, leaves, new_tokens, cache)

    @property
    def unbatched(self) -> str | None:
        return self.uncontinued or shared_rotation_reason(self.model)

    def rows(self) -> CausalRows:
        """No rows yet, see the base class."""
        return CausalRows(self)

    def positions_left(self, batch: Batch) -> int | None:
        if self.longest is None:
            return None
        self.check_length(batch.longest)
        # The last new token needs no position: it is not fed back.
        return self.longest - batch.longest + 1


class CausalBranches:
    """Branches of prefilled rows, which grow by one token per decode step, see `Branches`.

    Each sees what its leaf sees and its new tokens. `cache` is the KV cache that was given, with
    the new tokens.
    """

    def __init__(
        self,
        llm: LanguageModel,
        body: Any,
        attention: MaskedAttention,
        embeds: torch.Tensor,
        batch: Batch,
        leaves: torch.Tensor,
        new_tokens: int,
        cache: Any,
    ) -> None:
        self.llm = llm
        visible_until = batch.visible_until
        positions = batch.positions
        if visible_until is None or positions is None:
            visible_until, positions = whole_rows(batch.attention_mask)
        rows = torch.arange(len(leaves), device=embeds.device)[:, None]
        # The leaves' rows of `tree_mask`, [B, K, L], without those of all other tokens.
        place = torch.arange(visible_until.shape[1], device=embeds.device)
        at = leaves[..., None]
        visible = (place <= at) & (at < visible_until[:, None])
        self.positions = positions[rows, leaves]
        blocks = llm.blocks(batch)
        if cache is None:
            self.prefill = attention.prefill(
                llm.model,
                body,
                embeds,
                visible_until,
                positions,
                visible,
                new_tokens - 1,
                blocks,
            )
        else:
            self.prefill = MaskedPrefill(
                llm.model, body, embeds, visible_until, positions, visible, blocks, cache
            )
        cached = positions.shape[1] - embeds.shape[1]
        self.hidden = self.prefill.hidden[rows, leaves - cached]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """A decode step, see `Branches`."""
        self.positions = self.positions + 1
        return self.prefill.step(self.llm.embed(tokens), self.positions)

    def select(self, places: torch.Tensor) -> None:
        """Drops branches, see `Branches`."""
        self.prefill.select(places)
        self.positions = self.positions.gather(1, places)
