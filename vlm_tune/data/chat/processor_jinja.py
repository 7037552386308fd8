"""Chat formats as Jinja chat templates, for the processors of transformers and for llama.cpp."""

from __future__ import annotations

import json

from vlm_tune.data.chat.reasoning import FIELDS, Reasoning
from vlm_tune.data.chat.template import PARTS_OF_TURN, ChatTemplate, Piece

TURN = "content(message)"
"""The Jinja expression of a turn's content."""
MARK_ENDS = "__>"
"""The end of the texts that stand for images in llama.cpp."""
ANSWER = "answer"
"""The Jinja expression of an answer, and `reason` of what is before it, where formats have that."""
LAST_QUESTION = (
    "{%- set questions = namespace(last=-1) -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set questions.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
)
"""Jinja that finds the place of a conversation's last question."""


def processor_jinja(
    template: ChatTemplate,
    system: str | None,
    image: str,
    marker: str | None = None,
    around: str = "",
    video: str = "",
) -> str:
    """Renders the format as a Jinja chat template for transformers' processors.

    Contents of messages are text, or lists of texts and images. An image is written as the token
    `image`. `system` is the system text of a conversation without one, as in `segments`. With a
    `marker`, texts that begin so stand for images, and are written as they are; a content that is
    one text may begin so too. `around` is text before and after an image. A video is written as
    the token `video`, if the model has one.
    """
    is_image = _is_image("part", marker, video)
    shown = _shown_image(image, marker, video)
    edge = _quoted(around)
    shown = f"({edge} + {shown} + {edge})" if around else shown
    system = template.default_system if system is None else system
    spaced = marker if around or template.after_image else None
    text, whole = _shown_texts(template, spaced)
    lines = [
        *(_macro_of_spaced(template, spaced, around) if spaced else []),
        "{%- macro content(message) -%}",
        f"{{%- if message['content'] is string -%}}{{{{- {whole} -}}}}",
        "{%- else -%}{%- for part in message['content'] -%}",
        f"{{%- if {is_image} -%}}{{{{- {shown} -}}}}"
        f"{_written_after_image(template.after_image)}"
        f"{{%- else -%}}{{{{- {text} -}}}}{{%- endif -%}}",
        "{%- endfor -%}{%- endif -%}",
        "{%- endmacro -%}",
        _written(template.start, ""),
    ]
    if any(piece.content in PARTS_OF_TURN for piece in template.user):
        lines += _macros_of_parts(is_image, shown, whole, text, template.between_words)
    if system or template.without_system:
        words = system.strip() if system and template.strip is True else system or ""
        pieces = template.system if system else template.without_system
        lines += [
            "{%- if messages[0]['role'] != 'system' -%}",
            _written(pieces, _quoted(words)),
            "{%- endif -%}",
        ]
    if template.reasoning or any(piece.when for piece in template.assistant):
        lines.append(LAST_QUESTION)
    lines.append("{%- for message in messages -%}")
    for role, word in (("system", "if"), ("user", "elif"), ("assistant", "elif")):
        lines.append(f"{{%- {word} message['role'] == '{role}' -%}}")
        lines += _turn(template, role, system=bool(system), marker=marker)
    lines += ["{%- endif -%}", "{%- endfor -%}"]
    lines += ["{%- if add_generation_prompt -%}", _opened(template), "{%- endif -%}"]
    return "\n".join(line for line in lines if line)


def _turn(template: ChatTemplate, role: str, *, system: bool, marker: str | None) -> list[str]:
    """Jinja that writes a turn of a role; `system` and `marker` are as in `_written`."""
    pieces = getattr(template, role)
    if not pieces:
        fault = _quoted(f"the {template.name} format has no {role} turn")
        return [f"{{{{- raise_exception({fault}) -}}}}"]
    if role != "assistant" or template.reasoning is None:
        return [_written(pieces, TURN, system=system, marker=marker)]
    return [
        _parting(template.reasoning),
        _written(pieces, ANSWER, system=system, marker=marker),
    ]


