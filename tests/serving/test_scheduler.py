"""Jobs that are answered together, step by step: whatever else is there, answers are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.answered_jobs import Listening, job_of
from tests.helpers.connector_kinds import with_connector
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving import alone
from vlm_tune.serving import batch as batch_module
from vlm_tune.serving.batch import batching_reason
from vlm_tune.serving.jobs import Job
from vlm_tune.serving.request import Request, request_of
from vlm_tune.serving.scheduler import Scheduler

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
IMAGES = [png((60 * k, 200 - 40 * k, 30)).source for k in range(4)]
WORDS = ["what", "color", "is", "it", "red", "blue", "green", "no", "yes", "the"]
WAYS: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 1.1, "seed": 3, "num_return_sequences": 3},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 1, "logprobs": True},
    {"repetition_penalty": 1.4, "logprobs": True},
    {"stop_strings": ["e", "a b"]},
    {"json_schema": {"type": "array", "items": {"type": "integer"}}, "logprobs": True},
    {"num_beams": 2},
]


class Driver:
    """Steps a scheduler by hand."""

    def __init__(self, model: VisionLanguageModel, batch: int) -> None:
        self.model = model
        self.scheduler = Scheduler({"tiny": model}, batch)
        self.batch = self.scheduler.batches["tiny"]

    def submit(self, job: Job) -> tuple[Listening, Request]:
        """Adds a job."""
        listening = Listening(job)
        request = request_of(job, self.model, listening, self.batch.features)
        self.scheduler.add(request)
        return listening, request

    def finish(self) -> None:
        """Steps until no job is left."""
        for _ in range(5000):
            if not self.scheduler.waiting and not self.scheduler.running:
                return
            self.scheduler.step()
        raise AssertionError("the scheduler does not finish")


def offline(model: VisionLanguageModel, job: Job) -> list[Answer]:
    """The answers to a job without a server."""
    settings: dict[str, Any] = {name: getattr(job.decoding, name) for name in job.decoding.given}
    (turn,) = job.conversation.messages
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"image": part.source, "type": "image"}
        for part in turn.parts
    ]
    choices = list(job.choices) or None
    first = model.answer(
        messages=[{"role": "user", "content": content}], choices=choices, **settings
    )
    return [first, *first.alternatives]


def random_job(rng: random.Random) -> Job:
    """A job of random words, images and settings."""
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))
    images = rng.choices(IMAGES, k=rng.choice([0, 1, 1, 1, 2]))
    if rng.random() < 0.1:
        return job_of(words, images, choices=("red", "no", "it is blue"))
    return job_of(words, images, max_new_tokens=rng.randint(1, 16), **rng.choice(WAYS))


def assert_same(listening: Listening, expected: list[Answer]) -> None:
    assert listening.error is None
    assert len(listening.answers) == len(expected)
    for number, other in enumerate(expected):
        answer = listening.answers[number]
        assert (answer.ids, answer.text) == (other.ids, other.text), listening.job
        assert answer.finish_reason == other.finish_reason
        # Weights times 3 enlarge rounding in every layer: offline answers, alone and in a batch,
        # differ by 2e-4 too, and oneDNN's products round otherwise than MKL's.
        assert answer.logprobs == pytest.approx(other.logprobs, abs=4e-3)
        assert answer.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@both_llms
@pytest.mark.parametrize("seed", range(2))
def test_answers_do_not_depend_on_what_else_is_there(
    llm: str, seed: int, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "PREFILL", 60)
    model = talkative(tiny_recipe(llm))
    driver = Driver(model, batch=6)
    rng = random.Random(seed)
    jobs: list[Listening] = []
    running: list[Request] = []
    cancelled: list[tuple[Listening, int]] = []
    while len(jobs) < 40:
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            listening, request = driver.submit(random_job(rng))
            jobs.append(listening)
            running.append(request)
        if running and rng.random() < 0.15:
            place = rng.randrange(len(running))
            running[place].cancel()
            cancelled.append((jobs[place], jobs[place].events))
        driver.scheduler.step()
    driver.finish()
    broken_off = {id(listening) for listening, _ in cancelled}
    assert all(listening.events == events for listening, events in cancelled)
    answered = [listening for listening in jobs if id(listening) not in broken_off]
    assert len(answered) > 20
    for listening in answered:
        assert_same(listening, offline(model, listening.job))


@both_llms
@pytest.mark.parametrize("how", ["choices", "beams"])
def test_an_answer_is_written_on_between_the_steps_of_another_job(
    llm: str, how: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of choices reads some of them, of a beam search adds a token, and all write."""
    monkeypatch.setattr(alone, "CHOICE_TOKENS", 60)
    model = talkative(tiny_recipe(llm))
    driver = Driver(model, batch=2)
    job = job_of("what is it?", IMAGES[0], temperature=5.0, seed=2, max_new_tokens=100)
    stream, request = driver.submit(job)
    texts = tuple(f"{one} {other}" for one in WORDS for other in WORDS)
    other = (
        job_of("what color?", IMAGES[1], choices=texts)
        if how == "choices"
        else job_of("what color?", IMAGES[1], num_beams=2, max_new_tokens=14)
    )
    driver.scheduler.step()
    listening, _ = driver.submit(other)
    writing = driver.batch._writings[0]
    steps = 0
    while not listening.ended:
        written = len(writing.ids)
        driver.scheduler.step()
        assert len(writing.ids) == written + 1 or request.ended
        steps += 1
    assert steps >= 8
    assert_same(listening, offline(model, other))
    driver.finish()
    assert_same(stream, offline(model, job))


