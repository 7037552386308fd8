"""A run as a model of lmms-eval: `lmms-eval --model vlm_tune --model_args pretrained=RUN`.

lmms-eval finds it by its entry point; nothing else imports this module, and lmms-eval is no
dependency. The interface is that of lmms-eval 0.7 (`lmms_eval.api.model.lmms`).
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from vlm_tune.data.chat.image_marks import escaped_marks
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.errors import ArgumentError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.choices import choice_logprobs
from vlm_tune.generation.requests import request_conversation
from vlm_tune.quoting import name_list

log = logging.getLogger(__name__)

MARK = "<image>"
LONGEST = 128
"""Tokens of an answer where a task sets no limit."""
PASSED = ("repetition_penalty",)
GREEDY = ("num_beams",)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
IGNORED = ("image_aspect_ratio", "use_cache", "max_gen_toks", "num_return_sequences")
"""Settings of tasks that have no meaning here."""

_base: Any = importlib.import_module("lmms_eval.api.model").lmms


def manifest() -> Any:
    """The entry that lmms-eval registers: the model's name and class."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(
        model_id="vlm_tune", simple_class_path=f"{__name__}.{LmmsModel.__name__}"
    )


class LmmsModel(_base):
    """A trained model behind lmms-eval's interface; with `accelerate launch` each rank has one.

    Requests are lmms-eval's instances, whose `args` are, by kind:

    - `generate_until`: context, settings, doc_to_visual, doc id, task, split;
    - `generate_until_multi_round`: the same with doc_to_text after doc_to_visual;
    - `loglikelihood`: context, continuation (or doc_to_target), doc_to_visual, doc id, task, split.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        dtype: str | None = None,
        device: str | None = None,
        max_new_tokens: int = LONGEST,
        **unknown: Any,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: a run, a checkpoint or a merged folder.
            batch_size: rows per batch.
            dtype: bf16, fp16 or fp32; the model's own by default.
            device: where the model goes; by default the GPU if there is one.
            max_new_tokens: the longest answer where a task sets none.
            **unknown: `max_batch_size`, which lmms-eval passes to every model, has no effect.

        Raises:
            ArgumentError: an unknown argument, or a `batch_size` that is not an integer.
            VlmTuneError: the model can't be loaded.
        """
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise ArgumentError(
                f"{name_list(list(unknown))}: unknown model_args; expected pretrained, "
                "batch_size, dtype, device, max_new_tokens"
            )
        if not str(batch_size).isdecimal():
            raise ArgumentError(f"batch_size must be an integer, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        place = self.accelerator.device if device is None or self._world_size > 1 else device
        self.model = VisionLanguageModel.from_pretrained(pretrained, dtype=dtype, device=place)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request."""
        prompted = [
            (self._request(context, self._visuals(visual, *place)), settings)
            for context, settings, visual, *place in (each.args for each in requests)
        ]
        return self._answers(prompted)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers to the rounds of each request, of which a task makes the next from the last.

        Each round is a prompt of its own: what it repeats of earlier ones is the task's to say.
        """
        return [self._rounds(*request.args) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The mean loss of each continuation, and whether it is what the model would generate.

        A loss, as lmms-eval's own models return: its multiple choice takes the smallest.
        Continuations of one context are read together, the answer's end included.
        """
        questions: dict[tuple[Any, ...], list[int]] = {}
        continuations = []
        for row, request in enumerate(requests):
            context, target, _, *place = request.args
            continuations.append(target if isinstance(target, str) else target(self._doc(*place)))
            questions.setdefault((context, *place), []).append(row)
        groups = list(questions.values())
        prompts = [
            self._request(requests[rows[0]].args[0], self._visuals(*requests[rows[0]].args[2:]))
            for rows in groups
        ]
        conversations = [
            request_conversation(number, prompt) for number, prompt in enumerate(prompts, 1)
        ]
        with self.model.evaluating():
            logprobs = choice_logprobs(
                self.model,
                conversations,
                [[continuations[row] for row in rows] for rows in groups],
                fetch=PixelCache(self.model.processor.images),
                batch_size=self.batch_size,
            )
        greedy = self._answers([(prompt, {}) for prompt in prompts])
        scores = [(0.0, False)] * len(requests)
        for rows, of_question, text in zip(groups, logprobs, greedy, strict=True):
            for row, of_tokens in zip(rows, of_question, strict=True):
                loss = -sum(of_tokens) / len(of_tokens)
                scores[row] = loss, text == continuations[row].strip()
        return scores

    # --- parts ---

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _visuals(self, doc_to_visual: Any, *place: Any) -> list[Any]:
        return list(doc_to_visual(self._doc(*place)) or ())

    @staticmethod
    def _request(context: str, visuals: Iterable[Any]) -> dict[str, Any]:
        """A request with its images at their marks, or before the text if it has not as many."""
        images = list(visuals)
        marked = context.count(MARK) == len(images)
        return {
            "prompt": context if marked else escaped_marks(context),
            "images": images,
        }

    def _rounds(
        self,
        context: str,
        settings: Mapping[str, Any],
        doc_to_visual: Any,
        doc_to_text: Any,
        *place: Any,
    ) -> list[str]:
        visuals = self._visuals(doc_to_visual, *place)
        answers: list[str] = []
        state = None
        for number in itertools.count(1):
            answers += self._answers([(self._request(context, visuals or ()), settings)])
            visuals, context, ended, answers, state = doc_to_text(
                self._doc(*place),
                previous_output=answers,
                round_idx=number,
                previous_round_info=state,
            )
            answers = list(answers)
            if ended:
                break
        return answers

    def _answers(self, prompted: Sequence[tuple[dict[str, Any], Mapping[str, Any]]]) -> list[str]:
        """Answers to requests, those with equal settings together."""
        groups: dict[str, list[int]] = {}
        for row, (_, settings) in enumerate(prompted):
            groups.setdefault(repr(sorted(settings.items())), []).append(row)
        answers = [""] * len(prompted)
        for rows in groups.values():
            texts = self.model.chat_batch(
                [prompted[row][0] for row in rows],
                batch_size=self.batch_size,
                **self._settings(prompted[rows[0]][1]),
            )
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
        return answers

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A task's generation settings as arguments of `chat_batch`; temperature 0 is greedy."""
        until = settings.get("until") or ()
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        limit = settings.get("max_new_tokens") or self.max_new_tokens
        ours: dict[str, Any] = {"max_new_tokens": int(limit)}
        if stops:
            ours["stop_strings"] = stops
        samples = settings.get("do_sample", True) and (settings.get("temperature") or 0) > 0
        names = (*PASSED, *(SAMPLING if samples else GREEDY))
        ours |= {name: settings[name] for name in names if settings.get(name) is not None}
        known = {"until", "max_new_tokens", "do_sample", *PASSED, *GREEDY, *SAMPLING, *IGNORED}
        others = sorted(settings.keys() - known)
        if others:
            log.warning("settings of the task that have no effect here: %s", ", ".join(others))
        return ours
