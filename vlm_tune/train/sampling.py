"""Samples and rewards the completions that a step trains on.

A draw follows from the recipe's seed, the step, the row's id and the completion's number, and from
nothing else: a resumed run draws what an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import xxhash

from vlm_tune.config.grpo import Grpo
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch, Completions
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.packing import completed, group_layout, numbered, trees
from vlm_tune.data.types import CHOSEN, Conversation, Example, Media, NativeInputs, Prompt
from vlm_tune.evaluation.rewards import Sample, reward_functions
from vlm_tune.events import Note, StageReport
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.answers import Answer
from vlm_tune.model.acceleration.compiling import eager
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import name_list
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.watchdog import Watch


class Sampler:
    """Turns a step's batches of prompts into batches of rewarded completions.

    The completions of a prompt are branches of one row, and with a decoder those of all prompts of
    an image, when they are sampled and when they are trained on. Where the model reads no branches,
    each is a row of its own.
    """

    def __init__(
        self,
        model: VisionLanguageNetwork,
        recipe: Recipe,
        engine: Engine,
        watch: Watch,
        report: StageReport,
    ) -> None:
        """Takes the model with the engine that trains it, and a recipe whose objective samples.

        `watch` is notified of each batch of answers, and `report` of steps without a reward.
        """
        assert isinstance(recipe.objective, Grpo)
        images = model.processor.images
        self.model = model
        self.engine = engine
        self.watch = watch
        self.report = report
        self.recipe = recipe
        self.config = recipe.objective
        self.layout = model.processor.spec.layout
        self.rewards = reward_functions(recipe.objective)
        self._noted = False
        # In an answer, a native model would take them for tokens of its images.
        self._of_images = frozenset(map(model.processor.encoder.control, images.controls))
        self.decoding = Decoding(
            self.config.max_completion_length,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            num_return_sequences=self.config.num_generations,
        )

    def __call__(self, batches: Sequence[Batch], step: int, *, compiled: bool) -> list[Batch]:
        """The batches of completions of a step's batches of prompts.

        The model's blocks run eagerly, also where they are `compiled` for the training steps.
        """
        prompts = [prompt for batch in batches for unit in batch.prompts for prompt in unit]
        with (
            self.engine.inference(),
            eager() if compiled else nullcontext(),
            self.engine.accelerator.autocast(),
            self.model.evaluating(),
        ):
            groups = self._groups(batches, prompts, step)
        samples = [
            self._sample(prompt.row, answer)
            for prompt, group in zip(prompts, groups, strict=True)
            for answer in group
        ]
        columns = [reward(samples) if samples else [] for reward in self.rewards]
        rewards = torch.tensor(columns, dtype=torch.float32).T
        self._note_none(rewards, step)
        number = len(prompts), self.config.num_generations
        by_prompt = iter(zip(groups, rewards.reshape(*number, len(columns)), strict=True))
        return [self._batch(batch, by_prompt) for batch in batches]

    def _sample(self, row: Conversation, answer: Answer) -> Sample:
        """A completion with what rewards read: boxes are in pixels of the original image."""
        processor = self.model.processor
        row = processor.template.parted(row)
        text = processor.grounding.read_back(row, answer.text)
        whole = text
        if processor.template.reasoning:
            whole = processor.grounding.read_back(row, processor.decode(answer.ids))
        return Sample(row, text, completion_ids(answer), whole)

    def _note_none(self, rewards: torch.Tensor, step: int) -> None:
        """Reports, once, that the rewards [N, F] of a step are none at all."""
        if len(rewards) and not self._noted and bool(rewards.isnan().all()):
            self._noted = True
            names = name_list(self.config.names)
            text = (
                f"nothing is learned from rewards: {names} gave none of this process's "
                f"{len(rewards)} completions one"
            )
            self.report(Note(text, step))

    def _groups(
        self, batches: Sequence[Batch], prompts: Sequence[Prompt], step: int
    ) -> list[list[Answer]]:
        """The sampled answers to each prompt."""
        if not prompts:
            return []

        def progress(done: int, of: int) -> None:
            self.watch.at(f"the completions of step {step}, {done} of {of} prompts", (step, 0))

        images: dict[Media, torch.Tensor | NativeInputs] = {}
        for batch in batches:
            images |= images_of(batch)
        answers = prompt_answers(
            self.model,
            [prompt.example for prompt in prompts],
            self.decoding,
            fetch=images.__getitem__,
            cached=batches[0].cached,
            batch_size=self.recipe.evaluate.batch_size,
            progress=progress,
            seeds=[draw_seed(self.recipe.seed, step, prompt.row.id) for prompt in prompts],
        )
        return [[answer, *answer.alternatives] for answer in answers]

    def _batch(self, batch: Batch, groups: Iterator[tuple[list[Answer], torch.Tensor]]) -> Batch:
        """The completions of a batch of prompts, whose groups and rewards come next."""
        if not batch.prompts:
            batch.completions = self._completions([], [])
            return batch
        rows: list[Example] = []
        media_index: list[int] = []
        answers: list[Answer] = []
        rewards: list[torch.Tensor] = []
        starts = places_of(batch)
        for unit in batch.prompts:
            of_unit = [next(groups) for _ in unit]
            examples = [
                self._row(prompt.example, group)
                for prompt, (group, _) in zip(unit, of_unit, strict=True)
            ]
            counts = [len(prompt.example.media) for prompt in unit]
            for row, members in self._joined(examples):
                rows.append(row)
                first = members[0]
                start = sum(counts[:first])
                media_index += starts[start : start + counts[first]]
                answers += [answer for place in members for answer in of_unit[place][0]]
                rewards += [of_unit[place][1] for place in members]
            starts = starts[sum(counts) :]
        native = self.model.llm.native
        fetch = batch.media_inputs.__getitem__ if native else None
        sampled = collate(rows, self.model.processor.spec, fetch=fetch)
        if not native:
            sampled.media_index = torch.tensor(media_index, dtype=torch.int64)
            sampled.pixels = batch.pixels
            sampled.features = batch.features
            sampled.patch_places = batch.patch_places
        sampled.cached = batch.cached
        sampled.task = batch.task
        sampled.loss_weight = batch.loss_weight
        sampled.completions = self._completions(answers, rewards)
        return sampled.to(batch.input_ids.device)

    def _row(self, prompt: Example, answers: Sequence[Answer]) -> Example:
        """A prompt with those of its completions that train; alone if there are none."""
        examples = [
            completed(prompt, completion_ids(answer), self.layout)
            for answer in answers
            if self._trains(answer)
        ]
        return group_layout(examples, self.layout) if examples else numbered(prompt, CHOSEN)

    def _trains(self, answer: Answer) -> bool:
        if not self._of_images.isdisjoint(answer.ids):
            return False
        return answer.stop_id is not None or not self.config.mask_truncated_completions

    def _joined(self, examples: Sequence[Example]) -> list[tuple[Example, list[int]]]:
        """A unit's rows, each with the places of the examples that it joins, in their order."""
        if self.layout == "seq2seq" or len(examples) == 1:
            return [(example, [place]) for place, example in enumerate(examples)]
        return [
            (tree.row, list(dict.fromkeys(tree.members)))
            for tree in trees(examples, self.recipe.data.row_length)
        ]

    def _completions(
        self, answers: Sequence[Answer], rewards: Sequence[torch.Tensor]
    ) -> Completions:
        """The record of completions, from the rewards [G, F] of each group."""
        return Completions(
            torch.cat([*rewards, torch.zeros(0, len(self.rewards))]),
            torch.tensor([len(completion_ids(each)) for each in answers], dtype=torch.int64),
            torch.tensor([each.stop_id is not None for each in answers], dtype=torch.bool),
            torch.tensor([self._trains(each) for each in answers], dtype=torch.bool),
        )