def _opened(template: ChatTemplate) -> str:
    """Jinja that opens the assistant's turn, by `enable_thinking` if that changes nothing else."""
    opened = _written(template.opened, "")
    other = template.switched
    parts = ("start", "without_system", "system", "user")
    if other is None or any(getattr(template, name) != getattr(other, name) for name in parts):
        return opened
    mode = "" if other.enable_thinking else "not "
    return (
        f"{{%- if enable_thinking is defined and {mode}enable_thinking -%}}"
        f"{_written(other.opened, '')}{{%- else -%}}{opened}{{%- endif -%}}"
    )


def _parting(reasoning: Reasoning) -> str:
    """Jinja that sets `reason` and `answer`, the parts of an assistant's turn, as trained."""
    opening, closing = _quoted(reasoning.opening), _quoted(reasoning.closing)
    fields = " or ".join(f"message['{name}']" for name in FIELDS)
    strip = {"space": " | trim", "lines": ".strip('\\n')", None: ""}[reasoning.strip]
    lines = [
        f"{{%- set answer = {TURN} -%}}{{%- set reason = {fields} or '' -%}}",
        f"{{%- if not reason and {closing} in answer -%}}",
        f"{{%- set reason = answer.split({closing})[0].split({opening})[-1].strip('\\n') -%}}",
        f"{{%- set answer = answer.split({closing})[-1].lstrip('\\n') -%}}{{%- endif -%}}",
    ]
    if reasoning.strip_answer:
        lines.append(
            "{%- if loop.index0 > questions.last -%}"
            "{%- set answer = answer.lstrip('\\n') -%}{%- endif -%}"
        )
    # White space alone is no reasoning that a row could have.
    return "\n".join([*lines, f"{{%- set reason = reason{strip} -%}}" if strip else ""])


def _shown_texts(template: ChatTemplate, mark: str | None) -> tuple[str, str]:
    """The Jinja expressions of a text in a list, and of a content that is one text.

    In the latter, texts that begin with `mark` stand for images, if it is given.
    """
    text = "part['text']"
    whole = f"message['content']{' | trim' if template.strip else ''}"
    if mark:
        whole = (
            f"(spaced(message['content']) if {_quoted(MARK_ENDS)} in message['content'] "
            f"else {whole})"
        )
    if template.strip == "texts":
        text = _unless_system("part['text'] | trim", text)
        whole = _unless_system(whole, "message['content']")
    elif template.strip:
        text = "(part['text'].lstrip() if loop.first else part['text'])"
        text = f"({text}.rstrip() if loop.last else {text})"
    if template.strip == "answers":
        text = f"({text} if message['role'] == 'assistant' else part['text'])"
        whole = f"({whole} if message['role'] == 'assistant' else message['content'])"
    return text, whole


def _written_after_image(text: str) -> str:
    """Jinja that writes `after_image` unless the next part of a turn is a text that begins so."""
    if not text:
        return ""
    ending = _quoted(text)
    return (
        "{%- if not (loop.nextitem is defined and loop.nextitem['type'] == 'text' "
        f"and loop.nextitem['text'].startswith({ending})) -%}}{{{{- {ending} -}}}}{{%- endif -%}}"
    )


def _is_image(part: str, marker: str | None, video: str = "") -> str:
    """A Jinja expression of whether a part of a content is an image, or a text that begins so.

    With a `video`, of whether it is a video too.
    """
    typed = f"{part}['type'] in ['image', 'video']" if video else f"{part}['type'] == 'image'"
    return typed if marker is None else f"({typed} or {part}['text'].startswith({_quoted(marker)}))"


def _begins_with_text(marker: str | None) -> str:
    """A Jinja expression of whether a turn's content is empty or begins with words."""
    first_part = "message['content'][0]"
    in_list = f"not {_is_image(first_part, marker)}"
    if marker is None:
        return f"message['content'] is string or not message['content'] or {in_list}"
    in_text = f"not message['content'].startswith({_quoted(marker)})"
    return f"not message['content'] or ({in_text} if message['content'] is string else {in_list})"


def _shown_image(image: str, marker: str | None, video: str = "") -> str:
    """A Jinja expression of what an image is written as, or with a `video` a video."""
    token = _quoted(image)
    if video:
        return f"({_quoted(video)} if part['type'] == 'video' else {token})"
    return token if marker is None else f"({token} if part['type'] == 'image' else part['text'])"


