"""Compares chats with those of a native model's own processor, and makes it write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.data.chat.own_template import image_text, message, refusal, video_text
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.data.images.decode import decode_image, encoded_bytes
from vlm_tune.data.images.native import NativeImages, video_options
from vlm_tune.data.types import Conversation, Media, Message, Video
from vlm_tune.errors import DataError
from vlm_tune.model.pretrained.native import renderer
from vlm_tune.model.pretrained.native_images import tried_images
from vlm_tune.model.pretrained.native_videos import encoded, tried_video


def fit_template(processor: Processor, native: Any, *, saved: bool) -> None:
    """Makes a native model's own processor write chats as they are trained.

    The checkpoint's own template is compared with it, and stays unless the recipe has a system
    text. Another chat format takes its place.

    Args:
        processor: the processor of the model.
        native: transformers' own, changed in place.
        saved: whether it comes from a folder that was saved so.

    Raises:
        DataError: the checkpoint's own template gives other ids.
    """
    if saved:
        return
    if processor.template.name == OWN_TEMPLATE:
        plain = replace(processor, system=None)
        check_own_template(plain, native)
        if plain.template.switched is not None:
            try:
                check_own_template(replace(plain, template=plain.template.switched), native)
            except DataError:  # only the mode that nothing has asked for is missing
                processor.template = processor.template.model_copy(update={"switched": None})
        if processor.system is None:
            return
    render = renderer(native)
    text = processor_jinja(
        processor.template, processor.system, image_text(render), video=video_text(render)
    )
    native.chat_template = native.tokenizer.chat_template = text


def check_own_template(processor: Processor, native: Any) -> None:
    """Compares the ids of conversations with those of a native model's own processor.

    Raises `DataError` where they differ.
    """
    template = processor.template
    images = processor.images
    videos = isinstance(images, NativeImages) and bool(images.video_text)
    reasons = template.reasoning is not None
    for row in _tried_rows(system=bool(template.system), reasoning=reasons, videos=videos):
        example = processor.examples(row)[-1]
        trained = [*example.input_ids.tolist(), int(example.labels[-1])]
        theirs = _their_ids(native, row.messages, template, opened=False)
        # Where a template leaves the end of an answer to the next turn, the last one has none.
        ended = trained[:-1] if len(theirs) == len(trained) - 1 else trained
        _compare(ended, theirs[: len(trained)])
        _compare(
            processor.prompt(row).input_ids.tolist(),
            _their_ids(native, row.messages[:-1], template, opened=True),
        )


def _compare(ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        raise refusal(f"token {place} of a conversation would differ from the processor's")


def _their_ids(
    native: Any, messages: Sequence[Message], template: ChatTemplate, *, opened: bool
) -> list[int]:
    return chat_inputs(native, messages, template, opened=opened)["input_ids"][0].tolist()


def chat_inputs(
    native: Any, messages: Sequence[Message], template: ChatTemplate, *, opened: bool
) -> Any:
    """The arguments of a forward pass that a native model's own processor makes of turns.

    Args:
        native: transformers' processor of the whole model.
        messages: the turns, whose images and videos are read.
        template: the chat format, which names reasoning and chooses its mode.
        opened: whether an answer is opened after them.
    """
    turns = [message(turn.role, *map(_decoded, turn.parts)) for turn in messages]
    for turn, ours in zip(turns, messages, strict=True):
        if ours.reasoning and template.reasoning is not None:
            turn[template.reasoning.name] = ours.reasoning
    mode = template.enable_thinking
    switches = {} if mode is None else {"enable_thinking": mode}
    shown = [part for turn in messages for part in turn.parts if isinstance(part, Media)]
    videos = [item.source for item in shown if isinstance(item.source, Video)]
    options = {"processor_kwargs": video_options(videos)} if videos else {}
    return native.apply_chat_template(
        turns,
        add_generation_prompt=opened,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
        **switches,
    )


def _decoded(part: str | Media) -> Any:
    """A part of a turn, as `message` takes it."""
    if isinstance(part, str):
        return part
    if isinstance(part.source, Video):
        return [_decoded(frame) for frame in part.source.frames]
    return decode_image(encoded_bytes(part), part.name)


def _tried_rows(*, system: bool, reasoning: bool, videos: bool) -> list[Conversation]:
    """Conversations with images at several places, white space, system text, reasoning, videos."""
    images = [Media(encoded(image)) for image in tried_images()]
    question = Message("user", (images[0], "What is it?"))
    answer = Message("assistant", ("A wide one.",))
    compared = Message("user", ("And is ", images[0], " like ", images[1], " here?"))
    words = Message("user", (" What else? ",))
    rows = [
        (question, answer),
        (question, answer, compared, Message("assistant", ("No: one is high.",))),
        (words, Message("assistant", (" Nothing. ",))),
    ]
    if reasoning:
        thought = replace(answer, reasoning="\n Its sides \n differ. ")
        rows += [(question, thought), (question, thought, compared, thought)]
    if videos:
        shown = Media(tried_video(tried_images()[0], 3), "video")
        seen = Message("user", ("Here:", shown, "What happens? ", images[1]))
        rows.append((seen, answer, question, answer))
    if system:
        rows.append((Message("system", ("Be brief.",)), compared, answer, words, answer))
    return [Conversation(f"tried {number}", turns) for number, turns in enumerate(rows)]
