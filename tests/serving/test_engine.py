"""The server's engine: answers equal offline ones; the queue, cancelling, faults and closing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.answered_jobs import Listening, job_of
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.data.chat.processor import Processor
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving import alone
from vlm_tune.serving import batch as batch_module
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import Closing, EngineFailed, Overloaded

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
RED = png((200, 30, 30)).source
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.2, "seed": 4, "logprobs": True, "num_return_sequences": 3},
    "stopped": {"stop_strings": ["e", "a b"]},
    "penalised": {"repetition_penalty": 1.5, "logprobs": True, "top_logprobs": 2},
    "JSON": {"json_schema": {"type": "array", "items": {"enum": ["red", 7, None]}}},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture
def engines() -> Iterator[Callable[..., BatchingEngine]]:
    """Makes engines, which are closed at the test's end."""
    opened: list[BatchingEngine] = []

    def make(models: Any, queue: int = 8, batch: int = 4) -> BatchingEngine:
        named = {"tiny": models} if isinstance(models, VisionLanguageModel) else models
        opened.append(BatchingEngine(named, queue=queue, batch=batch))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close(0)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets no answer end by itself."""
    no_token = property(lambda self: [1_000_000])
    return lambda: monkeypatch.setattr(Processor, "stop_ids", no_token)


def submitted(engine: BatchingEngine, *args: Any, **settings: Any) -> Listening:
    """A job's listener, after the job was submitted."""
    listening = Listening(job_of(*args, **settings))
    engine.submit(listening.job, listening)
    return listening


@both_llms
@pytest.mark.parametrize("how", SETTINGS)
def test_answers_are_the_offline_ones(
    llm: str, how: str, tiny_recipe: Recipes, engines: Callable[..., BatchingEngine]
) -> None:
    model = talkative(tiny_recipe(llm))
    engine = engines(model)
    settings = {"max_new_tokens": 14, **SETTINGS[how]}
    for prompt, image in (("what color is it?", RED), ("hello", ())):
        listening = submitted(engine, prompt, image, **settings).wait()
        offline = model.answer(prompt, image, **settings)
        assert listening.error is None
        for number, expected in enumerate([offline, *offline.alternatives]):
            answer = listening.answers[number]
            assert (answer.ids, answer.text) == (expected.ids, expected.text)
            assert answer.finish_reason == expected.finish_reason
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            for place, other in zip(
                answer.top_logprobs or (), expected.top_logprobs or (), strict=True
            ):
                assert place == pytest.approx(other, rel=1e-4, abs=1e-4)
        assert listening.prompt_tokens > (4 if image else 0)


@both_llms
def test_choices_are_compared(
    llm: str, tiny_recipe: Recipes, engines: Callable[..., BatchingEngine]
) -> None:
    model = talkative(tiny_recipe(llm))
    listening = submitted(engines(model), "what color?", RED, choices=("red", "no")).wait()
    offline = model.answer("what color?", RED, choices=["red", "no"])
    assert listening.answers[0].text == offline.text
    assert listening.answers[0].probabilities == pytest.approx(offline.probabilities, abs=1e-5)


def test_models_answer_by_their_names(
    tiny_recipe: Recipes, engines: Callable[..., BatchingEngine]
) -> None:
    models = {llm: talkative(tiny_recipe(llm)) for llm in ("causal", "seq2seq")}
    engine = engines(models)
    jobs = {
        name: submitted(engine, "hello", model=name, max_new_tokens=6)
        for name in ("causal", "seq2seq")
    }
    for name, listening in jobs.items():
        assert listening.wait().answers[0] == models[name].answer("hello", max_new_tokens=6)
    with pytest.raises(
        ArgumentError, match="no model 'other' is served; expected one of causal, seq2seq"
    ):
        engine.submit(job_of("hello", model="other"), print)


def test_a_full_queue_refuses_and_cancelled_jobs_make_room(
    tiny_recipe: Recipes, engines: Callable[..., BatchingEngine], endless: Callable[[], None]
) -> None:
    engine = engines(talkative(tiny_recipe("causal")), queue=2, batch=1)
    endless()
    long = Listening(job_of("hello", max_new_tokens=100_000))
    ticket = engine.submit(long.job, long)
    long.wait_for_an_event()
    assert (engine.running, engine.waiting) == (1, 0)
    later = [submitted(engine, "hello", max_new_tokens=4) for _ in range(2)]
    assert (engine.running, engine.waiting) == (1, 2)
    with pytest.raises(Overloaded, match="2 questions wait already, as many as may"):
        submitted(engine, "hello")
    ticket.cancel()
    ticket.cancel()
    seen = long.events
    assert [listening.wait().error for listening in later] == [None, None]
    assert long.events == seen and not long.ended


