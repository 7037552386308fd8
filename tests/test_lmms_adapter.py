"""The model interface of lmms-eval 0.7, to which the modules here are a stand-in.

The arguments of requests and what tasks do with answers are as in its `api/task.py`.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_models import parsed
from vlm_tune.api import sft
from vlm_tune.errors import ArgumentError
from vlm_tune.generation.chat import VisionLanguageModel

ROOT = Path(__file__).parent.parent


class Lmms(abc.ABC):
    """lmms-eval's base class: what it sets, and the methods that a model must have."""

    is_simple = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    parts: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vlm_tune.lmms_adapter", raising=False)
    yield importlib.import_module("vlm_tune.lmms_adapter")
    sys.modules.pop("vlm_tune.lmms_adapter")


@pytest.fixture
def model(adapter: ModuleType, tiny_recipe: Callable[..., str], color_rows: Path) -> Any:
    recipe = parsed(tiny_recipe("causal"), train__steps=1, data__validation=[], evaluate__samples=0)
    run = sft(recipe, test=False)
    model = adapter.LmmsModel(pretrained=str(run.folder), batch_size="3", max_batch_size=None)
    docs = [
        {"question": f"what {number}?", "image": Image.open(color_rows.parent / f"{name}.png")}
        for number, name in enumerate(("red", "green", "blue"))
    ]
    model.task_dict["colors"] = {"test": docs}
    return model


def images_of(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"]]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_it_is_registered_by_an_entry_point(adapter: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["lmms_eval.models"]["vlm_tune"]
    module, _, function = target.partition(":")
    assert module == adapter.__name__
    manifest = getattr(adapter, function)()
    assert manifest.model_id == "vlm_tune"
    place, _, name = manifest.simple_class_path.rpartition(".")
    kind = getattr(importlib.import_module(place), name)
    assert issubclass(kind, Lmms) and kind.is_simple


def test_answers_are_those_of_the_model_with_the_tasks_settings(model: Any) -> None:
    plain: VisionLanguageModel = model.model
    until = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    longer = {"max_new_tokens": 6, "top_p": None, "num_beams": 1}
    sampled = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3, "do_sample": True}
    requests = [
        request(f"what {doc}?", settings, images_of, doc, "colors", "test")
        for settings in (until, longer, sampled)
        for doc in range(3)
    ]
    requests.append(request("a <image> mark", until, images_of, 0, "colors", "test"))
    requests.append(request("no <image>", until, lambda doc: [], 0, "colors", "test"))
    requests.append(request("a \\<image>", until, lambda doc: [], 0, "colors", "test"))
    docs = model.task_dict["colors"]["test"]
    expected = []
    for settings in (
        {"max_new_tokens": 4, "stop_strings": ["\n\n"]},
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3},
    ):
        expected += [
            plain.chat(f"what {number}?", doc["image"], **settings)
            for number, doc in enumerate(docs)
        ]
    expected.append(plain.chat("a <image> mark", docs[0]["image"], max_new_tokens=4))
    expected.append(plain.chat("no \\<image>", max_new_tokens=4))
    expected.append(plain.chat("a \\\\\\<image>", max_new_tokens=4))
    assert model.generate_until(requests) == expected


def test_losses_are_by_token_and_the_smallest_is_the_likeliest_of_equally_long(
    model: Any,
) -> None:
    continuations = ["red", "green", " blue", "a long one"]
    requests = [
        request(f"what {doc}?", text, images_of, doc, "colors", "test")
        for text in continuations
        for doc in range(2)
    ]
    requests.append(request("q", lambda doc: doc["question"], images_of, 2, "colors", "test"))
    scores = model.loglikelihood(requests)
    docs = model.task_dict["colors"]["test"]
    for (loss, greedy), each in zip(scores, requests, strict=True):
        context, text, _, number, *_ = each.args
        text = text if isinstance(text, str) else text(docs[number])
        answer = model.model.answer(context, docs[number]["image"], choices=[text, "another"])
        other = model.model.answer(context, docs[number]["image"])
        assert greedy == (other.text == text.strip())
        if answer.text == text:
            assert answer.logprobs is not None
            assert loss == pytest.approx(-np.mean(answer.logprobs), rel=1e-5)
        assert loss > 0


def test_each_round_is_made_by_the_task_from_the_last(model: Any) -> None:
    calls: list[tuple[int, list[str], Any]] = []

    def next_round(
        doc: dict[str, Any],
        previous_output: list[str],
        round_idx: int,
        previous_round_info: Any,
    ) -> tuple[Any, ...]:
        calls.append((round_idx, list(previous_output), previous_round_info))
        if round_idx == 3:
            return None, None, True, [*previous_output, "summary"], None
        return None, f"round {round_idx}", False, previous_output, {"round": round_idx}

    settings = {"max_new_tokens": 3}
    arguments = ("what 0?", settings, images_of, next_round, 0, "colors", "test")
    (answers,) = model.generate_until_multi_round([request(*arguments)])
    image = model.task_dict["colors"]["test"][0]["image"]
    texts = [
        model.model.chat("what 0?", image, **settings),
        model.model.chat("round 1", **settings),
        model.model.chat("round 2", **settings),
    ]
    assert answers == [*texts, "summary"]
    assert calls == [
        (1, texts[:1], None),
        (2, texts[:2], {"round": 1}),
        (3, texts, {"round": 2}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretraind": "x"}, "pretraind: unknown model_args; expected pretrained"),
        ({"batch_size": "auto"}, "batch_size must be an integer, got 'auto'"),
    ],
)
def test_other_arguments_are_refused_before_loading(
    adapter: ModuleType, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        adapter.LmmsModel(**{"pretrained": "nowhere", **arguments})


def test_settings_without_effect_are_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"max_new_tokens": 2, "image_aspect_ratio": "pad", "cfg_scale": 3}
    model.generate_until([request("q", settings, images_of, 0, "colors", "test")])
    assert [record.getMessage() for record in caplog.records if "no effect" in record.msg] == [
        "settings of the task that have no effect here: cfg_scale"
    ]
