"""Padded rows as tensors: what a model takes.

Shapes: B rows, L tokens, M media items of a batch, N tokens a media item, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm_tune.data.types import ANSWER_KINDS, IGNORE_INDEX, Media, NativeInputs, Prompt
from vlm_tune.transfer import to_device

if TYPE_CHECKING:
    import torch


@dataclass
class Completions:
    """Completions that were sampled for a batch's prompts, those of one prompt after another.

    N completions, rewarded by F functions, of which C train, as the batch's answers in their order;
    S tokens of these.

    Attributes:
        rewards: float32[N, F], NaN where a function gives none.
        lengths: int64[N], numbers of tokens, with the stop token.
        ended: bool[N], whether a stop token ended them.
        trained: bool[N], whether they train.
        advantages: float32[C], what they are worth beside their group.
        logprobs: float32[S], the tokens' log-probabilities before the first update by them.
        reference: float32[S], those under the reference model.
    """

    rewards: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    trained: torch.Tensor
    advantages: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    reference: torch.Tensor | None = None


@dataclass
class Batch:
    """Padded rows as tensors.

    input_ids, attention_mask (bool), image_mask (bool): [B, L]; labels: [B, L] (causal) or [B, T]
    (seq2seq). Each distinct media item is held once: as pixels, uint8[U, 3, H, W] of images or
    float[U, bins, frames] of audio, or as features float[U, N, D]. media_index int64[M] is the item
    that fills each block of slots, in row order. positions, visible_until, samples (int64[B, L])
    and label_samples (int64[B, T]) are None where no row has them. `cached` batches have features,
    never pixels.

    `slots` int64[P] and `supervised_at` int64[S] are the places of image slots in the flattened
    input_ids and of supervised tokens in the flattened labels, in row order, and `targets` int64[S]
    are those tokens. They are found once, on the host: on a GPU the search for them makes it wait.

    Attributes:
        answers: int64 of the labels' shape, as in `Example`, numbered through the batch; None
            where no row has preferences.
        answer_of: int64[S], the number of the answer that each supervised token belongs to.
        answer_lengths: int64[A], the number of supervised tokens of each answer; A is
            ANSWER_KINDS times the number of prompts whose answers are judged.
        reference: float32[A], as in `Example`.
        task: The task whose adapters its rows train; None where all tasks have the same.
        loss_weight: The factor of its rows' losses.
        objective: The objective of a mixture that its rows train; None where they train all.
        views: uint8[U, 3, H, W], the images of `pixels` augmented otherwise, if asked for.
        prompts: The prompts of the rows, where their answers are to be sampled: the batch has
            their examples, and of each row one list of prompts.
        media_inputs: Of a batch of prompts, what a native model takes of each of their images.
        completions: What was sampled for a batch of prompts.
        slot_tokens: int64[2, P], the connected token that fills each slot: the number of its media
            place, and its own among the tokens of that (`media_slots`); None where they fill
            the slots in order.
        slot_shares: Where a slot is a weighted sum of tokens, their shares, float32[P, 4];
            `slot_tokens` is then int64[2, P, 4].
        patch_places: int64[U, N, 2], the row and column of each patch of images that keep their
            shape, -1 in the padding; their pixels are uint8[U, N, 3 P²] then (`images/patches`).
        token_counts: int64[M], the number of connected tokens that are no padding of each media
            place, where images keep their shape.
        host: Of a batch on another device, the batch as it was on the CPU, without images. What
            the host has to know is read there.
        native: The tensors that a native model takes of its images, by name, in place of pixels.
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
    visible_until: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    label_samples: torch.Tensor | None = None
    categories: list[str] = field(default_factory=list)
    questions: int = 0
    cached: bool = False
    answers: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    slot_tokens: torch.Tensor | None = None
    patch_places: torch.Tensor | None = None
    token_counts: torch.Tensor | None = None
    slot_shares: torch.Tensor | None = None
    task: str | None = None
    loss_weight: float = 1.0
    native: NativeInputs = field(default_factory=dict)
    objective: str | None = None
    views: torch.Tensor | None = None
    prompts: list[list[Prompt]] = field(init=False, default_factory=list)
    media_inputs: dict[Media, NativeInputs] = field(init=False, default_factory=dict)
    completions: Completions | None = field(init=False, default=None)
    slots: torch.Tensor = field(init=False)
    supervised_at: torch.Tensor = field(init=False)
    targets: torch.Tensor = field(init=False)
    answer_of: torch.Tensor | None = field(init=False, default=None)
    answer_lengths: torch.Tensor | None = field(init=False, default=None)
    host: Batch | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.slots = self.image_mask.flatten().nonzero()[:, 0]
        self.supervised_at = (self.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        self.targets = self.labels.flatten()[self.supervised_at]
        if self.answers is not None:
            self.answer_of = self.answers.flatten()[self.supervised_at]
            counts = self.answer_of.bincount()
            prompts = -(-len(counts) // ANSWER_KINDS)
            self.answer_lengths = counts.new_zeros(ANSWER_KINDS * prompts)
            self.answer_lengths[: len(counts)] = counts

    def _tensors(self) -> dict[str, torch.Tensor]:
        import torch

        return {
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }

    def to(self, device: torch.device | str) -> Batch:
        """Moves the tensors to `device` in place and returns the batch.

        The copies to a GPU are only begun, from pinned memory: its stream waits for them.
        """
        import torch

        place = torch.device(device)
        if place.type == "cpu":
            self.host = None
        elif self.host is None and self.input_ids.device.type == "cpu":
            self.host = copy(self)
            self.host.pixels = self.host.features = self.host.views = None
            # Without pixels; a number an item, such as the seconds between times, stays.
            self.host.native = {
                name: tensor
                for name, tensor in self.native.items()
                if tensor.ndim == 1 or not tensor.is_floating_point()
            }
        self._replace_tensors(lambda tensor: to_device(tensor, place))
        return self

    def _replace_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, change(tensor))
        self.native = {name: change(tensor) for name, tensor in self.native.items()}

    def pin_memory(self) -> Batch:
        """Moves the tensors to pinned memory in place and returns the batch."""
        self._replace_tensors(lambda tensor: tensor.pin_memory())
        return self

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Notes that `stream` uses the tensors, which another one has allocated."""
        for tensor in (*self._tensors().values(), *self.native.values()):
            tensor.record_stream(stream)

    @property
    def on_host(self) -> Batch:
        """The batch whose tensors the host reads without waiting for another device."""
        return self if self.host is None else self.host

    @property
    def packed(self) -> torch.Tensor | None:
        """A sample number for each token, [B, L]; None if no row is joined.

        It is the same within a sample and differs between the samples of a row.
        """
        if self.samples is not None:
            return self.samples
        # A sample's first token is visible to the sample's end, and no token of it further.
        return None if self.visible_until is None else self.visible_until.cummax(1).values

    @property
    def branched(self) -> bool:
        """Whether any row has branches."""
        batch = self.on_host
        return batch.visible_until is not None and bool(
            (
                (batch.visible_until != batch.visible_until.cummax(1).values) & batch.attention_mask
            ).any()
        )

    @property
    def longest(self) -> int:
        """The number of positions that the longest sample takes, padding included."""
        positions = self.on_host.positions
        return self.input_ids.shape[1] if positions is None else int(positions.max()) + 1

    @property
    def most_slots(self) -> int:
        """The largest number of image slots of a row."""
        return int(self.on_host.image_mask.sum(1).max())

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.targets)

    @property
    def tokens(self) -> int:
        """The number of input tokens, padding not counted."""
        return int(self.on_host.attention_mask.sum())
