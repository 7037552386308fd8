"""The processor between conversations and tensors, for training and for chat.

One object holds the tokenizer, the chat template and the image preprocessing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlm_tune.config.boxes import Boxes
from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.data.affine import Affine
from vlm_tune.data.chat.grounding import Grounding
from vlm_tune.data.chat.segments import joined_texts
from vlm_tune.data.chat.template import ChatTemplate, load_template
from vlm_tune.data.chat.tokenize import LAYOUTS, TextEncoder
from vlm_tune.data.images.shaped import ShapedImages
from vlm_tune.data.media_processor import MediaProcessor
from vlm_tune.data.media_slots import segment_slots
from vlm_tune.data.packing import numbered, pair_layout
from vlm_tune.data.regions import FIRST_LOCATION
from vlm_tune.data.types import CHOSEN, REJECTED, Conversation, Example, InputSpec, Media, Segment
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CALLED = {"image": "images", "audio": "audio"}
"""Modalities in messages."""
LONGEST = 4_194_304
"""Image tokens of a row beyond which it is refused before it is laid out, to spare the memory."""


@dataclass
class Processor:
    """Turns conversations into examples.

    Raises `DataError` if template, layout and tokenizer do not fit together.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    spec: InputSpec
    images: MediaProcessor
    system: str | None = None
    words: tuple[str, ...] = ()
    """Tokens that were added to the vocabulary; texts may contain them."""
    boxes: Boxes = field(default_factory=Boxes)
    """How the model reads and writes boxes and points."""
    encoder: TextEncoder = field(init=False)

    def __post_init__(self) -> None:
        if self.spec.layout not in self.template.layouts:
            raise DataError(
                f"the chat format {quoted(self.template.name)} is for "
                f"{' and '.join(self.template.layouts)} models, this one is {self.spec.layout}",
                source="data.template",
            )
        clashing = [word for word in self.words if word in self.template.control_tokens]
        if clashing:
            message = (
                f"{quoted(clashing[0])} is a control token of the chat format "
                f"{quoted(self.template.name)}, which no text may hold"
            )
            raise DataError(message, source="model.llm.added_tokens")
        self.encoder = TextEncoder(self.tokenizer, self.words)
        for name in self.template.control_tokens:
            self.encoder.control(name)
        for end in self.template.end_texts:
            if len(self.encoder.text(end, "text")) != 1:
                raise DataError(
                    f"the chat format {quoted(self.template.name)} ends an answer with "
                    f"{quoted(end)}, which is no single token of the model's tokenizer: choose the "
                    "chat format the model was made with",
                    source="data.template",
                )
        for name in self.images.controls:
            self.encoder.control(name)
        for name in self.images.markers:
            if not self.encoder.has(name):
                option = "row_ends" if isinstance(self.images, ShapedImages) else "split"
                raise DataError(
                    f"the model's tokenizer has no {quoted(name)}, which stands around an image: "
                    f"name it in model.llm.added_special_tokens, or leave out {option}",
                    source=f"model.tower.{option}",
                )
            self.encoder.control(name)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the tokenizer out: workers that prepare rows do not import transformers."""
        return {**self.__dict__, "tokenizer": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Processor:
        # A processor is never changed, so the copy of a model shares it. The default copy would use
        # `__getstate__` and lose the tokenizer.
        return self

    def variant(
        self, template: str | None, system: str | None, enable_thinking: bool | None = None
    ) -> Processor:
        """This processor with another chat format, system text or mode of reasoning, if not None.

        Raises `DataError` if the chat format has no switch `enable_thinking`.
        """
        if template == self.template.name == OWN_TEMPLATE:
            template = None
        chosen = self.template if template is None else load_template(template)
        chosen = chosen.with_thinking(enable_thinking)
        system = self.system if system is None else system
        if chosen is self.template and system == self.system:
            return self
        return replace(self, template=chosen, system=system)

    def thinking(self, enable: bool | None) -> Processor:
        """This processor in a mode of `enable_thinking`; None is its own.

        Raises `DataError` if the chat format has no such switch.
        """
        template = self.template.with_thinking(enable)
        if template is self.template:
            return self
        # A tokenizer takes long to read, and `copy` leaves it out.
        switched = object.__new__(type(self))
        changed = {name: value for name, value in vars(self).items() if name != "_marks"}
        vars(switched).update(changed | {"template": template})
        return switched

    def fingerprint(self) -> str:
        """A hash that changes whenever the examples that the processor makes change."""
        parts = (
            self.encoder.described(),
            self.template.model_dump_json(),
            self.spec,
            self.system,
            self.images.modality,
            self.images.layout,
            self.boxes,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def grounding(self) -> Grounding:
        """Writes rows' boxes and points, and reads the model's."""
        return Grounding(self.boxes, self.images)

    def written(self, conversation: Conversation, moved: Sequence[Affine] = ()) -> Conversation:
        """The row with its boxes and points as the model writes them; see `Grounding.written`.

        Raises `DataError` for a box that the model does not see, and for a convention of tokens
        that the tokenizer lacks.
        """
        written = self.grounding.written(conversation, moved)
        if (
            written is not conversation
            and self.boxes.unit == "loc"
            and not self.encoder.has(FIRST_LOCATION)
        ):
            raise DataError(
                f"the model's tokenizer has no {FIRST_LOCATION}, which boxes would be written "
                "with: choose another model.boxes.unit",
                source="model.boxes",
                kind="box",
            )
        return written

    def _lay_out(self, conversation: Conversation, *, prompt_only: bool) -> list[Example]:
        conversation = self.shown(self.written(conversation))
        turns = self.template.segments(conversation, prompt_only=prompt_only, system=self.system)
        segments = joined_texts(self._framed(turns, conversation))
        slots = sum(segment_slots(segment, self.spec.tokens_per_image) for segment in segments)
        if slots > LONGEST:
            raise DataError(
                f"its images take {slots:,} tokens; "
                f"a row has at most {LONGEST:,}, and data.max_length is "
                f"{self.spec.max_length:,}. A smaller grid, or fewer queries or tiles, take fewer",
                source=conversation.source,
                row=conversation.row or conversation.id,
                kind="overlong",
            )
        return LAYOUTS[self.spec.layout](conversation, segments, self.encoder, self.spec)

    def shown(self, conversation: Conversation) -> Conversation:
        """The row with each video as the model takes it: whole, or as its frames."""
        if all(item.modality != "video" for item in conversation.items):
            return conversation
        messages = [
            replace(
                message,
                parts=tuple(
                    shown
                    for part in message.parts
                    for shown in ((part,) if isinstance(part, str) else self.images.parts(part))
                ),
            )
            for message in conversation.messages
        ]
        return replace(conversation, messages=tuple(messages))

    def _framed(self, segments: Sequence[Segment], conversation: Conversation) -> Iterator[Segment]:
        """The segments with each image replaced by its frames and what marks them."""
        place = 0
        for segment in segments:
            if not isinstance(segment.payload, Media):
                yield segment
                continue
            try:
                self._check_modality(segment.payload)
                count = len(conversation.items)
                yield from map(self._marker, self.images.segments(segment.payload, place, count))
                place += 1
            except DataError as error:
                raise DataError(
                    error.message,
                    source=conversation.source,
                    row=conversation.row or conversation.id,
                    kind=error.kind,
                ) from None

    def _check_modality(self, media: Media) -> None:
        """Raises `DataError` for a medium that the model's tower does not take."""
        # A video is images too.
        modality = media.pictures[0].modality
        if modality != self.images.modality:
            raise DataError(
                f"{media.name}: {CALLED[modality]}, and the model's tower takes "
                f"{CALLED[self.images.modality]} (model.tower.kind)",
                kind="modality",
            )

    def _marker(self, segment: Segment) -> Segment:
        """A segment of an image; a marker that the tokenizer has no token for is plain text."""
        if segment.kind == "control" and not self.encoder.has(str(segment.payload)):
            return replace(segment, kind="text")
        return segment

    def examples(self, conversation: Conversation) -> list[Example]:
        """Examples to train on.

        A row of preferences gives one, in which its prompt stands once, and one whose earlier
        answers have reasoning one for each answer. Raises `DataError` if one of them has no
        supervised token, or an answer what ends answers.
        """
        self.template.check_ends(conversation)
        examples = [
            example
            for sample in self.template.samples(self.written(conversation))
            for example in self._lay_out(sample, prompt_only=False)
        ]
        examples = [
            replace(example, id=f"{conversation.id}#{number}" if number else conversation.id)
            for number, example in enumerate(examples)
        ]
        if conversation.rejected is not None:
            other = replace(
                conversation, messages=(*conversation.messages[:-1], conversation.rejected)
            )
            (rejected,) = self._lay_out(other, prompt_only=False)
            examples = [pair_layout(examples[0], rejected, self.spec.layout)]
        elif conversation.desirable is not None:
            examples = [numbered(examples[0], CHOSEN if conversation.desirable else REJECTED)]
        if any(example.supervised == 0 for example in examples):
            raise DataError(
                "it has no supervised token, so it would train nothing",
                row=conversation.id,
                kind="unsupervised",
            )
        return examples

    def prompt(self, conversation: Conversation) -> Example:
        """The prompt for generation: all but the last answer, and the assistant's turn opened."""
        return self._lay_out(conversation, prompt_only=True)[-1]

    def prompts(self, conversations: Sequence[Conversation]) -> list[Example]:
        """`prompt` of each conversation.

        Raises `DataError` for one longer than `max_length`, and for one without a token: where the
        chat format adds none, an empty question has none.
        """
        prompts = [self.prompt(conversation) for conversation in conversations]
        for prompt in prompts:
            if not len(prompt.input_ids):
                raise DataError(
                    "the question has no text and no media",
                    row=prompt.id,
                    kind="empty_question",
                )
        self.check_lengths(prompts)
        return prompts

    def check_lengths(self, examples: Sequence[Example]) -> None:
        """Raises `DataError` for an example longer than `max_length`."""
        for example in examples:
            if len(example.input_ids) > self.spec.max_length:
                raise DataError(
                    f"{len(example.input_ids)} tokens, more than {self.spec.max_length}",
                    row=example.id,
                    kind="overlong",
                )

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's trained end tokens and the tokenizer's EOS."""
        ends = [self.encoder.control(end) for end in self.template.ends]
        texts = [
            token for end in self.template.end_texts for token in self.encoder.text(end, "text")
        ]
        return list(dict.fromkeys([*ends, *texts, self.spec.eos_id]))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes generated ids to text, with control tokens and outer white space removed."""
        return self.raw_text(ids).strip()

    def raw_text(self, ids: Sequence[int]) -> str:
        """Decodes generated ids to text, with control tokens removed but for marks of reasoning."""
        texts: list[str] = []
        start = 0
        for place, token in enumerate(ids) if self._marks else ():
            if token in self._marks:
                texts += [self._text_of(ids[start:place]), self._marks[token]]
                start = place + 1
        return "".join([*texts, self._text_of(ids[start:])])

    @cached_property
    def _marks(self) -> dict[int, str]:
        """The control tokens that stand around reasoning, by their ids."""
        reasoning = self.template.reasoning
        if reasoning is None:
            return {}
        names = [
            name
            for name in self.template.control_tokens
            if name in reasoning.opening or name in reasoning.closing
        ]
        return {self.encoder.control(name): name for name in names}

    def _text_of(self, ids: Sequence[int]) -> str:
        # An added word is part of the answer even if it is a special token.
        if self.words:
            ids = [token for token in ids if not self.encoder.is_control(token)]
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not self.words))