def test_draws_of_a_model_without_a_batch_are_streamed_and_cancelled(
    tiny_recipe: Recipes,
    engines: Callable[..., BatchingEngine],
    endless: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They do not hold the engine until their end."""
    model = talkative(tiny_recipe("causal"))
    monkeypatch.setattr(type(model.llm), "unbatched", property(lambda self: "for this test"))
    engine = engines(model)
    drawn: dict[str, Any] = {"num_return_sequences": 2, "temperature": 1.0, "seed": 3}
    listening = submitted(engine, "hello", max_new_tokens=8, **drawn).wait()
    first = model.answer("hello", max_new_tokens=8, **drawn)
    expected = [each.text for each in (first, *first.alternatives)]
    assert [listening.answers[number].text for number in range(2)] == expected
    endless()
    long = Listening(job_of("hello", max_new_tokens=100_000, **drawn))
    ticket = engine.submit(long.job, long)
    long.wait_for_an_event()
    assert not long.answers
    ticket.cancel()
    assert submitted(engine, "hello", max_new_tokens=4).wait().error is None


def test_a_fault_ends_its_job_alone(
    tiny_recipe: Recipes,
    engines: Callable[..., BatchingEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = talkative(tiny_recipe("causal"))
    engine = engines(model)
    with pytest.raises(DataError, match="tokens, more than"):
        submitted(engine, "hello " * 1000)
    with pytest.raises(DataError, match="not an image of PNG"):
        submitted(engine, "what?", b"no image")
    monkeypatch.setattr(alone, "choice_steps", lambda *_, **__: 1 / 0)
    failed = submitted(engine, "what?", choices=("red", "no")).wait()
    assert isinstance(failed.error, ZeroDivisionError)
    assert submitted(engine, "hello", max_new_tokens=4).wait().answers[0].ids


def test_a_fault_of_the_engine_ends_the_jobs_that_began_and_later_ones_are_answered(
    tiny_recipe: Recipes,
    engines: Callable[..., BatchingEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = talkative(tiny_recipe("causal"))
    engine = engines(model)
    with monkeypatch.context() as patched:
        # Its row has joined by then.
        patched.setattr(batch_module, "Writing", lambda *_: 1 / 0)
        failed = submitted(engine, "what?", max_new_tokens=4).wait()
    assert isinstance(failed.error, ZeroDivisionError)
    assert "ZeroDivisionError in the engine" in caplog.text
    listening = submitted(engine, "hello", max_new_tokens=4).wait()
    assert listening.error is None
    assert listening.answers[0] == model.answer("hello", max_new_tokens=4)


def test_the_end_of_the_thread_ends_all_jobs_and_is_shown(
    tiny_recipe: Recipes,
    engines: Callable[..., BatchingEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = talkative(tiny_recipe("causal"))
    engine = engines(model)
    begun = threading.Event()

    def fail(*_: Any) -> None:
        assert begun.wait(60)
        raise MemoryError

    assert not engine.failed
    monkeypatch.setattr(engine._scheduler, "step", fail)
    # What takes the scheduler's place fails as well.
    monkeypatch.setattr("vlm_tune.serving.engine.Scheduler", fail)
    jobs = [submitted(engine, "hello", max_new_tokens=4) for _ in range(2)]
    begun.set()
    for listening in jobs:
        assert isinstance(listening.wait().error, EngineFailed)
    assert engine.failed
    with pytest.raises(EngineFailed, match="has to be started again"):
        submitted(engine, "hello")
    assert "MemoryError in the engine, which answers no more jobs" in caplog.text


def test_a_listener_that_fails_ends_its_job(
    tiny_recipe: Recipes,
    engines: Callable[..., BatchingEngine],
    endless: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engines(talkative(tiny_recipe("causal")))
    endless()
    calls: list[Any] = []
    failed = threading.Event()

    def listener(event: Any) -> None:
        calls.append(event)
        failed.set()
        raise RuntimeError("a fault of the listener's")

    engine.submit(job_of("hello", max_new_tokens=100_000), listener)
    assert failed.wait(60)
    assert submitted(engine, "hello", max_new_tokens=4).wait().answers[0].ids
    assert len(calls) == 1
    assert "in a listener of the engine" in caplog.text


def test_closing_waits_for_jobs_and_then_stops_them(
    tiny_recipe: Recipes, endless: Callable[[], None]
) -> None:
    model = talkative(tiny_recipe("causal"))
    engine = BatchingEngine({"tiny": model}, queue=8, batch=2)
    short = submitted(engine, "hello", max_new_tokens=20)
    engine.close(60)
    assert short.ended and short.error is None
    with pytest.raises(Closing, match="the server is stopping"):
        submitted(engine, "hello")

    engine = BatchingEngine({"tiny": model}, queue=8, batch=1)
    endless()
    long = submitted(engine, "hello", max_new_tokens=100_000)
    queued = submitted(engine, "hello", max_new_tokens=100_000)
    long.wait_for_an_event()
    threads = threading.active_count()
    engine.close(0)
    assert isinstance(long.error, Closing) and isinstance(queued.error, Closing)
    assert threading.active_count() < threads


def test_queue_and_batch_are_counts(tiny_recipe: Recipes) -> None:
    for queue, batch in ((0, 1), (1, 0)):
        with pytest.raises(ArgumentError, match="integer from 1"):
            BatchingEngine({}, queue=queue, batch=batch)
