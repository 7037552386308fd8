"""The command `chat`: one question, or a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_tune.cli.options import (
    MOST_TOKENS,
    AcceptBaseOption,
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    JsonSchemaOption,
    ModelArgument,
    TaskOption,
    bases_by_part,
    check_dtype,
    print_json,
    quiet_libraries,
    read_schema,
    use_device,
)

if TYPE_CHECKING:
    from vlm_tune.model.language.decoding import Settings

ImageOption = Annotated[list[Path] | None, typer.Option(help="an image file (repeatable)")]
AudioOption = Annotated[list[Path] | None, typer.Option(help="an audio file (repeatable)")]
PromptOption = Annotated[
    str | None, typer.Option(help="the question; without it, a conversation starts in the terminal")
]
SystemOption = Annotated[str | None, typer.Option(help="the system text; the model's by default")]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, max=MOST_TOKENS, help="maximum length of an answer in tokens")
]
TemperatureOption = Annotated[
    float, typer.Option(min=0, max=100, help="sampling temperature; 0 is greedy")
]
TopPOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="nucleus sampling: the smallest set of tokens whose probabilities reach this",
    ),
]
TopKOption = Annotated[
    int, typer.Option(min=0, help="sample from the k most likely tokens; 0: from all")
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="seed of the sampling")]
ChoicesOption = Annotated[
    str | None,
    typer.Option(help="answer with the likeliest of these comma-separated texts"),
]

ThinkingOption = Annotated[
    bool | None,
    typer.Option(
        "--enable-thinking/--no-enable-thinking",
        help="whether answers have reasoning, for chat formats with this switch; the model's own "
        "mode by default",
        show_default=False,
    ),
]


def chat(
    model: ModelArgument,
    image: ImageOption = None,
    audio: AudioOption = None,
    prompt: PromptOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    choices: ChoicesOption = None,
    json_schema: JsonSchemaOption = None,
    enable_thinking: ThinkingOption = None,
    task: TaskOption = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Query MODEL about images or audio: a single --prompt, or a conversation in the terminal."""
    check_dtype(dtype)
    settings: Settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "json_schema": read_schema(json_schema),
        "enable_thinking": enable_thinking,
    }
    texts = None if choices is None else [text.strip() for text in choices.split(",")]
    use_device(device)
    quiet_libraries()
    from vlm_tune.cli.chat_terminal import ChatTerminal
    from vlm_tune.generation.chat import VisionLanguageModel

    _check_options(settings, texts, system)
    vlm = VisionLanguageModel.from_pretrained(
        model, task=task, dtype=dtype, base=bases_by_part(base), accept_other_base=accept_other_base
    )
    terminal = ChatTerminal(
        vlm.start_chat(system, **settings),
        image or [],
        texts,
        audios=audio or [],
        interactive=sys.stdin.isatty(),
    )
    if prompt is None:
        terminal.run(input, as_json=as_json)
    elif as_json:
        print_json(terminal.answer(prompt))
    else:
        terminal.show(prompt)


def _check_options(settings: Settings, texts: list[str] | None, system: str | None) -> None:
    """Raises `ArgumentError` for wrong options, before the model is loaded."""
    from vlm_tune.generation.choices import check_not_generated, choices_of_each
    from vlm_tune.generation.requests import check_text
    from vlm_tune.model.language.decoding import Decoding

    decoding = Decoding(**settings)
    if texts is not None:
        choices_of_each(texts, 1)
        check_not_generated(decoding.given)
    if system is not None:
        check_text("the system text", system)
