"""Captions and images are ranked for each other, each distinct one once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.api import compare, evaluate, sft
from vlm_tune.config.objectives import Contrastive
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.evaluation.answer_files import read_answers
from vlm_tune.evaluation.assessment import assess
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.evaluation.metrics import Answer, Ranks, scores
from vlm_tune.evaluation.retrieval import _ranks
from vlm_tune.events import Evaluation, Event
from vlm_tune.train.objectives import ContrastiveObjective

QUERIES = torch.eye(3)
GALLERY = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1], [0, 0.6, 0.8]])


@pytest.mark.parametrize(
    ("queries", "right", "ranks"),
    [
        (QUERIES, [[0], [1], [2]], [1, 2, 1]),
        (QUERIES, [[2], [0, 1], [3]], [4, 2, 2]),
        (torch.ones(3, 3), [[0], [1], [2, 3]], [4, 2, 2]),
        (torch.full((3, 3), torch.nan), [[0], [1], [2, 3]], [4, 4, 3]),
        (torch.zeros(3, 3), [[0], [1, 2], [0, 1, 2, 3]], [4, 3, 1]),
    ],
)
def test_the_rank_is_that_of_the_best_right_entry_and_ties_count_against_it(
    queries: torch.Tensor, right: list[list[int]], ranks: list[int]
) -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for row, places in enumerate(right):
        mask[row, places] = True
    assert _ranks(queries, GALLERY, mask)[0].tolist() == ranks


def ranked(place: int, image: str, text: int, pictures: int, *shares: float) -> Answer:
    return Answer(
        str(place),
        image,
        "",
        "x",
        "x",
        text == 1,
        "",
        images=(image,),
        ranks=Ranks(text, pictures, *shares),
    )


def test_each_distinct_query_counts_once() -> None:
    """An image with two captions, and two images with one caption between them."""
    answers = [
        ranked(0, "a", 1, 1, 0.5, 1.0),
        ranked(1, "a", 1, 7, 0.5, 1.0),
        ranked(2, "b", 6, 3, 1.0, 0.5),
        ranked(3, "c", 2, 3, 1.0, 0.5),
    ]
    scored = scores(answers, {})
    assess(scored)
    values = {name: entry["value"] for name, entry in scored.metrics.items()}
    assert values == pytest.approx(
        {
            "text_recall_1": 1 / 3,
            "text_recall_5": 2 / 3,
            "text_recall_10": 1.0,
            "image_recall_1": 1 / 3,
            "image_recall_5": 2 / 3,
            "image_recall_10": 1.0,
        }
    )
    assert scored.metrics["text_recall_1"]["images"] == 3


def caption_rows(color_rows: Path, folder: Path) -> Path:
    """Four images: two captions of the first, one caption for the next two."""
    captions = [
        ("red", "a red one"),
        ("red", "warm"),
        ("green", "leaf or sea"),
        ("blue", "leaf or sea"),
        ("yellow", "lemon"),
    ]
    path = folder / "captions.jsonl"
    rows = [
        {"image": str(color_rows.parent / f"{name}.png"), "caption": text}
        for name, text in captions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contrastive(tiny_recipe: Callable[..., str], rows: Path, **changes: Any) -> Any:
    part = [{"kind": "file", "path": str(rows)}]
    return parsed(
        tiny_recipe("causal"),
        data__train=part,
        data__validation=part,
        data__test=part,
        data__group="image",
        objective__kind="contrastive",
        train__steps=2,
        evaluate__samples=0,
        **changes,
    )


def naive(model: Any, rows: list[Conversation]) -> dict[str, float]:
    """Recall@1 both ways, by loops over all rows' vectors."""
    examples = [model.processor.examples(row)[-1] for row in rows]
    batch = collate(examples, model.processor.spec, fetch=model.processor.images)
    with torch.no_grad():
        vectors = model(batch, align=True)
    similarity = (vectors.images @ vectors.captions.T).numpy()
    images = [row.media[0].name for row in rows]
    texts = [row.messages[-1].text for row in rows]
    pairs = set(zip(images, texts, strict=True))
    hits: dict[str, list[bool]] = {"text": [], "image": []}
    for image in dict.fromkeys(images):
        best = int(np.argmax(similarity[images.index(image)]))
        hits["text"].append((image, texts[best]) in pairs)
    for text in dict.fromkeys(texts):
        best = int(np.argmax(similarity[:, texts.index(text)]))
        hits["image"].append((images[best], text) in pairs)
    return {name: float(np.mean(each)) for name, each in hits.items()}


@pytest.mark.parametrize("batch_size", [2, 64])
def test_scores_and_loss_are_those_of_all_rows_in_one_batch(
    batch_size: int, tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    recipe = contrastive(tiny_recipe, caption_rows(color_rows, tmp_path))
    model = built(recipe).eval()
    rows = rows_of(recipe)
    options = score_options(recipe.evaluate, recipe.objective)
    options["batch_size"] = batch_size
    scored = score(model, rows, **options)
    assess(scored)
    expected = naive(model, rows)
    assert scored.metrics["text_recall_1"]["value"] == pytest.approx(expected["text"])
    assert scored.metrics["image_recall_1"]["value"] == pytest.approx(expected["image"])
    examples = [model.processor.examples(row)[-1] for row in rows]
    batch = collate(examples, model.processor.spec, fetch=model.processor.images)
    with torch.no_grad():
        loss = ContrastiveObjective(Contrastive(kind="contrastive"))(model, batch)
    assert scored.loss == pytest.approx(float(loss.sum) / loss.count, rel=1e-5)
    assert all(
        answer.correct == (answer.ranks.text == 1) for answer in scored.answers if answer.ranks
    )


def test_a_contrastive_run_is_scored_by_retrieval(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    rows = caption_rows(color_rows, tmp_path)
    events: list[Event] = []
    run = sft(contrastive(tiny_recipe, rows), show=events.append)
    evaluation = [event for event in events if isinstance(event, Evaluation)][-1]
    assert evaluation.best_by == "text_recall_1" and evaluation.metrics is not None
    assert evaluation.metrics == run.result["metrics"]
    assert set(run.result["metrics"]) == {
        f"{sought}_recall_{depth}" for sought in ("text", "image") for depth in (1, 5, 10)
    }
    assert "baselines" not in run.result
    answers = read_answers(run.folder)
    assert answers[0].ranks is not None
    again = evaluate(run.folder, data=rows)
    assert [answer.ranks for answer in again.answers] == [answer.ranks for answer in answers]
    same = compare(run.folder, run.folder).metrics["image_recall_5"]
    assert same["difference"] == 0 and same["first"]["value"] == 1.0
    with pytest.raises(DataError, match="exactly one image each"):
        text = tmp_path / "text.jsonl"
        text.write_text('{"prompt": "a", "completion": "b"}\n')
        evaluate(run.folder, data=text)


def test_recall_can_be_asked_of_a_model_that_generates(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    rows = caption_rows(color_rows, tmp_path)
    recipe = parsed(tiny_recipe("seq2seq"), train__steps=1, data__validation=[])
    run = sft(recipe)
    names = ["exact_match", "text_recall_1"]
    scored = evaluate(run.folder, data=rows, metrics=names, baselines=["blind"])
    assert list(scored.metrics) == names
    assert list(scored.baselines["blind"]) == ["exact_match"]
    assert scored.notes == [
        "baselines are not compared by text_recall_1 (blind: not every row has a rank: retrieval "
        "compares images with captions)"
    ]
