"""The vision-language model: tower, connector, LLM; readable in one sitting.

Shapes: B rows, L tokens, U distinct media of a batch, M media places, N tokens a media item, D tower width, E LLM width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import normalize

from vlm_tune.config.base import Config
from vlm_tune.config.model import Llm, ModelSection
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.batching.packing import Tree, trees
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.requests import request_conversation
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import IGNORE_INDEX, Batch, Example
from vlm_tune.errors import ArgumentError, DataError, ModelError
from vlm_tune.model.base_places import Base, BaseArgument, base_choice
from vlm_tune.model.connectors.instruction import Text, instructions, places
from vlm_tune.model.connectors.projectors import Connector
from vlm_tune.model.language.base import LanguageModel, TokenLoss
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding, check_count
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.weights import is_sharded
from vlm_tune.paths import check_path
from vlm_tune.quoting import quoted

JOINED_PROMPTS = 1024
"""Tokens of a row of prompts about one image."""


class VisionLanguageConfig(Config):
    """What `config.json` holds: all that makes the model again, weights apart; `precision` is what it is loaded in."""

    model_type: str = "vlm_tune"
    model: ModelSection
    tower_rebuild: dict[str, Any]
    template: dict[str, Any]
    system: str | None
    max_length: int
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"

    @property
    def llm(self) -> Llm:
        """The language model's section."""
        return self.model.llm


@dataclass
class Alignment:
    """Unit vectors in the LLM's embedding space: image fp32[B, E] and caption fp32[B, E] of each row."""

    images: torch.Tensor
    captions: torch.Tensor