@both_llms
@pytest.mark.parametrize("kind", ["qformer-text", "fusion-gate", "resampler"])
def test_connectors_that_read_the_question_answer_together(
    llm: str, kind: str, tiny_recipe: Recipes
) -> None:
    model = talkative(with_connector(tiny_recipe(llm), kind))
    driver = Driver(model, batch=4)
    prompts = ["what color is it?", "is it red?", "what color is it?"]
    jobs = [driver.submit(job_of(each, IMAGES[0], max_new_tokens=5))[0] for each in prompts]
    driver.scheduler.step()
    jobs.append(driver.submit(job_of("is it blue?", IMAGES[:2], max_new_tokens=5))[0])
    driver.finish()
    for listening in jobs:
        assert_same(listening, offline(model, listening.job))


def test_an_image_is_read_once_for_many_questions(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    driver = Driver(model, batch=8)
    seen: list[int] = []
    model.tower.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    prefilled: list[int] = []
    join = type(driver.batch._rows).join

    def counted(rows: Any, embeds: torch.Tensor, *args: Any) -> Any:
        prefilled.append(embeds.shape[1])
        return join(rows, embeds, *args)

    driver.batch._rows.join = counted.__get__(driver.batch._rows)
    questions = ["what color is it?", "is it red?", "is it blue or green?"]
    together = [driver.submit(job_of(each, IMAGES[0], max_new_tokens=4)) for each in questions]
    driver.finish()
    assert seen == [1]
    lengths = [len(request.prompt.input_ids) for _, request in together]
    end = together[0][1].images.beginning.images_end
    # What follows the image is prefilled of the others, each in a batch of its own length.
    assert prefilled == [lengths[0], *sorted(length - end for length in lengths[1:])]
    later = driver.submit(job_of("what is it?", [IMAGES[0], IMAGES[1]], max_new_tokens=4))
    driver.finish()
    assert seen == [1, 1]
    for listening, _ in (*together, later):
        assert_same(listening, offline(model, listening.job))


def test_jobs_count_as_running_while_they_are_prefilled(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    driver = Driver(model, batch=1)
    running: list[tuple[int, int]] = []

    def noted(*_: Any) -> None:
        running.append((driver.scheduler.running, len(driver.scheduler.waiting)))

    model.tower.register_forward_hook(noted)
    for image in IMAGES[:2]:
        driver.submit(job_of("what?", image, max_new_tokens=2))
    driver.finish()
    assert running == [(1, 1), (1, 0)]


def test_remembered_prefixes_and_features_are_bounded(
    tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe("causal"))
    driver = Driver(model, batch=2)
    driver.batch.prefixes.limit = 20_000
    driver.batch.features.limit = 3_000
    jobs = []
    for k in range(12):
        image = png((20 * k, 100, 40)).source
        jobs.append(driver.submit(job_of("what color is it?", image, max_new_tokens=3))[0])
        driver.finish()
        assert driver.batch.prefixes.nbytes <= 20_000
        assert driver.batch.features.nbytes <= 3_000
    assert 1 <= len(driver.batch.prefixes) < 12
    assert 1 <= len(driver.batch.features) < 12
    for listening in jobs:
        assert_same(listening, offline(model, listening.job))


@both_llms
def test_a_fault_of_a_step_ends_its_jobs_and_later_ones_are_answered(
    llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe(llm))
    driver = Driver(model, batch=4)
    jobs = [driver.submit(job_of(each, max_new_tokens=9))[0] for each in ("hello", "what is it?")]
    with monkeypatch.context() as patched:
        patched.setattr(driver.batch._next_tokens, "of", lambda *_: 1 / 0)
        driver.scheduler.step()
    assert all(isinstance(listening.error, ZeroDivisionError) for listening in jobs)
    with monkeypatch.context() as patched:
        patched.setattr(type(model.tower), "forward", lambda *_: 1 / 0)
        bad, _ = driver.submit(job_of("what?", IMAGES[0], max_new_tokens=9))
        good, _ = driver.submit(job_of("what?", max_new_tokens=9))
        driver.finish()
    assert isinstance(bad.error, ZeroDivisionError)
    assert_same(good, offline(model, good.job))


def test_models_whose_rows_can_not_join_are_answered_one_by_one(tiny_recipe: Recipes) -> None:
    model = talkative(with_connector(tiny_recipe("causal"), "cross_attention"))
    assert batching_reason(model) == "its connector attends from the LLM's layers"
    scheduler = Scheduler({"tiny": model}, 4)
    jobs = []
    for prompt in ("what color is it?", "is it red?"):
        jobs.append(Listening(job_of(prompt, IMAGES[0], max_new_tokens=5)))
        scheduler.add(request_of(jobs[-1].job, model, jobs[-1], ()))
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    for listening in jobs:
        assert_same(listening, offline(model, listening.job))
