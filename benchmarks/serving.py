"""Serving many clients at once, against one question at a time and transformers' `generate`.

Run: python -m benchmarks.serving [--kind seq2seq] [--http] [--seconds 60] [--json FILE]

The model has a ViT-B/32 tower (49 tokens an image) and SmolLM2-135M, or a T5 of flan-t5-base's
shape; tower, connector and T5 have random weights. Clients ask one question after the other about
32 images, with prompts of 10 to 200 tokens and answers of up to 16 to 64: the engine itself, or
with `--http` a server by the `openai` client. The same questions are answered one at a time, by
`VisionLanguageModel.answer` and by transformers' `generate` of the same LLM from the same
embeddings. All answers are compared with those of `answer_batch`, which fp32 must give again.

On a machine that others use too, one thread (`--threads 1`) and tokens by CPU seconds give steadier
ratios; a server's CPU seconds are not this process's.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import material, ours
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.resources import cache_folder
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import Failed, Finished, Job, JobEvent, Piece

WORDS = [
    *("the", "color", "shape", "of", "this", "image", "is", "there", "a", "red", "circle", "or"),
    *("blue", "triangle", "in", "front", "behind", "which", "what", "how", "many", "why", "left"),
    *("describe", "please", "tell", "me", "about", "size", "right", "top", "small", "large"),
]


@dataclass(frozen=True)
class Question:
    """A question about an image, and the most tokens of its answer."""

    text: str
    image: Path
    new_tokens: int

    def request(self) -> dict[str, Any]:
        """The question as `answer_batch` takes it."""
        return {"prompt": self.text, "images": [self.image]}


@dataclass
class Exchange:
    """A question that was chosen, its answer, and when things happened."""

    question: int
    begun: float
    first: float = 0.0
    ended: float = 0.0
    text: str = ""
    tokens: int = 0
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: JobEvent) -> None:
        """Takes an event of the engine."""
        self.first = self.first or time.perf_counter()
        if isinstance(event, Piece):
            return
        self.ended = time.perf_counter()
        if isinstance(event, Failed):
            self.error = repr(event.error)
        elif isinstance(event, Finished):
            self.text = event.whole.text
            self.tokens = len(event.whole.ids)
        self.done.set()


Ask = Callable[[Question, Exchange], None]
"""Asks a question and waits for the answer's end."""


def model_and_images(options: argparse.Namespace) -> tuple[VisionLanguageModel, list[Path]]:
    """The model of a kind, and the images."""
    from vlm_tune.config.load import parse_recipe
    from vlm_tune.model.build import build
    from vlm_tune.precision import DTYPES

    folder = options.cache.absolute() / "serving-material"
    material.write_rows(folder, options.images)
    material.write_models(folder, options.decoder.absolute(), 49)
    text = ours.recipe(
        options.kind,
        folder,
        options.decoder.absolute(),
        folder / "run",
        batch=8,
        steps=1,
        precision=options.dtype,
    )
    torch.manual_seed(0)
    model = build(parse_recipe(text), [], model_class=VisionLanguageModel).eval()
    return model.to(DTYPES[options.dtype]), sorted((folder / "images").iterdir())[: options.images]


def questions(images: Sequence[Path], count: int, tokenizer: Any) -> list[Question]:
    """Questions of 10 to 200 tokens."""
    rng = random.Random(0)
    chosen = []
    for number in range(count):
        length = rng.randint(10, 200)
        ids = tokenizer(" ".join(rng.choices(WORDS, k=length))).input_ids[:length]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        chosen.append(Question(text, images[number % len(images)], rng.randint(16, 64)))
    return chosen


def job_of(question: Question, number: int) -> Job:
    """The engine's job for a question."""
    from vlm_tune.generation.requests import request_conversation
    from vlm_tune.model.language.decoding import Decoding

    conversation = request_conversation(number + 1, question.request())
    return Job(conversation, Decoding(max_new_tokens=question.new_tokens), "model")


@contextmanager
def engine_itself(model: VisionLanguageModel, options: argparse.Namespace) -> Iterator[Ask]:
    """The engine, without a server."""
    engine = BatchingEngine({"model": model}, queue=4 * options.clients, batch=options.batch)

    def ask(question: Question, exchange: Exchange) -> None:
        engine.submit(job_of(question, exchange.question), exchange)
        exchange.done.wait()

    yield ask
    engine.close(60)