def build_sampler(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    engine: Engine,
    watch: Watch,
    report: StageReport,
) -> Sampler | None:
    """The sampler of a recipe whose objective samples; None for others."""
    if not isinstance(recipe.objective, Grpo):
        return None
    return Sampler(model, recipe, engine, watch, report)


def completion_ids(answer: Answer) -> list[int]:
    """The ids that were drawn, with the stop token that ended them."""
    return [*answer.ids, *([] if answer.stop_id is None else [answer.stop_id])]


def draw_seed(seed: int, step: int, row: str) -> int:
    """The seed of the draws for a row in a step."""
    return xxhash.xxh3_64_intdigest(repr((seed, step, row)).encode())


def media_of(batch: Batch) -> list[Media]:
    """The media of a batch of prompts, place by place."""
    prompts = [prompt for unit in batch.prompts for prompt in unit]
    return [media for prompt in prompts for media in prompt.example.media]


def images_of(batch: Batch) -> dict[Media, torch.Tensor | NativeInputs]:
    """The model's inputs of each image of a batch of prompts."""
    if batch.media_inputs:
        return {media: batch.media_inputs[media] for media in media_of(batch)}
    shown = batch.features if batch.pixels is None else batch.pixels
    if shown is None:
        return {}
    return {
        media: shown[place] for media, place in zip(media_of(batch), places_of(batch), strict=True)
    }


def places_of(batch: Batch) -> list[int]:
    """Where the images of a batch's media places are among its images.

    Where no row was left for a process, the batch has a prompt's media, and no prompts.
    """
    return batch.on_host.media_index.tolist() if batch.prompts else []
