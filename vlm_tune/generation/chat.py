"""The model that users hold: it answers questions about images, loads and saves itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_tune.data.chat.requests import request_conversation
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.errors import ArgumentError, ModelError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.model.base_places import BaseArgument, base_choice
from vlm_tune.model.checkpoint import load_model, save_model
from vlm_tune.model.language.decoding import Decoding, check_count
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import check_path
from vlm_tune.precision import dtype_of
from vlm_tune.quoting import quoted


class VisionLanguageModel(VisionLanguageNetwork):
    """A network of tower, connector and LLM that is asked in words, loaded and saved as a folder."""

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
            images = PixelCache(self.processor.images)
            return answer_prompts(self, prompts, decoding, fetch=images, batch_size=batch_size)
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
        check_path("path", path)
        return load_model(
            Path(path),
            dtype=dtype_of(dtype),
            base=base_choice(base, accept_other_base),
            model_class=cls,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads: all that was trained, and what its bases don't hold."""
        check_path("path", path)
        save_model(self, Path(path))