@contextmanager
def server(model: VisionLanguageModel, options: argparse.Namespace) -> Iterator[Ask]:
    """A server in a process of its own, which the `openai` client asks."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = [sys.executable, "-m", "vlm_tune.cli", "serve", folder, "--port", str(port)]
        command += ["--dtype", options.dtype, "--batch", str(options.batch), "--name", "model"]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        client: Any = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600
        )
        while process.poll() is None:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                continue
        try:
            yield lambda question, exchange: ask_openai(client, question, exchange)
        finally:
            process.terminate()
            process.wait()


def ask_openai(client: Any, question: Question, exchange: Exchange) -> None:
    """Asks by the `openai` client, as a stream."""
    encoded = base64.b64encode(question.image.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    try:
        stream = client.chat.completions.create(
            model="model",
            messages=[
                {"role": "user", "content": [image, {"type": "text", "text": question.text}]}
            ],
            max_tokens=question.new_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage:
                exchange.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    exchange.first = exchange.first or time.perf_counter()
                    exchange.text += choice.delta.content
    except Exception as error:
        exchange.error = repr(error)
    exchange.ended = time.perf_counter()
    exchange.first = exchange.first or exchange.ended


def by_clients(ask: Ask, chosen: Sequence[Question], options: argparse.Namespace) -> list[Exchange]:
    """The exchanges of clients at once."""
    numbers = iter(range(10**9))
    lock = threading.Lock()
    end = None if options.seconds is None else time.perf_counter() + options.seconds

    def client(_: int) -> list[Exchange]:
        exchanges: list[Exchange] = []
        while True:
            with lock:
                number = next(numbers)
            if number >= options.answers if end is None else time.perf_counter() >= end:
                return exchanges
            exchange = Exchange(number % len(chosen), time.perf_counter())
            ask(chosen[exchange.question], exchange)
            exchanges.append(exchange)

    with ThreadPoolExecutor(options.clients) as pool:
        parts = list(pool.map(client, range(options.clients)))
    return [exchange for part in parts for exchange in part]


def alone(model: VisionLanguageModel, chosen: Sequence[Question]) -> int:
    """The number of tokens of the answers by one question at a time."""
    return sum(
        len(model.answer(each.text, [each.image], max_new_tokens=each.new_tokens).ids)
        for each in chosen
    )


@torch.inference_mode()
def by_transformers(model: VisionLanguageModel, chosen: Sequence[Question]) -> int:
    """As `alone`, by transformers' `generate`."""
    from vlm_tune.data.batching.collate import collate
    from vlm_tune.generation.answers import up_to_stop
    from vlm_tune.generation.requests import request_conversation
    from vlm_tune.model.language.decoding import Decoding

    spec = model.processor.spec
    stops = model.processor.stop_ids
    tokens = 0
    for number, each in enumerate(chosen):
        (prompt,) = model.processor.prompts([request_conversation(number + 1, each.request())])
        batch = collate([prompt], spec, fetch=model.processor.images)
        decoding = Decoding(max_new_tokens=each.new_tokens)
        ids = model.llm.generate(model.embed(batch), batch, decoding, spec.pad_id, stops)
        tokens += len(up_to_stop(ids[0].tolist(), stops))
    return tokens


class Watch:
    """The time since it was started, of the clock and of this process's threads."""

    def __init__(self) -> None:
        self._clock = time.perf_counter()
        self._cpu = time.process_time()

    def rates(self, answers: int, tokens: int) -> dict[str, float]:
        """Answers and tokens by time."""
        seconds = time.perf_counter() - self._clock
        return {
            "answers_per_s": answers / seconds,
            "tokens_per_s": tokens / seconds,
            "tokens_per_cpu_s": tokens / (time.process_time() - self._cpu),
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median and the 95th percentile."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": cuts[49], "p95": cuts[94]}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all sides and compares the answers."""
    model, images = model_and_images(options)
    chosen = questions(images, options.questions, model.processor.tokenizer)
    few = chosen[: options.alone]
    alone(model, few[:2])
    by_transformers(model, few[:2])
    rates: dict[str, dict[str, float]] = {}
    for name, side in (("one at a time", alone), ("transformers", by_transformers)):
        watch = Watch()
        rates[name] = watch.rates(len(few), side(model, few))
        print(f"{name}: {rates[name]}", flush=True)
    with (server if options.http else engine_itself)(model, options) as ask:
        watch = Watch()
        exchanges = by_clients(ask, chosen, options)
        tokens = sum(each.tokens for each in exchanges)
        rates["clients"] = watch.rates(len(exchanges), tokens)
    print(f"{options.clients} clients: {rates['clients']}", flush=True)
    checked = sorted({each.question for each in exchanges})
    expected: dict[int, str] = {}
    for new_tokens in sorted({chosen[number].new_tokens for number in checked}):
        numbers = [number for number in checked if chosen[number].new_tokens == new_tokens]
        answers = model.answer_batch(
            [chosen[number].request() for number in numbers], max_new_tokens=new_tokens
        )
        expected |= {number: each.text for number, each in zip(numbers, answers, strict=True)}
    return {
        "kind": options.kind,
        "http": options.http,
        "dtype": options.dtype,
        "clients": options.clients,
        "answers": len(exchanges),
        "errors": sum(bool(each.error) for each in exchanges),
        "different": sum(each.text != expected[each.question] for each in exchanges),
        "tokens_an_answer": statistics.mean(each.tokens for each in exchanges),
        "rates": rates,
        "times_as_fast": {
            name: {unit: rates["clients"][unit] / rates[name][unit] for unit in rates[name]}
            for name in ("one at a time", "transformers")
        },
        "first_token_s": percentiles([each.first - each.begun for each in exchanges]),
        "whole_s": percentiles([each.ended - each.begun for each in exchanges]),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Prints the figures; with --json also saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kind", choices=["causal", "seq2seq"], default="causal")
    add("--decoder", type=Path, default=Path("models/smollm2-135m-instruct"))
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--images", type=int, default=32)
    add("--questions", type=int, default=256, help="different ones")
    add("--alone", type=int, default=24, help="questions that are asked one at a time")
    add("--clients", type=int, default=64)
    add("--batch", type=int, default=64, help="the maximum number of answers generated at a time")
    add("--answers", type=int, default=256, help="questions that the clients ask in all")
    add("--seconds", type=float, help="ask for so long, in place of --answers")
    add("--http", action="store_true", help="ask a server by the openai client")
    add("--threads", type=int, default=os.cpu_count())
    add("--cache", type=Path, default=cache_folder("throughput"))
    add("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = compare(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
