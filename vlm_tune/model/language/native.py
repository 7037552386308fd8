"""A whole vision-language model of transformers, called as it is.

Its own forward pass embeds images, puts them into the text, and computes positions and masks;
where samples are joined in a row, positions and masks come from here.

Shapes: B rows, L tokens, S supervised positions, E width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import beams_keep_images
from vlm_tune.config.native import JOINED_TYPES
from vlm_tune.data.batch import Batch
from vlm_tune.data.images.native import NativeImages
from vlm_tune.data.types import NativeInputs
from vlm_tune.errors import ModelError
from vlm_tune.model.language.attention import whole_rows
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.image_axes import Shown, image_axes
from vlm_tune.model.language.masks import joining_reason, layer_masks, tree_mask
from vlm_tune.model.language.native_branches import NativeBranches
from vlm_tune.model.language.positions import learned_positions
from vlm_tune.model.language.vision_shapes import vision_shapes
from vlm_tune.model.weights import is_sharded
from vlm_tune.transfer import to_device

MERGERS = ("merger", "projector", "connector")
"""What names of connectors inside a tower contain."""

VIDEO_TYPE = 2
"""The type of a video's tokens in `mm_token_type_ids`."""

Part = Literal["tower", "connector", "llm"]


class NativeLLM(LanguageModel):
    """A model of `model.kind: native`, with its tower and its connector inside.

    Token ids are its input, so `embeds` are the ids [B, L] everywhere.
    """

    layout = "causal"
    native = True
    token_types: Mapping[str, Mapping[int, int]] = {}
    """The types of token ids, as `vlm_tune.data.images.native.NativeImages` has them."""
    blank: tuple[Sequence[int], NativeInputs] | None = None
    """The token ids of an image in which there is nothing, and its inputs."""

    def takes(self, images: NativeImages) -> None:
        """Notes what the model's processor makes of images: types of tokens, and a plain image.

        Raises `ModelError` if it marks no tokens, where the forward pass takes them marked.
        """
        self.token_types = images.token_types
        unmarked = next((name for name in self._types if not self.token_types[name]), None)
        if unmarked:
            raise ModelError(
                f"a {type(self.model).__name__} can't be used here: its forward pass tells "
                f"tokens apart by {unmarked}, but its processor does not tell image tokens from "
                "text tokens"
            )
        plain = images.plain()
        ids = [token for segment in images.segments(plain) for token in segment.ids or ()]
        self.blank = ids, images.inputs(plain)

    @property
    def body(self) -> Any:
        """The model without its head. Raises `ModelError` if there is none."""
        if self.model.base_model is self.model and not hasattr(self.model, "model"):
            raise ModelError(
                f"a {type(self.model).__name__} can't be trained here: transformers has no model "
                "without its head in it"
            )
        return super().body

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
        if reason is None and not self.reads_branches:
            return "its forward pass reads one sample per row"
        return reason

    @property
    def reads_branches(self) -> bool:
        return self.model.config.model_type in JOINED_TYPES

    @property
    def uncontinued(self) -> str | None:
        return self.unjoined

    @property
    def unbatched(self) -> str | None:
        return "its forward pass reads the images of whole rows"

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
        hearing = self.model.get_encoder(modality="audio")
        if isinstance(hearing, nn.Module) and hearing not in (self.model, self.body):
            part_of[id(hearing)] = "tower"
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

    @property
    def _types(self) -> list[str]:
        """The types of tokens that the processor gives and the forward pass takes."""
        arguments = inspect.signature(type(self.body).forward).parameters
        return [name for name in self.token_types if name in arguments]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's own forward pass for rows that are padded on the right.

        Raises `ModelError` if samples are joined in a row and the model can't separate them.
        """
        arguments = self.arguments(batch)
        if batch.visible_until is None or batch.positions is None:
            if not self.reads_branches:
                return self.whole(batch)
            # For positions, and to see whether a mask has padding, transformers would wait for a
            # GPU. No token sees the padding behind it, so there it needs no mask.
            on_gpu = batch.input_ids.device.type == "cuda"
            mask = None if on_gpu else batch.attention_mask.long()
            return self._placed(arguments, batch) | {"attention_mask": mask}
        self.check_joined()
        positions = batch.positions
        tree = tree_mask(batch.visible_until)
        mask = layer_masks(self.model.config, tree, positions, positions, self._dtype)
        return self._placed(arguments, batch) | {"attention_mask": mask}

    def _placed(self, arguments: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """Arguments with the positions of tokens, and on a GPU with what follows from shapes."""
        device = batch.input_ids.device
        for modality in ("image", "video") if device.type == "cuda" else ():
            patches = batch.on_host.native.get(f"{modality}_grid_thw")
            if patches is not None:
                arguments |= vision_shapes(self._tower_modules[0], patches, device, modality)
        return arguments | {"position_ids": self.axes(batch)}

    def whole(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's own forward pass for rows of one sample each."""
        return self.arguments(batch) | {"attention_mask": batch.attention_mask.long()}

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's own forward pass for a batch, but mask and positions."""
        types = {name: torch.zeros_like(batch.input_ids) for name in self._types}
        for name, each in types.items():
            for token, kind in self.token_types[name].items():
                each.masked_fill_(batch.input_ids == token, kind)
        return {"input_ids": batch.input_ids, **types, **batch.native}

    def axes(self, batch: Batch) -> torch.Tensor:
        """Positions int64[3, B, L] of a batch, see `image_axes`.

        They are computed on the host: a GPU would be waited for to learn how many tokens there are.
        """
        host = batch.on_host
        visible_until = host.visible_until
        positions = host.positions
        if visible_until is None or positions is None:
            visible_until, positions = whole_rows(host.attention_mask)
        images = host.input_ids == self.model.config.image_token_id
        shown = [Shown(images, self._grids(host, "image_grid_thw")), self._videos(host)]
        return to_device(image_axes(shown, visible_until, positions), batch.input_ids.device)

    def _grids(self, host: Batch, name: str) -> torch.Tensor | None:
        """The tokens of a batch's images or videos in time, rows and columns, int64[M, 3]."""
        patches = host.native.get(name)
        if patches is None:
            return None
        side = self.model.config.vision_config.spatial_merge_size
        return patches // torch.tensor([1, side, side], device=patches.device)

    def _videos(self, host: Batch) -> Shown:
        """The videos of a batch. Qwen3-VL writes a time before each of a video's grids."""
        config = self.model.config
        slots = host.input_ids == config.video_token_id
        grids = self._grids(host, "video_grid_thw")
        seconds = host.native.get("second_per_grid_ts")
        if grids is not None and config.model_type == "qwen3_vl":
            grids = grids.repeat_interleave(grids[:, 0], 0)
            grids[:, 0] = 1
        if seconds is None:
            return Shown(slots, grids)
        rate = config.vision_config.tokens_per_second
        return Shown(slots, grids, rate * (seconds.floor() if self._whole_seconds else seconds))

    @cached_property
    def _whole_seconds(self) -> bool:
        """Whether transformers rounds the seconds from one time of a video to the next down."""
        config = self.model.config
        side = config.vision_config.spatial_merge_size
        ids = torch.full((1, 2), config.video_token_id)
        positions, _ = self.body.get_rope_index(
            ids,
            mm_token_type_ids=torch.full_like(ids, VIDEO_TYPE),
            video_grid_thw=torch.tensor([[2, side, side]]),
            second_per_grid_ts=torch.tensor([1.5]),
        )
        return int(positions[0, 0, 1]) == config.vision_config.tokens_per_second

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        table = self.model.get_input_embeddings()
        return getattr(table, "base_layer", table).weight.dtype

    @property
    def _runs_blank(self) -> bool:
        """Whether a batch without images must run tower and connector for other ranks' gradients.

        It does so in one process too: the optimizer's steps don't depend on the ranks' number.
        """
        return (
            self.training
            and self.blank is not None
            and any(
                (parameter.requires_grad or is_sharded(parameter)) and self.part_of(name) != "llm"
                for name, parameter in self.model.named_parameters()
            )
        )

    def _with_blank(self, batch: Batch) -> Batch:
        """A batch without images with one more row: an image that does not count."""
        filled = self._filled(batch)
        filled.host = None if batch.host is None else self._filled(batch.host)
        return filled

    def _filled(self, batch: Batch) -> Batch:
        """`_with_blank` of a batch on one device, without its form on the host."""
        assert self.blank is not None
        ids, native = self.blank
        device = batch.input_ids.device
        rows, length = batch.input_ids.shape
        count = len(ids)
        room = (0, max(count - length, 0), 0, 1)
        filled = copy(batch)
        filled.input_ids = pad(batch.input_ids, room)
        filled.input_ids[rows, :count] = to_device(torch.tensor(ids), device)
        filled.attention_mask = pad(batch.attention_mask, room)
        filled.attention_mask[rows, :count] = True
        if batch.visible_until is not None and batch.positions is not None:
            filled.visible_until = pad(batch.visible_until, room)
            filled.visible_until[rows, :count] = count
            filled.positions = pad(batch.positions, room)
            filled.positions[rows, :count] = torch.arange(count, device=device)
        filled.native = {name: to_device(value, device) for name, value in native.items()}
        return filled

    def theirs(self, batch: Batch) -> torch.Tensor:
        return self.model(**self.whole(batch), use_cache=False).logits

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_length(batch.longest)
        blank = not batch.native and self._runs_blank
        inputs = self.inputs(self._with_blank(batch) if blank else batch)
        hidden = self.body(**inputs, use_cache=False).last_hidden_state
        if blank:
            rows, length = batch.input_ids.shape
            hidden = hidden[:rows, :length] + 0 * hidden[rows:, :1].mean()
        return hidden.flatten(0, 1).index_select(0, batch.supervised_at), batch.targets

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
        if decoding.num_beams > 1 and _several_images(batch) and not beams_keep_images(self.model):
            raise ModelError(
                f"transformers {version('transformers')} mixes up the images of a row in a beam "
                f"search of a {type(self.model).__name__}: a newer release, or num_beams 1"
            )
        options |= self._options(self.room(decoding, length), pad_id, stop_ids)
        return self.model.generate(**self.whole(batch), **options)[:, length:]

    def branches(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        leaves: torch.Tensor,
        new_tokens: int,
    ) -> NativeBranches:
        return NativeBranches(self, batch, leaves, new_tokens)


def _several_images(batch: Batch) -> bool:
    """Whether a row of a batch has several images."""
    host = batch.on_host
    return len(host.media_index) > int(host.image_mask.any(1).sum())