class VisionLanguageModel(nn.Module):
    """A vision tower whose features a connector projects into a language model.

    `changed` names the parts (tower, llm) whose base weights are no longer those of their name in the recipe;
    `adapters` holds the LoRA tuner of each part that has one; `bases` are the fingerprints of the weights that parts started from.
    `beside` names the LLM's own weights that were trained where all others are still its base's.
    """

    def __init__(
        self,
        config: VisionLanguageConfig,
        tower: VisionTower,
        connector: Connector,
        llm: LanguageModel,
        processor: Processor,
    ) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        self.tower = tower
        self.connector = connector
        self.llm = llm
        self.changed: set[str] = set()
        self.beside: set[str] = set()
        self.adapters: dict[str, Any] = {}
        self.bases: dict[str, Base] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """As in torch, but a frozen tower stays in eval mode, so its batch statistics don't move."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.tower.parameters()):
            self.tower.eval()
        return self

    def media(self, batch: Batch) -> torch.Tensor | None:
        """Connected features [M, N, E] of the batch's media places, in row order; None where it has none."""
        if batch.features is None and batch.pixels is None:
            return None
        features = self.tower(batch.pixels) if batch.features is None else batch.features
        if not self.connector.needs_text:
            return self.connector(features)[batch.media_index]
        where = places(batch, self.processor.spec.tokens_per_image)
        return self.connector(features[batch.media_index], self._text(batch, *where))

    def _text(self, batch: Batch, rows: torch.Tensor, columns: torch.Tensor) -> Text:
        embeds = self.llm.embed(batch.input_ids)
        return instructions(
            batch, embeds, rows, columns, answers_inside=self.llm.layout == "causal"
        )

    def _blank(self, batch: Batch) -> torch.Tensor:
        """Connected features [1, N, E] of a black image, for a batch that has none."""
        size = self.tower.image_size
        first = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
        if batch.cached:  # other ranks don't run the tower either
            features = torch.zeros(1, *self.tower.measure(), device=first.device)
        else:
            features = self.tower(
                torch.zeros(1, 3, size, size, dtype=torch.uint8, device=first.device)
            )
        return (
            self.connector(features, self._text(batch, first, first))
            if self.connector.needs_text
            else self.connector(features)
        )

    def embed(self, batch: Batch) -> torch.Tensor:
        """The LLM's input [B, L, E], media joined to the text. Raises `ModelError` if slots and media differ in number."""
        connected = self.media(batch)
        if connected is None and batch.image_mask.any():
            raise ModelError(
                f"{int(batch.image_mask.sum())} image slots and no media in {', '.join(batch.ids)}"
            )
        if connected is None and self.training and self._runs_blank:
            # Every rank must run the same modules, so a batch without media runs a blank one that counts nothing.
            connected = self._blank(batch)
        return self.connector.join(self.llm.embed(batch.input_ids), connected, batch)

    @property
    def _runs_blank(self) -> bool:
        """Whether other ranks wait for what a batch without media would leave out: its gradients, or its share of weights."""
        found = (
            parameter for part in (self.tower, self.connector) for parameter in part.parameters()
        )
        return any(parameter.requires_grad or is_sharded(parameter) for parameter in found)

    def forward(self, batch: Batch, *, align: bool = False) -> TokenLoss | Alignment:
        """The language modelling loss of a batch, or with `align` its images and captions as vectors."""
        if align:
            return self._align(batch)
        return self.llm(self.embed(batch), batch)

    def _align(self, batch: Batch) -> Alignment:
        connected = self.media(batch)
        if connected is None or len(batch.media_index) != len(batch.ids):
            raise DataError("a contrastive objective needs exactly one image a row")
        said = batch.labels != IGNORE_INDEX
        for stop in self.processor.stop_ids:
            said &= batch.labels != stop
        words = self.llm.embed(batch.labels.clamp(min=0)).float() * said[..., None]
        return Alignment(
            normalize(connected.float().mean(1), dim=-1),
            normalize(words.sum(1), dim=-1),
        )

    @torch.inference_mode()
    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """New ids of each row, up to and without the first stop id; a decoder's rows are padded on the left."""
        stops = self.processor.stop_ids
        pad = self.processor.spec.pad_id
        return [
            self._up_to_stop(row)
            for row in self.llm.generate(
                self.embed(batch), batch.attention_mask, decoding, pad, stops
            ).tolist()
        ]

    def answers(
        self,
        prompts: Sequence[Example],
        decoding: Decoding,
        *,
        fetch: Fetch,
        cached: bool = False,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """The generated answers of prompts, in their order; `fetch` gives pixels, or features where `cached`.

        A decoder's greedy answers to questions about one image are branches of one row: the image is read once.
        """
        collated = {"fetch": fetch, "cached": cached}
        found = [""] * len(prompts)
        done = 0
        for batch in _batches(self._trees(prompts, decoding), batch_size):
            rows = [tree.row for tree in batch]
            if any(row.ends is not None for row in rows):
                ids = self._continued(rows, [tree.leaves for tree in batch], decoding, collated)
            else:
                ids = self.generate(
                    collate(
                        rows, self.processor.spec, **collated, pad_left=self.llm.layout == "causal"
                    ).to(self.device),
                    decoding,
                )
            for place, said in zip(
                (place for tree in batch for place in tree.members), ids, strict=True
            ):
                found[place] = self.processor.decode(said)
            done += sum(len(tree.members) for tree in batch)
            if progress:
                progress(done, len(prompts))
        return found

    def _trees(self, prompts: Sequence[Example], decoding: Decoding) -> list[Tree]:
        """Prompts as rows, those that share an image joined where that can be; of like length together."""
        greedy = self.llm.layout == "causal" and decoding.num_beams == 1
        # What stands before every row, or reaches the LLM beside the slots, is not continued branch by branch.
        joins = (
            greedy
            and self.llm.prompt is None
            and self.connector.fills_slots
            and not self.connector.needs_text
        )
        joins = joins and isinstance(self.llm, CausalLLM) and self.llm.unjoined is None
        groups: dict[Any, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.media if joins and prompt.media else place, []).append(place)
        made = [
            replace(tree, members=tuple(group[member] for member in tree.members))
            for group in groups.values()
            for tree in trees([prompts[place] for place in group], JOINED_PROMPTS)
        ]
        # Joined rows and plain ones are generated by different passes.
        return sorted(
            made, key=lambda tree: (tree.row.ends is None, len(tree.row.input_ids), tree.row.id)
        )

    @torch.inference_mode()
    def _continued(
        self,
        rows: Sequence[Example],
        leaves: Sequence[tuple[int, ...]],
        decoding: Decoding,
        collated: dict[str, Any],
    ) -> list[list[int]]:
        """The new ids of every branch of joined rows, up to and without the first stop id."""
        assert isinstance(self.llm, CausalLLM)
        batch = collate(rows, self.processor.spec, **collated).to(self.device)
        most = max(map(len, leaves))
        ends = torch.tensor(
            [[*row, *[row[-1]] * (most - len(row))] for row in leaves], device=self.device
        )
        ids = self.llm.continue_branches(
            self.embed(batch), batch, ends, decoding.max_new_tokens, self.processor.stop_ids
        ).tolist()
        return [
            self._up_to_stop(said)
            for row, own in zip(ids, leaves, strict=True)
            for said in row[: len(own)]
        ]

    def _up_to_stop(self, ids: list[int]) -> list[int]:
        stops = self.processor.stop_ids
        return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]

    def chat(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Any = (),
        *,
        max_new_tokens: int = 128,
        num_beams: int = 1,
    ) -> str:
        r"""The greedy answer to one question, or with `num_beams` the likeliest of beams.

        Args:
            prompt: a text, or turns `{"role", "content"}` whose contents are texts or lists of parts, `{"type": "text", "text": ...}`
                and `{"type": "image"}`, which may hold its own `image`. `<image>` in a text is a place of an image,
                `\<image>` the text itself.
            images: one image or a list, taken by the places in order; without a place they go before the first question. An
                image is a path, a data URL, bytes, a file object, a PIL image or a uint8 array [H, W, 3].

        Raises:
            DataError: for turns or images that can't be used, and places and images that differ in number.
            ArgumentError: for numbers of tokens or beams that are none.
        """
        return self.chat_batch(
            [{"prompt": prompt, "images": images}],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
        )[0]

    def chat_batch(
        self,
        requests: Sequence[str | Mapping[str, Any]],
        *,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        batch_size: int = 32,
    ) -> list[str]:
        """The answers to many questions, in their order: texts, or `{"prompt": ..., "image" or "images": ...}` as in `chat`.

        Raises as `chat`; a `DataError` names the request, from 1.
        """
        if isinstance(requests, str | Mapping) or not isinstance(requests, Iterable):
            raise ArgumentError(f"chat_batch takes a list of requests, got {quoted(requests)}")
        decoding = Decoding(max_new_tokens, num_beams)
        check_count("batch_size", batch_size)
        prompts = self.processor.prompts(
            [request_conversation(number, request) for number, request in enumerate(requests, 1)]
        )
        was = self.training
        self.eval()
        try:
            return self.answers(
                prompts, decoding, fetch=PixelCache(self.processor.images), batch_size=batch_size
            )
        finally:
            self.train(was)

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionLanguageModel:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = {
            name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()
        }
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "a model can't be pickled: write a folder by save_pretrained and read it by from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        base: BaseArgument = None,
        accept_other_base: bool = False,
    ) -> VisionLanguageModel:
        """The model of a run, a checkpoint or a merged folder, in eval mode.

        Args:
            path: the folder.
            dtype: of the weights, torch.bfloat16, "bfloat16" or "bf16"; the folder's own where not given.
            base: where the LLM's base is now, or `{"llm": ..., "tower": ...}`; where it was where not given.
            accept_other_base: whether to load over weights other than those it was trained over.

        Raises:
            ModelError: as `load_model`.
            RecipeError: what is given as a path is none.
        """
        from vlm_tune.model.checkpoint import load_model
        from vlm_tune.precision import dtype_of

        check_path("path", path)
        return load_model(
            Path(path), dtype=dtype_of(dtype), base=base_choice(base, accept_other_base)
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads: all that was trained, and what its bases don't hold."""
        from vlm_tune.model.checkpoint import save_model

        check_path("path", path)
        save_model(self, Path(path))


def _batches(made: Sequence[Tree], size: int) -> Iterator[list[Tree]]:
    """Stretches of rows that are all joined or all plain, of about `size` prompts."""
    batch: list[Tree] = []
    for tree in made:
        full = sum(len(other.members) for other in batch) >= size
        if batch and (full or (batch[0].row.ends is None) != (tree.row.ends is None)):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch
