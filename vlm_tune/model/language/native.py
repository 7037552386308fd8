"""A whole vision-language model of transformers, called as it is.

Its own forward pass embeds images, puts them into the text, and computes positions and masks;
where samples are joined in a row, positions and masks come from here.

Shapes: B rows, L tokens, S supervised positions, E width.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import nn

from vlm_tune.config.native import JOINED_TYPES
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.image_axes import image_axes
from vlm_tune.model.language.masks import joining_reason, layer_masks, tree_mask
from vlm_tune.model.language.native_branches import NativeBranches
from vlm_tune.model.language.positions import learned_positions

MERGERS = ("merger", "projector", "connector")
"""What names of connectors inside a tower contain."""
TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments that mark a row's image tokens, by the names of transformers' forward passes."""
Part = Literal["tower", "connector", "llm"]


class NativeLLM(LanguageModel):
    """A model of `model.kind: native`, with its tower and its connector inside.

    Token ids are its input, so `embeds` are the ids [B, L] everywhere.
    """

    layout = "causal"
    native = True

    @property
    def bodies(self) -> list[nn.Module]:
        inner = self.model.get_decoder()
        return [self.body, *([inner] if inner is not self.body else [])]

    @cached_property
    def longest(self) -> int | None:
        return learned_positions(self.model.get_decoder())

    @cached_property
    def unjoined(self) -> str | None:
        reason = joining_reason(self.model, self.body)
        if reason is None and self.model.config.model_type not in JOINED_TYPES:
            return "its own forward pass reads one sample a row"
        return reason

    @property
    def uncontinued(self) -> str | None:
        return self.unjoined

    @property
    def unbatched(self) -> str | None:
        return "its own forward pass reads the images of whole rows"

    # --- parts ------------------------------------------------------------------------------------

    @cached_property
    def _tower_modules(self) -> tuple[nn.Module, list[nn.Module]]:
        """The tower, and the connectors inside of it."""
        tower = self.model.get_encoder(modality="image")
        if tower in (self.model, self.body, self.model.get_decoder()):
            raise ModelError(
                f"a {type(self.model).__name__} has no vision tower that transformers names"
            )
        mergers = [
            module
            for name, module in tower.named_modules()
            if any(word in name.rpartition(".")[2].lower() for word in MERGERS)
        ]
        return tower, mergers

    @cached_property
    def _prefixes(self) -> list[tuple[str, Part]]:
        """The beginnings of the names of modules and the parts that they are of, deepest first."""
        tower, mergers = self._tower_modules
        part_of: dict[int, Part] = {
            id(self.model.get_decoder()): "llm",
            id(self.head): "llm",
            id(tower): "tower",
        }
        part_of |= {id(module): "connector" for module in mergers}
        named: list[tuple[str, Part]] = [
            (f"{name}.", part_of[id(module)])
            for name, module in self.model.named_modules()
            if id(module) in part_of
        ]
        return sorted(named, key=lambda pair: -len(pair[0]))

    def part_of(self, name: str) -> str:
        return next(
            (part for prefix, part in self._prefixes if name.startswith(prefix)), "connector"
        )

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as in torch, but a frozen tower stays in eval mode."""
        super().train(mode)
        tower, _ = self._tower_modules
        if mode and not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self

    # --- passes -----------------------------------------------------------------------------------

    @cached_property
    def _types(self) -> list[str]:
        """The arguments of the forward pass that mark image tokens."""
        arguments = inspect.signature(type(self.body).forward).parameters
        return [name for name in TYPES if name in arguments]

    @property
    def image_id(self) -> int:
        """The id of the tokens that the model puts image features in the places of.

        Raises `ModelError` for a config without one.
        """
        token = getattr(self.model.config, "image_token_id", None)
        if token is None:
            name = type(self.model).__name__
            raise ModelError(f"a {name} can't be used here: its config has no image_token_id")
        return int(token)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's own forward pass for a batch.

        Raises `ModelError` if samples are joined in a row and the model can't separate them.
        """
        arguments = self.arguments(batch)
        if batch.visible_until is None or batch.positions is None:
            return arguments | {"attention_mask": batch.attention_mask.long()}
        self.check_joined()
        positions = batch.positions
        tree = tree_mask(batch.visible_until)
        mask = layer_masks(self.model.config, tree, positions, positions, self._dtype)
        axes = self.axes(batch, batch.visible_until, positions)
        return arguments | {"attention_mask": mask, "position_ids": axes}

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's own forward pass for a batch, but mask and positions."""
        shown = (batch.input_ids == self.image_id).int()
        return {"input_ids": batch.input_ids, **dict.fromkeys(self._types, shown), **batch.native}

    def axes(
        self, batch: Batch, visible_until: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Positions int64[3, B, L] of a batch; the other arguments are those of `image_axes`."""
        shown = batch.input_ids == self.image_id
        return image_axes(shown, self._grids(batch), visible_until, positions)

    def _grids(self, batch: Batch) -> torch.Tensor | None:
        """The tokens of a batch's images in time, rows and columns, int64[M, 3]."""
        patches = batch.native.get("image_grid_thw")
        if patches is None:
            return None
        side = self.model.config.vision_config.spatial_merge_size
        return patches // patches.new_tensor([1, side, side])

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        table = self.model.get_input_embeddings()
        return getattr(table, "base_layer", table).weight.dtype

    def theirs(self, batch: Batch) -> torch.Tensor:
        return self.model(**self.inputs(batch), use_cache=False).logits

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_length(batch.longest)
        output = self.body(**self.inputs(batch), use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)
        return hidden.index_select(0, batch.supervised_at), batch.targets

    def generate(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        decoding: Decoding,
        pad_id: int,
        stop_ids: list[int],
        **options: Any,
    ) -> torch.Tensor:
        length = batch.input_ids.shape[1]
        self.check_length(length)
        options |= self._options(self.room(decoding, length), pad_id, stop_ids)
        return self.model.generate(**self.inputs(batch), **options)[:, length:]

    def branches(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        leaves: torch.Tensor,
        new_tokens: int,
    ) -> NativeBranches:
        return NativeBranches(self, batch, leaves, new_tokens)
