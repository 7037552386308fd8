"""The model that users work with: chat about images, loading and saving."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from vlm_tune.data.images.decode import PixelCache, image_size
from vlm_tune.data.types import Example
from vlm_tune.errors import ArgumentError, ModelError
from vlm_tune.generation.adapters import Adapters
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat_session import Chat
from vlm_tune.generation.choices import check_not_generated, choices_of_each, choose
from vlm_tune.generation.embedding import (
    image_embeddings,
    listed_images,
    listed_texts,
    text_embeddings,
)
from vlm_tune.generation.requests import check_text, image_media, request_conversation
from vlm_tune.generation.streaming import streamed
from vlm_tune.model.base_places import BaseArgument, base_choice
from vlm_tune.model.checkpoint import find_single, save_model
from vlm_tune.model.language.decoding import Decoding, Settings, check_count
from vlm_tune.model.shared_base import load_shared
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import check_path
from vlm_tune.precision import device_of, dtype_of
from vlm_tune.quoting import quoted

Prompt = str | Sequence[Mapping[str, Any]]
"""A question, or the turns of a conversation that ends in one."""


def _request(
    prompt: Prompt | None,
    messages: Sequence[Mapping[str, Any]] | None,
    images: Any,
    audios: Any,
) -> dict[str, Any]:
    if prompt is not None and messages is not None:
        raise ArgumentError("both a prompt and messages: give one")
    name = "prompt" if messages is None else "messages"
    return {name: prompt if messages is None else messages, "images": images, "audios": audios}


def _one_answer(settings: Settings, why: str) -> None:
    """Raises `ArgumentError` if more than one answer is wanted."""
    if settings.get("num_return_sequences", 1) != 1:
        raise ArgumentError(f"{why}: with num_return_sequences, use answer or answer_batch")


class VisionLanguageModel(VisionLanguageNetwork):
    """The model that users work with: it answers prompts with images, loads and saves itself.

    It adds `chat`, `answer`, `stream`, `start_chat`, `embed_images`, `embed_texts`,
    `from_pretrained` and `save_pretrained` to its base class `VisionLanguageNetwork`, which is the
    forward pass alone: tower, connector, splice, LLM. Several threads may ask one model at once.

    Attributes:
        over_base: The further models that `load_adapter` loaded over the same base weights; None
            where `from_pretrained` did not load this model.
    """

    over_base: Adapters[VisionLanguageModel] | None = None

    def chat(
        self,
        prompt: Prompt | None = None,
        images: Any = (),
        audios: Any = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        choices: Sequence[str] | None = None,
        **settings: Unpack[Settings],
    ) -> str:
        r"""Answers one question, greedily if no setting says otherwise.

        Args:
            prompt: a text, or turns as `messages`.
            images: one image or a list, assigned to the places in order; without places they go
                before the first question. An image is a path, a data URL, bytes, a file object, a
                PIL image or a uint8 array [H, W, 3].
            audios: in the same way one audio clip or a list, for a model that hears audio. A clip
                is a path, a data URL, bytes or a file object.
            messages: in place of `prompt`, a list of turns `{"role": ..., "content": ...}`. A
                content is a text or a list of parts, `{"type": "text", "text": ...}`,
                `{"type": "image"}`, which may hold its image under the key `image`, or
                `{"type": "image_url", "image_url": {"url": ...}}`. `<image>` in a text marks the
                place of an image, `\<image>` is the literal text. For audio there are
                `{"type": "audio"}` and `{"type": "input_audio", "input_audio": {"data": ...}}`, and
                `<audio>` is a mark where there is some.
            choices: texts of which the likeliest is the answer.
            **settings: how the answer is generated: `max_new_tokens` (128), `num_beams`,
                `temperature`, `top_p`, `top_k`, `min_p`, `seed`, `repetition_penalty`,
                `stop_strings`; see `Decoding`.

        Raises:
            DataError: turns or images are invalid, or places and images differ in number.
            ArgumentError: a setting is of the wrong type, out of range or without effect, or
                `choices` is no list of different texts.
        """
        request = _request(prompt, messages, images, audios)
        return self.chat_batch([request], choices=choices, **settings)[0]

    def chat_batch(
        self,
        requests: Sequence[str | Mapping[str, Any]],
        *,
        choices: Sequence[str] | Sequence[Sequence[str]] | None = None,
        batch_size: int = 32,
        **settings: Unpack[Settings],
    ) -> list[str]:
        """Answers many questions, in their order, each as `chat` would.

        Args:
            requests: texts, or mappings `{"prompt": ..., "images": ...}` (or `"messages"`,
                `"image"`, `"audios"`, `"audio"`) with values as in `chat`.
            choices: as in `chat` for all requests, or a list for each.
            batch_size: the approximate number of requests in a batch.
            **settings: as in `chat`.

        Raises:
            DataError: as `chat`; the message has the request's number, from 1.
            ArgumentError: as `chat`, also for `batch_size`, and if `requests` is not a list.
        """
        _one_answer(settings, "chat returns one text")
        answers = self.answer_batch(requests, choices=choices, batch_size=batch_size, **settings)
        return [answer.text for answer in answers]

    def answer(
        self,
        prompt: Prompt | None = None,
        images: Any = (),
        audios: Any = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        choices: Sequence[str] | None = None,
        **settings: Unpack[Settings],
    ) -> Answer:
        """As `chat`, but returns the answer with all that is known of it.

        That is why it ended, its token ids, with `logprobs=True` their log-probabilities, with
        `num_return_sequences` the further answers, and with `choices` the probability of each.
        """
        request = _request(prompt, messages, images, audios)
        return self.answer_batch([request], choices=choices, **settings)[0]

    def answer_batch(
        self,
        requests: Sequence[str | Mapping[str, Any]],
        *,
        choices: Sequence[str] | Sequence[Sequence[str]] | None = None,
        batch_size: int = 32,
        **settings: Unpack[Settings],
    ) -> list[Answer]:
        """As `chat_batch`, but returns each answer as `answer` does.

        What requests share is computed once: an image that several ask about, a question of which
        several answers are drawn, or whose choices are compared.
        """
        if isinstance(requests, str | Mapping) or not isinstance(requests, Iterable):
            raise ArgumentError(f"requests: expected a list, got {quoted(requests)}")
        decoding = Decoding.of(settings)
        check_count("batch_size", batch_size)
        conversations = [
            request_conversation(number, request) for number, request in enumerate(requests, 1)
        ]
        images = PixelCache(self.processor.images)
        if choices is not None:
            check_not_generated(settings)
            of_each = choices_of_each(choices, len(conversations))
            with self.evaluating():
                return choose(self, conversations, of_each, fetch=images, batch_size=batch_size)
        prompts = self.processor.thinking(decoding.enable_thinking).prompts(conversations)
        with self.evaluating():
            return prompt_answers(self, prompts, decoding, fetch=images, batch_size=batch_size)

    def stream(
        self,
        prompt: Prompt | None = None,
        images: Any = (),
        audios: Any = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[str]:
        """As `chat`, but yields the answer's text in pieces, as it is written."""
        _one_answer(settings, "a stream has one answer")
        decoding = Decoding.of(settings)
        request = request_conversation(1, _request(prompt, messages, images, audios))
        (example,) = self.processor.thinking(decoding.enable_thinking).prompts([request])
        return self._streamed(example, decoding)

    def _streamed(self, prompt: Example, decoding: Decoding) -> Iterator[str]:
        with self.evaluating():
            yield from streamed(self, prompt, decoding, self.processor.images.inputs)

    def read_regions(self, text: str, image: Any) -> list[tuple[float, ...]]:
        """The boxes and points of an answer, by the model's convention (`boxes` of its config).

        Args:
            text: an answer about the image.
            image: the image, as in `chat`.

        Returns:
            x1, y1, x2, y2 of each box and x, y of each point, in pixels of the image, in their
            order in the text.

        Raises:
            DataError: the image can't be read.
        """
        check_text("text", text)
        size = image_size(image_media(image))
        return [each.coordinates for each in self.processor.grounding.read(text, size)]

    def embed_images(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """Returns unit vectors fp32[I, E] of images, to compare with those of `embed_texts`.

        A vector is the mean of the connector's outputs, in the space of the LLM's embeddings: what
        `objective: {kind: contrastive}` trains. The dot product with a text's vector is their
        similarity, which says little of a model that was not trained this way.

        Args:
            images: a list of images, each in a form that `chat` takes.
            batch_size: the number of images in a batch.

        Raises:
            DataError: an image is invalid; the message has its number, from 1.
            ModelError: the connector reads the question with the image.
            ArgumentError: `images` is no list, or is empty, or `batch_size` is out of range.
        """
        media = listed_images(images)
        with self.evaluating():
            return image_embeddings(self, media, batch_size)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Returns unit vectors fp32[T, E] of texts, to compare with those of `embed_images`.

        A vector is the sum of the embeddings of the text's tokens, as of a caption in training.

        Args:
            texts: a list of texts.
            batch_size: the number of texts in a batch.

        Raises:
            DataError: a text has no token, or is longer than the model's rows.
            ArgumentError: `texts` is no list of texts, or is empty, or `batch_size` is out of
                range.
        """
        captions = listed_texts(texts)
        with self.evaluating():
            return text_embeddings(self, captions, batch_size)

    def start_chat(self, system: str | None = None, **settings: Unpack[Settings]) -> Chat:
        """Begins a conversation of several turns, whose past is computed once.

        Args:
            system: the system text; the model's by default.
            **settings: how its answers are generated, as in `chat`.
        """
        return Chat(self, system, **settings)

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
        task: str | None = None,
        dtype: str | torch.dtype | None = None,
        base: BaseArgument = None,
        accept_other_base: bool = False,
        device: str | torch.device | None = None,
    ) -> VisionLanguageModel:
        """Loads the model of a run, a checkpoint or a merged folder, in eval mode.

        Args:
            path: the folder.
            task: the task whose model it is, of a run whose tasks have adapters of their own.
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
        place = device_of(device)
        model, shared = load_shared(
            find_single(Path(path), task),
            dtype=dtype_of(dtype),
            base=base_choice(base, accept_other_base),
            device=place,
            model_class=cls,
        )
        model.over_base = Adapters(shared)
        return model

    def load_adapter(self, path: str | Path, name: str) -> VisionLanguageModel:
        """Loads a further run that was trained over the same base weights.

        The base is in memory once. The run's LoRA adapters, connector, virtual tokens, trained rows
        and, if it is another one, its tower are its own. No model's answers depend on the others,
        so several threads may ask several adapters at once. Nothing has to be switched on: the
        adapter's model is what answers.

        Args:
            path: the run, checkpoint or model folder.
            name: the name for `adapter` and `delete_adapter`.

        Returns:
            The model, in this one's dtype and on its device, in eval mode.

        Raises:
            ModelError: its LLM's base weights are not this model's, or this model is not one that
                `from_pretrained` loaded; or as `from_pretrained`.
            ArgumentError: the name is no text, or is taken.
            RecipeError: the path is not one.
        """
        check_path("path", path)
        adapters = self._loaded()
        model = adapters.load(Path(path), name, type(self))
        model.over_base = adapters
        return model

    def adapter(self, name: str) -> VisionLanguageModel:
        """The model that `load_adapter` loaded under a name.

        Raises `ArgumentError` if there is none.
        """
        return self._loaded().get(name)

    def delete_adapter(self, name: str) -> None:
        """Forgets the adapter of that name; its memory is free when nobody uses its model.

        Raises `ArgumentError` if there is none.
        """
        self._loaded().delete(name)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded over this model's base."""
        return () if self.over_base is None else self.over_base.names

    def _loaded(self) -> Adapters[VisionLanguageModel]:
        if self.over_base is None:
            raise ModelError(
                "adapters are loaded over a model that from_pretrained loaded; this one is built "
                "or copied"
            )
        return self.over_base

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder for `from_pretrained`, with all weights except unchanged base weights."""
        check_path("path", path)
        save_model(self, Path(path))