def _macros_of_parts(is_image: str, shown: str, whole: str, text: str, between: str) -> list[str]:
    """The Jinja macros of `PARTS_OF_TURN`, by their names.

    The expressions say whether a part is an image and what an image is written as; `whole` and
    `text` are those of a content that is a text, and of a text in a list, `between` is what stands
    between the latter.
    """
    parted = f"{{%- if not loop.first -%}}{{{{- {_quoted(between)} -}}}}{{%- endif -%}}"
    return [
        "{%- macro images(message) -%}{%- if message['content'] is not string -%}",
        f"{{%- for part in message['content'] if {is_image} -%}}"
        f"{{{{- {shown} -}}}}{{%- endfor -%}}",
        "{%- endif -%}{%- endmacro -%}",
        "{%- macro words(message) -%}{%- if message['content'] is string -%}"
        f"{{{{- {whole} -}}}}{{%- else -%}}",
        f"{{%- for part in message['content'] if not {is_image} -%}}"
        f"{parted if between else ''}{{{{- {text} -}}}}{{%- endfor -%}}",
        "{%- endif -%}{%- endmacro -%}",
    ]


def _macro_of_spaced(template: ChatTemplate, marker: str, around: str) -> list[str]:
    """The Jinja macro of a text in which images are marked, with what stands around them.

    llama.cpp's server joins the parts of a turn with images to one such text. A mark begins with
    `marker` and ends with `MARK_ENDS`.
    """
    edge = _quoted(around)
    start = _quoted(marker)
    ending = _quoted(MARK_ENDS)
    after = _quoted(template.after_image)
    trim = " | trim" if template.strip else ""
    return [
        "{%- macro spaced(text) -%}",
        f"{{%- for section in text.split({start}) -%}}",
        f"{{%- if loop.first -%}}{{{{- section{trim} -}}}}",
        f"{{%- elif {ending} in section -%}}{{%- set halves = section.split({ending}) -%}}",
        f"{{%- set behind = halves[1:] | join({ending}) -%}}",
        f"{{{{- {edge} + {start} + halves[0] + {ending} + {edge} -}}}}",
        f"{{%- if not behind.startswith({after}) -%}}{{{{- {after} -}}}}{{%- endif -%}}",
        f"{{{{- behind{trim} -}}}}",
        f"{{%- else -%}}{{{{- {start} + section -}}}}{{%- endif -%}}",
        "{%- endfor -%}",
        "{%- endmacro -%}",
    ]


def _unless_system(expression: str, other: str) -> str:
    """A Jinja expression that is another one in a system's turn."""
    return f"({other} if message['role'] == 'system' else {expression})"


def _written(
    pieces: list[Piece], content: str, *, system: bool = False, marker: str | None = None
) -> str:
    """A Jinja expression that writes pieces; `content` is the expression of the turn's content.

    `system` says whether a conversation without a system's turn gets one. `marker` is as in
    `processor_jinja`.
    """
    begins_with_text = _begins_with_text(marker)
    in_turn = content in (TURN, ANSWER)

    def left_out(role: str) -> str:
        first = str(system and role == "system").lower()
        return f"(loop.previtem['role'] == '{role}' if loop.previtem is defined else {first})"

    def written(piece: Piece) -> str:
        if piece.content in PARTS_OF_TURN:
            return f"{piece.content}(message)"
        if piece.content and piece.content != "reasoning":
            return content
        if piece.control in ("bos", "eos"):
            return f"{piece.control}_token"
        literal = "reason" if piece.content else _quoted(piece.text or piece.control or "")
        if in_turn and piece.unless:
            return f"('' if {left_out(piece.unless)} else {literal})"
        conditions: list[str] = []
        if piece.when:
            conditions.append(f"loop.index0 {'>' if piece.when == 'last' else '<'} questions.last")
        if piece.reasoned is not None:
            conditions.append("reason" if piece.reasoned else "not reason")
        if piece.before is not None:
            conditions.append(begins_with_text)
        stands = " and ".join(f"({each})" for each in conditions)
        return f"({literal} if {stands} else '')" if in_turn and stands else literal

    parts = [written(piece) for piece in pieces]
    return f"{{{{- {' + '.join(parts)} -}}}}" if parts else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
