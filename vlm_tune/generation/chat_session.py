"""A chat of several turns, whose past is not computed again for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch

from vlm_tune.data.batching.collate import collate
from vlm_tune.data.chat.image_marks import escaped_marks
from vlm_tune.data.chat.reasoning import FIELDS
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.media_slots import owners, slots_of
from vlm_tune.data.packing import Tree
from vlm_tune.data.types import Conversation, Example, Media, Message
from vlm_tune.errors import ArgumentError
from vlm_tune.generation.answering import continuation_of, reader_of, shares_prefix
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.choices import check_not_generated, choices_of_each, choose
from vlm_tune.generation.requests import check_text, request_conversation
from vlm_tune.generation.streaming import Pieces, picker_of, pieces, streamed
from vlm_tune.model.language.decoding import Decoding, Settings
from vlm_tune.model.language.kv_cache import crop_cache
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import quoted


class Chat:
    """A conversation with a model, begun by `VisionLanguageModel.start_chat`.

    A decoder's KV cache of the conversation so far is kept, so that only the new turn is prefilled;
    the answers are those of `VisionLanguageModel.chat` with all turns. The whole is read each time
    by an encoder-decoder, a native model, a model with virtual tokens or one whose samples can't be
    joined in rows, and one whose connector reads the question or attends from the LLM's layers; and
    so it is in a beam search and for `choices`.

    One thread at a time may use a chat. After a change of the model's weights, begin a new one.

    Attributes:
        turns: The turns so far.
        settings: How answers are generated where a call does not say it.
    """

    def __init__(
        self,
        model: VisionLanguageNetwork,
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """Begins without turns.

        Args:
            model: The model.
            system: The system text; the model's by default.
            **settings: How answers are generated, see `Decoding`.

        Raises:
            ArgumentError: A setting is invalid, or the system text is no text.
        """
        _decoding(settings)
        self.model = model
        self.settings = settings
        self.system = system
        self.turns: list[Message] = []
        self._prefix = _Prefix()

    @property
    def system(self) -> str | None:
        """The system text of this chat; None for the model's.

        Raises:
            ArgumentError: What it is set to is no text.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None:
            check_text("the system text", text)
        self._system = text

    def ask(
        self,
        prompt: str,
        images: Any = (),
        audios: Any = (),
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[Settings],
    ) -> Answer:
        """Answers a further question.

        Args:
            prompt: The question.
            images: One image or a list, as for `VisionLanguageModel.chat`, for this question.
            audios: One audio clip or a list, likewise.
            choices: Texts of which the likeliest is the answer. The whole chat is read for them.
            **settings: How this answer is generated.

        Raises:
            DataError: An image is invalid, places and images differ in number, or the chat has
                become longer than the model takes; the chat is as before.
            ArgumentError: A setting is invalid, or has no effect on `choices`.
        """
        if choices is not None:
            check_not_generated(settings)
            of_each = choices_of_each(choices, 1)
            conversation = self._with_question(prompt, images, audios)
            with self.model.evaluating():
                fetch = PixelCache(self.model.processor.images)
                (answer,) = choose(self.model, [conversation], of_each, fetch=fetch)
            self.turns += [conversation.messages[-1], Message("assistant", (answer.text,))]
            return answer
        answering = self.stream(prompt, images, audios, **settings)
        while True:
            try:
                next(answering)
            except StopIteration as end:
                return end.value

    def stream(
        self, prompt: str, images: Any = (), audios: Any = (), **settings: Unpack[Settings]
    ) -> Pieces:
        """As `ask`, but yields the answer's text in pieces.

        Where the iterator is closed before its end, the chat continues from what was yielded.
        """
        decoding = _decoding({**self.settings, **settings})
        conversation = self._with_question(prompt, images, audios)
        processor = self.model.processor.thinking(decoding.enable_thinking)
        (example,) = processor.prompts([conversation])
        return self._answer(conversation.messages[-1], example, decoding)

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns = []
        self._prefix = _Prefix()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system text and the turns so far, as `VisionLanguageModel.chat` takes them."""
        return [
            {
                "role": message.role,
                "content": [_content(message.role, part) for part in message.parts],
                **({FIELDS[0]: message.reasoning} if message.reasoning else {}),
            }
            for message in self._opened()
        ]

    def _opened(self) -> list[Message]:
        system = [] if self.system is None else [Message("system", (self.system,))]
        return [*system, *self.turns]

    def _with_question(self, prompt: str, images: Any, audios: Any) -> Conversation:
        """The conversation so far with a further question."""
        if not isinstance(prompt, str):
            raise ArgumentError(f"a chat's question must be a string, got {quoted(prompt)}")
        number = len(self.turns) // 2 + 1
        request = request_conversation(
            number, {"prompt": prompt, "images": images, "audios": audios}
        )
        return replace(request, messages=(*self._opened(), *request.messages))

    def _answer(self, question: Message, example: Example, decoding: Decoding) -> Pieces:
        answer: Answer | None = None
        text = ""
        try:
            with self.model.evaluating():
                answering = self._pieces(example, decoding)
                while answer is None:
                    try:
                        piece = next(answering)
                    except StopIteration as end:
                        answer = end.value
                    else:
                        text += piece
                        yield piece
            return answer
        finally:
            # Also an answer that was broken off is one, if there was something of it.
            if answer is not None or text:
                parts = (text,) if text else ()
                reasoning = (answer.reasoning or "") if answer else ""
                self.turns += [question, Message("assistant", parts, reasoning=reasoning)]

    def _pieces(self, prompt: Example, decoding: Decoding) -> Pieces:
        model = self.model
        # A native model reads images with whole rows, so none may be in a cache.
        if shares_prefix(model, decoding) and not model.llm.native:
            return self._prefix.continued(model, prompt, decoding)
        return streamed(model, prompt, decoding, PixelCache(model.processor.images))


def _decoding(settings: Settings) -> Decoding:
    decoding = Decoding.of(settings)
    if decoding.num_return_sequences > 1:
        raise ArgumentError("a chat has one answer a turn: num_return_sequences is 1")
    return decoding


def _content(role: str, part: str | Media) -> dict[str, Any]:
    """A part of a turn, as `VisionLanguageModel.chat` takes it."""
    if isinstance(part, Media):
        return {"type": part.modality, part.modality: part.source}
    # An answer's text has no marks.
    return {"type": "text", "text": part if role == "assistant" else escaped_marks(part)}


class _Prefix:
    """A decoder's KV cache of the tokens of a chat so far.

    Attributes:
        keys: What each token in the cache is: (id, None), or for an image's slot its number in
            the image, and the image.
    """

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.cache: Any = None

    def continued(
        self, model: VisionLanguageNetwork, prompt: Example, decoding: Decoding
    ) -> Pieces:
        """Answers a prompt, of which only what follows the cached tokens is prefilled."""
        from transformers import DynamicCache

        keys = _keys(prompt, model.processor.spec.tokens_per_image)
        # At least one token is computed, whose hidden states predict the answer's first one.
        cached = min(_common(self.keys, keys), len(keys) - 1)
        # An image is computed as a whole.
        cached -= keys[cached][0] if keys[cached][1] else 0
        if self.cache is None:
            self.cache = DynamicCache()
        crop_cache(self.cache, cached)
        self.keys = self.keys[:cached]
        rest = prompt_rest(prompt, cached, model.processor.spec.tokens_per_image)
        spec = model.processor.spec
        batch = collate([prompt], spec).to(model.device)
        rest_batch = collate([rest], spec, fetch=model.processor.images).to(model.device)
        reader = reader_of(model, decoding)
        with torch.inference_mode():
            embeds = model.embed(rest_batch)
        row = Tree(prompt, (0,), (len(keys) - 1,))
        continuation = continuation_of(
            model,
            batch,
            [row],
            decoding,
            picker_of(model, prompt, decoding),
            reader,
            embeds=embeds,
            cache=self.cache,
        )
        try:
            return (yield from pieces(continuation, reader))
        finally:
            answer = [(token, None) for token in continuation.ids[0, 0].tolist()]
            # An answer's last token is not fed back.
            computed = min(layer.get_seq_length() for layer in self.cache.layers)
            self.keys = [*keys, *answer][:computed]


def _keys(prompt: Example, tokens_per_image: int) -> list[tuple[int, Any]]:
    keys: list[tuple[int, Any]] = [(token, None) for token in prompt.input_ids.tolist()]
    frames = owners(prompt.media, tokens_per_image)
    slots = prompt.image_mask.nonzero()[0]
    for frame in np.unique(frames):
        # What ends the rows of an image belongs to it.
        places = slots[frames == frame]
        image = prompt.media[frame]
        for number, place in enumerate(range(places[0], places[-1] + 1)):
            keys[place] = (number, (image.source, image.tile))
    return keys


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def prompt_rest(prompt: Example, start: int, tokens_per_image: int) -> Example:
    """The prompt without its first `start` tokens and their images."""
    slots = np.cumsum([slots_of(frame, tokens_per_image) for frame in prompt.media])
    # Tiles without slots of their own go with the frame before them.
    images = int((slots <= prompt.image_mask[:start].sum()).sum())
    return replace(
        prompt,
        input_ids=prompt.input_ids[start:],
        labels=prompt.labels[start:],
        image_mask=prompt.image_mask[start:],
        media=prompt.media[images:],
    )
