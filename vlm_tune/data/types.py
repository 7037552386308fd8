"""The vocabulary the data side, the model and the loop share; imports nothing of ours.

Shapes: B rows, L tokens, M media items of a batch, N tokens a media item, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100
"""The label of a token that is not supervised, as in torch's cross-entropy."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Media:
    """One image (later: video frames, audio), by file or by bytes; never decoded here."""

    source: Path | bytes
    modality: Literal["image"] = "image"

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def name(self) -> str:
        """What messages call it."""
        return "<bytes>" if isinstance(self.source, bytes) else str(self.source)


@dataclass(frozen=True)
class Message:
    """One turn; `parts` are texts and media in reading order."""

    role: str
    parts: tuple[str | Media, ...]

    @property
    def text(self) -> str:
        """The turn's text without its media."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """A sample: its turns, a stable id, and what evaluation groups and compares by."""

    id: str
    messages: tuple[Message, ...]
    category: str = ""

    @property
    def media(self) -> tuple[Media, ...]:
        """All media in reading order."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Media))


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation: plain text, one control token, or one media item; trained or not."""

    kind: Literal["text", "control", "media"]
    payload: str | Media
    trained: bool = False


@dataclass(frozen=True)
class InputSpec:
    """All the data side knows of the model."""

    tokens_per_image: int
    layout: Literal["causal", "seq2seq"]
    max_length: int
    pad_id: int
    eos_id: int


@dataclass(frozen=True)
class Example:
    """One row of token ids with final labels and reserved media slots.

    input_ids: int32[L]; labels: int32[L] (causal) or int32[T] (seq2seq), IGNORE_INDEX where not supervised;
    image_mask: bool[L]. `positions` and `branches` (int32[L]) are set on rows made by `branch_layout` only:
    branch 0 is the shared prefix, and token i sees token j <= i of the prefix and of its own branch.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    image_mask: np.ndarray
    media: tuple[Media, ...]
    category: str = ""
    positions: np.ndarray | None = None
    branches: np.ndarray | None = None
    questions: int = 1

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass
class Batch:
    """Padded rows as tensors.

    input_ids, attention_mask (bool), image_mask (bool): [B, L]; labels: [B, L] (causal) or [B, T] (seq2seq).
    Distinct media come once: pixels uint8[U, 3, H, W] or features float[U, N, D], and media_index int64[M] names
    the item each block of slots takes, in row order. positions and branches: int64[B, L] or None.
    """

    ids: list[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    image_mask: torch.Tensor
    labels: torch.Tensor
    media_index: torch.Tensor
    pixels: torch.Tensor | None = None
    features: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    branches: torch.Tensor | None = None
    categories: list[str] = field(default_factory=list)
    questions: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        import torch

        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device, non_blocking=True))
        return self

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def tokens(self) -> int:
        """Real (unpadded) input tokens."""
        return int(self.attention_mask.sum())
