"""Settings of decoding, greedy argmax, and the clean-up of a model's generation config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import torch

from vlm_tune.errors import ArgumentError
from vlm_tune.model.language.json_schema import json_grammar
from vlm_tune.quoting import quoted

MOST = 1_000_000
"""The largest number of tokens or beams that is accepted; more is taken for a mistake."""
COLDEST = 0.0001
"""The least temperature above 0; logits that are divided by less may overflow."""
MOST_LIKELIEST = 20
"""The most likeliest tokens of a place that are returned, as in OpenAI's interface."""
DRAWING = ("top_p", "top_k", "min_p", "seed")
"""Settings that have an effect only where tokens are drawn."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLED = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "transformers_version",
    "_from_model_config",
    "max_length",
    "use_cache",
)
"""Settings of sampling and lengths in a generation config, which do not change answers here."""


class Settings(TypedDict, total=False):
    """How answers are generated, as keywords; `Decoding` describes them."""

    max_new_tokens: int
    num_beams: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    num_return_sequences: int
    stop_strings: str | Sequence[str]
    seed: int | None
    logprobs: bool
    top_logprobs: int
    json_schema: Mapping[str, Any] | None
    enable_thinking: bool | None


@dataclass(frozen=True)
class Decoding:
    """How answers are generated; the names are those of transformers' `GenerationConfig`.

    By default the search is greedy. With `num_beams` above 1 it is a beam search, with a
    `temperature` above 0 tokens are sampled.

    Attributes:
        max_new_tokens: The most tokens of an answer.
        num_beams: The number of beams; 1 for greedy search or sampling.
        temperature: What logits are divided by before a token is drawn; 0 draws none.
        top_p: Tokens are drawn from the likeliest ones whose probabilities add up to this.
        top_k: The number of likeliest tokens to draw from; 0 for all.
        min_p: The least probability of a token to draw, as a share of the likeliest one's.
        repetition_penalty: What positive logits of tokens in the prompt's text or the answer are
            divided by, and negative ones multiplied with; 1 changes nothing.
        num_return_sequences: How many answers are drawn, or beams returned, for a prompt.
        stop_strings: Texts that end an answer; it is cut before the first one.
        seed: Where the draws of every prompt start, so that its answer is the same in a batch and
            alone. None draws others each time.
        logprobs: Whether log-probabilities of the tokens are returned.
        top_logprobs: The number of likeliest tokens, up to 20, whose log-probabilities are returned
            for each token of an answer, beside `logprobs`.
        json_schema: A JSON schema that the answer's text follows, unless `max_new_tokens` ends it.
        enable_thinking: Whether answers have reasoning before them, for chat formats with this
            switch; None for the model's own mode. `max_new_tokens` counts both.

    Raises:
        ArgumentError: A setting is of the wrong type, out of range, or without effect beside the
            others.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_strings: str | Sequence[str] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    json_schema: Mapping[str, Any] | None = field(default=None, hash=False)
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        check_count("num_beams", self.num_beams)
        check_count("num_return_sequences", self.num_return_sequences)
        _check_range("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < COLDEST:
            raise ArgumentError(
                f"temperature must be 0, or at least {COLDEST}, got {quoted(self.temperature)}"
            )
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_whole("top_k", self.top_k)
        _check_whole("top_logprobs", self.top_logprobs, MOST_LIKELIEST)
        if self.seed is not None:
            _check_whole("seed", self.seed)
        if not isinstance(self.enable_thinking, bool | None):
            raise ArgumentError(
                f"enable_thinking must be True, False or None, got {quoted(self.enable_thinking)}"
            )
        if not isinstance(self.logprobs, bool):
            raise ArgumentError(f"logprobs must be True or False, got {quoted(self.logprobs)}")
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings
        if not isinstance(stops, Sequence) or not all(
            isinstance(stop, str) and stop for stop in stops
        ):
            raise ArgumentError(
                "stop_strings must be a non-empty string or a list of them, got "
                f"{quoted(self.stop_strings)}"
            )
        object.__setattr__(self, "stop_strings", tuple(stops))
        if self.json_schema is not None:
            json_grammar(self.json_schema)
        self._check_together()

    def _check_together(self) -> None:
        """Raises `ArgumentError` for settings that have no effect beside the others."""
        if self.samples and self.num_beams > 1:
            raise ArgumentError(
                "num_beams above 1 is a search and temperature above 0 draws tokens: give one"
            )
        idle = [name for name in DRAWING if name in self.given]
        if idle and not self.samples:
            raise ArgumentError(
                f"{idle[0]} has no effect where no token is drawn: set temperature, such as 1.0"
            )
        if self.num_return_sequences > 1 and not self.samples:
            if self.num_beams == 1:
                raise ArgumentError(
                    "num_return_sequences above 1 gives equal answers where no token is drawn: "
                    "set temperature, such as 1.0, or num_beams"
                )
            if self.num_return_sequences > self.num_beams:
                raise ArgumentError(
                    f"num_return_sequences {self.num_return_sequences} is above num_beams "
                    f"{self.num_beams}"
                )
        if self.top_logprobs and not self.logprobs:
            raise ArgumentError("top_logprobs are returned beside logprobs: set logprobs=True")
        if self.logprobs and self.num_beams > 1:
            raise ArgumentError("logprobs are those of greedy search or of draws: set num_beams 1")
        if self.json_schema is not None and self.num_beams > 1:
            raise ArgumentError("json_schema is for greedy search and draws: set num_beams 1")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Decoding:
        """The decoding of settings by name. Raises `ArgumentError` also for an unknown name."""
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                advice = (
                    f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
                )
                raise ArgumentError(f"there is no setting {quoted(name)}; {advice}")
        return cls(**settings)

    @property
    def given(self) -> list[str]:
        """The names of the settings that differ from their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    @property
    def plain(self) -> bool:
        """Whether each token is the argmax of the logits and nothing else is asked of them."""
        return not (
            self.samples
            or self.logprobs
            or self.repetition_penalty != 1
            or self.json_schema is not None
        )


def check_count(name: str, value: Any, most: int = MOST) -> None:
    """Raises `ArgumentError` unless a value is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ArgumentError(f"{name} must be an integer from 1 to {most:,}, got {quoted(value)}")


def _check_whole(name: str, value: Any, most: int | None = None) -> None:
    """Raises `ArgumentError` unless a value is an integer of 0 or more, up to `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0 or (most is not None and value > most):
        bounds = "of 0 or more" if most is None else f"from 0 to {most}"
        raise ArgumentError(f"{name} must be an integer {bounds}, got {quoted(value)}")


def _check_range(name: str, value: Any, least: float, most: float) -> None:
    """Raises `ArgumentError` unless a value is a number from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise ArgumentError(
            f"{name} must be a number from {least:g} to {most:g}, got {quoted(value)}"
        )


def largest(logits: torch.Tensor, block: int = 256) -> torch.Tensor:
    """The argmax of logits [..., V] over the last dimension, the first one of equals.

    On a CPU it takes the maximum of each block of logits first, as torch's argmax is not vectorized
    there.
    """
    if logits.device.type != "cpu" or logits.shape[-1] <= block:
        return logits.argmax(-1)
    size = logits.shape[-1]
    whole = size // block * block
    tops = logits[..., :whole].unflatten(-1, (-1, block)).amax(-1)
    if whole < size:
        tops = torch.cat([tops, logits[..., whole:].amax(-1, keepdim=True)], -1)
    # Places past the end are clamped to the last one; gathering it again changes no argmax, as the
    # first of equals wins.
    places = (tops.argmax(-1, keepdim=True) * block + torch.arange(block)).clamp(max=size - 1)
    return places.gather(-1, logits.gather(-1, places).argmax(-1, keepdim=True)).squeeze(-1)


def plain_generation(model: Any) -> dict[str, Any]:
    """Removes all but the special ids from a model's generation config.

    Answers, greedy or by beam search, then follow the model's logits alone: they are the same one
    by one, in batches, as branches and exported.

    Returns:
        The removed settings that would have changed answers.
    """
    from transformers import GenerationConfig

    original = getattr(model, "generation_config", None)
    if original is None:
        return {}
    ids = {name: getattr(original, name, None) for name in IDS}
    model.generation_config = GenerationConfig(
        **{name: value for name, value in ids.items() if value is not None}
    )
    changed = original.to_diff_dict().items()
    return {
        name: value
        for name, value in changed
        if name not in (*IDS, *SAMPLED) and value is not None and value is not False
    }
