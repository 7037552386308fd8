"""The model that users hold: chat about images, loading and saving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_tune.data.images.decode import PixelCache
from vlm_tune.errors import ArgumentError, ModelError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.requests import request_conversation
from vlm_tune.model.base_places import BaseArgument, base_choice
from vlm_tune.model.checkpoint import load_model, save_model
from vlm_tune.model.language.decoding import Decoding, check_count
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import check_path
from vlm_tune.precision import device_of, dtype_of
from vlm_tune.quoting import quoted


class VisionLanguageModel(VisionLanguageNetwork):
    """The model that users hold: it answers prompts with images, loads and saves itself.

    It adds `chat`, `chat_batch`, `from_pretrained` and `save_pretrained` to its base class
    `VisionLanguageNetwork`, which is the forward pass alone: tower, connector, splice, LLM.
    Several threads may ask one model at once.
    """

    def chat(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Any = (),
        *,
        max_new_tokens: int = 128,
        num_beams: int = 1,
    ) -> str:
        r"""Answers one question, by greedy search or with `num_beams` by beam search.

        Args:
            prompt: a text, or a list of turns `{"role": ..., "content": ...}`. A content is a text
                or a list of parts, `{"type": "text", "text": ...}` or `{"type": "image"}`, which
                may hold its image under the key `image`. `<image>` in a text marks the place of an
                image, `\<image>` is the literal text.
            images: one image or a list, assigned to the places in order; without places they go
                before the first question. An image is a path, a data URL, bytes, a file object, a
                PIL image or a uint8 array [H, W, 3].
            max_new_tokens: the most tokens of the answer.
            num_beams: the number of beams; 1 is greedy search.

        Raises:
            DataError: turns or images are invalid, or places and images differ in number.
            ArgumentError: `max_new_tokens` or `num_beams` is not an integer, or out of range.
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
        """Answers many questions, in their order.

        Args:
            requests: texts, or mappings `{"prompt": ..., "images": ...}` (or `"image"`) with values
                as in `chat`.
            max_new_tokens: the most tokens of an answer.
            num_beams: the number of beams; 1 is greedy search.
            batch_size: the approximate number of requests in a batch.

        Raises:
            DataError: as `chat`; the message has the request's number, from 1.
            ArgumentError: as `chat`, also for `batch_size`, and if `requests` is not a list.
        """
        if isinstance(requests, str | Mapping) or not isinstance(requests, Iterable):
            raise ArgumentError(f"chat_batch takes a list of requests, got {quoted(requests)}")
        decoding = Decoding(max_new_tokens, num_beams)
        check_count("batch_size", batch_size)
        prompts = self.processor.prompts(
            [request_conversation(number, request) for number, request in enumerate(requests, 1)]
        )
        images = PixelCache(self.processor.images)
        with self.evaluating():
            return answer_prompts(self, prompts, decoding, fetch=images, batch_size=batch_size)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "a model can't be pickled: "
            "write a folder by save_pretrained and read it by from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        base: BaseArgument = None,
        accept_other_base: bool = False,
        device: str | torch.device | None = None,
    ) -> VisionLanguageModel:
        """Loads the model of a run, a checkpoint or a merged folder, in eval mode.

        Args:
            path: the folder.
            dtype: of the weights, such as torch.bfloat16, "bfloat16" or "bf16"; by default the
                precision in the folder's config.
            base: the LLM's new location, or `{"llm": ..., "tower": ...}`; by default the recorded
                locations of the base weights.
            accept_other_base: whether base weights other than those that it was trained over are
                accepted.
            device: where the model goes, such as "cpu" or "cuda:1"; by default the GPU if there is
                one.

        Raises:
            ModelError: as `load_model`, or there is no such device.
            RecipeError: an argument is not a path.
        """
        check_path("path", path)
        return load_model(
            Path(path),
            dtype=dtype_of(dtype),
            base=base_choice(base, accept_other_base),
            device=device_of(device),
            model_class=cls,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder for `from_pretrained`, with all weights except unchanged base weights."""
        check_path("path", path)
        save_model(self, Path(path))
