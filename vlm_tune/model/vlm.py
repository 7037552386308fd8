"""The vision-language model: tower, connector, splice, LLM; readable in one sitting.

Shapes: B rows, L tokens, U distinct media of a batch, M media places, N tokens a media item, D tower width, E LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import normalize

from vlm_tune.config import Config, Llm, ModelSection
from vlm_tune.data.collate import Fetch, collate
from vlm_tune.data.processor import Processor
from vlm_tune.data.types import IGNORE_INDEX, Batch, Conversation, Example, Media, Message
from vlm_tune.errors import DataError, ModelError
from vlm_tune.model.connectors import Connector
from vlm_tune.model.llm import Decoding, LanguageModel, TokenLoss
from vlm_tune.model.towers import VisionTower


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
    `adapters` holds the LoRA tuner of each part that has one.
    """

    def __init__(
        self, config: VisionLanguageConfig, tower: VisionTower, connector: Connector, llm: LanguageModel, processor: Processor
    ) -> None:
        super().__init__()
        self.config, self.processor = config, processor
        self.tower, self.connector, self.llm = tower, connector, llm
        self.changed: set[str] = set()
        self.adapters: dict[str, Any] = {}

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
        """Connected features [U, N, E] of the batch's distinct media; None where it has none."""
        if batch.features is not None:
            return self.connector(batch.features)
        return None if batch.pixels is None else self.connector(self.tower(batch.pixels))

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, E] with the media in their slots. Raises `ModelError` as `splice`."""
        embeds = self.llm.embed(batch.input_ids)
        connected = self.media(batch)
        if connected is not None:
            return splice(embeds, connected[batch.media_index], batch.image_mask, batch.ids)
        if batch.image_mask.any():
            raise ModelError(f"{int(batch.image_mask.sum())} image slots and no media in {', '.join(batch.ids)}")
        if self.training and any(p.requires_grad for part in (self.tower, self.connector) for p in part.parameters()):
            # Every rank must run the same modules, so a batch without media runs a blank one that counts nothing.
            size = self.tower.image_size
            blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=embeds.device)
            embeds = embeds + 0.0 * self.connector(self.tower(blank)).sum().to(embeds.dtype)
        return embeds

    def forward(self, batch: Batch, *, align: bool = False) -> TokenLoss | Alignment:
        """The language modelling loss of a batch, or with `align` its images and captions as vectors."""
        if align:
            return self._align(batch)
        return self.llm(self.embed(batch), batch.attention_mask, batch.labels, batch.positions, batch.branches)

    def _align(self, batch: Batch) -> Alignment:
        connected = self.media(batch)
        if connected is None or len(batch.media_index) != len(batch.ids):
            raise DataError("a contrastive objective needs exactly one image a row")
        said = batch.labels != IGNORE_INDEX
        for stop in self.processor.stop_ids:
            said &= batch.labels != stop
        words = self.llm.embed(batch.labels.clamp(min=0)).float() * said[..., None]
        return Alignment(
            normalize(connected.float().mean(1), dim=-1)[batch.media_index],
            normalize(words.sum(1), dim=-1),
        )

    @torch.inference_mode()
    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """New ids of each row, up to and without the first stop id; a decoder's rows are padded on the left."""
        stops = self.processor.stop_ids
        pad = self.processor.spec.pad_id
        ids = self.llm.generate(self.embed(batch), batch.attention_mask, decoding, pad, stops).tolist()
        ends = [next((place for place, token in enumerate(row) if token in stops), len(row)) for row in ids]
        return [row[:end] for row, end in zip(ids, ends, strict=True)]

    def answer(self, prompts: Sequence[Example], decoding: Decoding, *, fetch: Fetch, cached: bool = False) -> list[str]:
        """The generated answers of a batch of prompts; `fetch` gives pixels, or features where `cached`."""
        spec = self.processor.spec
        batch = collate(prompts, spec, fetch=fetch, cached=cached, pad_left=spec.layout == "causal").to(self.device)
        return [self.processor.decode(ids) for ids in self.generate(batch, decoding)]

    def chat(
        self, prompt: str | Sequence[dict[str, Any]], images: Sequence[Any] = (), *, max_new_tokens: int = 128, num_beams: int = 1
    ) -> str:
        """The answer to one question. `prompt` is text, or turns [{"role", "content"}, ...]; images go first.

        `images` are paths, encoded bytes or PIL images. Raises `DataError` for an image that can't be decoded.
        """
        return self.chat_batch([{"prompt": prompt, "images": images}], max_new_tokens=max_new_tokens, num_beams=num_beams)[0]

    def chat_batch(
        self, requests: Sequence[dict[str, Any]], *, max_new_tokens: int = 128, num_beams: int = 1, batch_size: int = 32
    ) -> list[str]:
        """The answers to many questions [{"prompt": ..., "images": [...]}, ...], in their order."""
        was = self.training
        self.eval()
        prompts = self.processor.prompts([_conversation(number, request) for number, request in enumerate(requests)])
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].input_ids))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            found = self.answer([prompts[place] for place in places], Decoding(max_new_tokens, num_beams), fetch=self.processor.images)
            for place, text in zip(places, found, strict=True):
                answers[place] = text
        self.train(was)
        return answers

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype | None = None) -> VisionLanguageModel:
        """The model of a run, a checkpoint or a merged folder, in eval mode. Raises `ModelError` as `load_model`."""
        from vlm_tune.model.store import load_model

        return load_model(Path(path), dtype=dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads: all that was trained, and what its bases don't hold."""
        from vlm_tune.model.store import save_model

        save_model(self, Path(path))


def splice(embeds: torch.Tensor, features: torch.Tensor, image_mask: torch.Tensor, ids: Sequence[str]) -> torch.Tensor:
    """embeds [B, L, E] with features [M, N, E] in the slots of image_mask bool[B, L], in row order.

    Raises `ModelError` with both counts and the sample ids if slots and features differ in number.
    """
    slots, given = int(image_mask.sum()), features.shape[0] * features.shape[1]
    if slots != given:
        raise ModelError(f"{slots} image slots and {given} image features in {', '.join(ids)}")
    return embeds.masked_scatter(image_mask[..., None], features.to(embeds.dtype))


def _conversation(number: int, request: dict[str, Any]) -> Conversation:
    prompt = request["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    media = tuple(_media(image) for image in request.get("images") or ())
    messages = [Message(turn["role"], (turn["content"],)) for turn in turns]
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if first is None or messages[-1].role != "user":
        raise DataError("a chat ends with the user's turn", row=number)
    messages[first] = Message("user", (*media, *messages[first].parts))
    return Conversation(f"request {number}", tuple(messages))


def _media(image: Any) -> Media:
    if isinstance(image, bytes):
        return Media(image)
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise DataError(f"no image file {str(image)!r}")
        return Media(Path(image))
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return Media(buffer.getvalue())
