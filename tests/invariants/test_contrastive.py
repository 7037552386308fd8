"""Contrastive losses of two ranks are those of one process with their rows together."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.contrastive_samples import contrastive_recipe, write_captions
from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import largest, tensors_of
from vlm_tune.api import sft
from vlm_tune.train.contrastive import gathered


def _gather_and_differentiate(folder: Path) -> None:
    """Each rank takes its rows of a table; the loss weighs all rows, on each rank otherwise."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    table = torch.arange(10.0).view(5, 2).requires_grad_()
    sizes = [2, 3]
    first = sum(sizes[:rank])
    joined = gathered(table[first : first + sizes[rank]], sizes)
    weights = torch.arange(1.0, 6.0)[:, None] * (rank + 1)
    (joined**2 * weights).sum().backward()
    torch.save((joined.detach(), table.grad), folder / f"{rank}.pt")


def test_gathered_vectors_have_the_gradients_of_all_ranks(tmp_path: Path) -> None:
    pids = start(partial(_gather_and_differentiate, tmp_path), tmp_path / "ranks.txt", ranks=2)
    assert ended(pids) == [0, 0], (tmp_path / "ranks.txt.0").read_text()
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    table = torch.arange(10.0).view(5, 2)
    assert torch.equal(one, table) and torch.equal(other, table)
    # The weights of both ranks' losses are 1 + 2 times the row's number.
    expected = 2 * table * torch.arange(1.0, 6.0)[:, None] * 3
    torch.testing.assert_close(first + second, expected)
    assert not first[2:].any() and not second[:2].any()


OBJECTIVES: dict[str, Any] = {
    "views": {
        "objective": {"kind": "contrastive", "loss": "clip", "views": "both"},
        "data__augment": {"flip": 0.5, "shift": 0.2},
    },
    "mixture": {
        "objective": [
            {"kind": "language_modeling"},
            {"kind": "contrastive", "loss": "clip", "weight": 0.5},
        ],
        "tune": [{"match": "tower.*", "how": "frozen"}, {"match": "*", "how": "full"}],
    },
}
"""Settings of runs of other objectives with CLIP's loss."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "engine"),
    [
        ("clip", "ddp"),
        ("siglip", "ddp"),
        ("siglip", "fsdp"),
        ("siglip", "deepspeed"),
        ("views", "ddp"),
        ("mixture", "ddp"),
    ],
)
def test_two_ranks_train_as_one(
    loss: str, engine: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Seven rows in steps of four: the ranks of the last one have two rows and one."""
    rows = write_captions(tmp_path, "seven", seed=0)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:7]))

    def recipe(output: str, size: int, **changes: Any) -> Any:
        changes |= OBJECTIVES.get(loss, {})
        return contrastive_recipe(
            tiny_recipe,
            tmp_path,
            loss,
            output=output,
            train__steps=4,
            train__log_every=1,
            train__batch_size=size,
            evaluate__every=4,
            data__train=[{"kind": "file", "path": str(rows)}],
            **changes,
        )

    def logged(output: str) -> list[dict[str, Any]]:
        lines = (tmp_path / output / "log.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if event["event"] in ("train", "evaluate")]

    sft(recipe("one", 4))
    pids = start(
        partial(sft, recipe("two", 2, engine={"kind": engine})), tmp_path / "ranks.txt", ranks=2
    )
    assert ended(pids) == [0, 0], (tmp_path / "ranks.txt.0").read_text()
    assert len(logged("one")) == len(logged("two")) == 5
    for alone, together in zip(logged("one"), logged("two"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    first, second = (tensors_of(tmp_path / output / "model") for output in ("one", "two"))
    assert first.keys() == second.keys()
    assert "similarity.safetensors|logit_scale" in first
    assert max(largest(value, second[name]) for name, value in first.items()) <= 3e-4
