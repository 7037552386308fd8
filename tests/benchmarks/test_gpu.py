"""The GPU bench on a CPU: all its phases in tiny shapes, and the arithmetic of its figures."""

from __future__ import annotations

import importlib
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import PHASES, PRELOADED, PRELOADED_TINY, run_pass
from benchmarks.on_gpu.material import DECODERS, VIT_L_336, Shape
from benchmarks.on_gpu.measuring import best_batch
from benchmarks.on_gpu.profiling import idle, kind_of, summarise
from benchmarks.on_gpu.report import bars, table
from benchmarks.on_gpu.work import Useful, batch_amount, projector_operations, tower_operations
from benchmarks.ours import Amount
from vlm_tune.data.batch import Batch


@pytest.mark.slow
def test_every_phase_runs_on_a_cpu(tmp_path: Path) -> None:
    """Both passes in tiny shapes: all checks pass, and what needs a GPU says so."""
    # Forks of this process, which imports once what the phases need.
    for name in PRELOADED_TINY:
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    for number, phases in PHASES.items():
        passing = run_pass(number, tmp_path, tmp_path / "folder", tiny=True, context=fork)
        log = (tmp_path / f"gpu-{number}.log").read_text()
        states = {name: phase["state"] for name, phase in passing.phases.items()}
        assert states == dict.fromkeys((phase.name for phase in phases), "DONE"), log[-8000:]
        written = json.loads((tmp_path / f"gpu-{number}.json").read_text())
        checks = [check for phase in written["phases"].values() for check in phase["checks"]]
        assert {check["state"] for check in checks} <= {"PASS", "NOT RUN"}
        assert all(check["detail"] for check in checks)
        rows = {row["name"] for row in written["rows"]}
        assert all(row["questions_per_s"] > 0 for row in written["rows"])
        lines = "\n".join(table(passing.phases))
        assert all(name in lines for name in (*states, *rows))
    assert {"7b branches", "7b nf4", "7b trl rows", "7b trl turns", "t5-xl rows"} <= rows
    assert {"1b dpo", "1b trl dpo", "1b grpo", "1b trl grpo"} <= rows
    assert {"1B, DPO over TRL's, ten pairs an image"} <= bars(passing.phases).keys()
    profile = written["phases"]["7b-branches"]["figures"]["profile"]
    assert sum(profile["shares"].values()) == pytest.approx(1)
    turns, branches = (
        next(row for row in written["rows"] if row["name"] == name)
        for name in ("7b trl turns", "7b branches")
    )
    assert turns["questions_a_step"] == branches["questions_a_step"] == 20
    # Questions that begin alike share that too as branches.
    assert branches["tokens_a_step"] < turns["tokens_a_step"] < 2 * branches["tokens_a_step"]


def test_a_phase_that_fails_and_one_without_time(tmp_path: Path, monkeypatch: Any) -> None:
    """The pass fails, and says which phases it did not reach."""

    def broken(report: Any) -> None:
        report.check("one of two", False, "is wrong")

    module = importlib.import_module("benchmarks.on_gpu.environment")
    monkeypatch.setattr(module, "environment", broken)
    fork = multiprocessing.get_context("fork")
    passing = run_pass(
        1, tmp_path, tmp_path / "folder", tiny=True, only=["environment"], context=fork
    )
    assert passing.failed
    assert passing.phases["environment"]["reason"] == "failed: one of two"
    passing = run_pass(1, tmp_path, tmp_path / "folder", tiny=True, seconds=0.0, context=fork)
    assert {phase["state"] for phase in passing.phases.values()} == {"NOT RUN"}
    assert not passing.failed


@pytest.mark.parametrize("name", PRELOADED)
def test_preloaded_modules_are_there(name: str) -> None:
    """A name that is none would leave every phase to import for itself, in silence."""
    importlib.import_module(name)


# --- useful work -------------------------------------------------------------------------------


def test_operations_of_a_tower_by_hand() -> None:
    """Patches 2 x 2 of 3·2·2 numbers, 5 tokens of width 4, an MLP of 8; two blocks."""
    vision = SimpleNamespace(hidden_size=4, intermediate_size=8, image_size=4, patch_size=2)
    embedding = 2 * 4 * 12 * 4
    linear = 2 * 5 * (4 * 4 * 4 + 2 * 4 * 8)
    attention = 2 * 2 * 5 * 5 * 4
    assert tower_operations(vision, 2) == embedding + 2 * (linear + attention)


def test_operations_of_a_projector_by_hand() -> None:
    """Two layers, 4 -> 6 -> 6, over 3 tokens: the first passes no gradient on."""
    first = 2 * 24 + 2 * 24
    second = 2 * 36 + 2 * 36 + 2 * 36
    assert projector_operations(3, 4, 6) == 3 * (first + second)


def test_operations_of_a_step_by_hand() -> None:
    """One block of width 4 with two heads, LoRA of rank 1, 10 tokens, 2 of them supervised."""
    text = SimpleNamespace(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
    )
    vision = SimpleNamespace(hidden_size=4, intermediate_size=8, image_size=4, patch_size=2)
    useful = Useful.of(text, vision, blocks=1, rank=1)
    frozen = 2 * (4 * 4) + 2 * (4 * 2) + 3 * (4 * 8)
    adapters = 2 * (4 + 4) + 2 * (4 + 2) + 3 * (4 + 8)
    pairs = 55
    forward = 10 * 2 * (frozen + adapters) + 2 * 2 * 4 * pairs + 2 * 2 * 4 * 16
    to_inputs = 10 * 2 * (frozen + adapters) + 2 * 2 * 2 * 4 * pairs + 2 * 2 * 4 * 16
    to_adapters = 10 * 2 * adapters
    image = tower_operations(vision, 1) + projector_operations(4, 4, 4)
    amount = Amount(tokens=10, read_pairs=pairs, supervised=2)
    assert useful.operations(amount, 3) == forward + to_inputs + to_adapters + 3 * image


def test_amounts_of_a_batch_leave_out_padding() -> None:
    """A row of two branches after a prefix of two tokens, and a plain row of three."""
    ignored = -100
    batch = Batch(
        ids=["a", "b"],
        input_ids=torch.zeros(2, 5, dtype=torch.int64),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool(),
        image_mask=torch.zeros(2, 5, dtype=torch.bool),
        labels=torch.tensor([[ignored, ignored, 7, 8, ignored], [ignored, 5, 6, ignored, ignored]]),
        media_index=torch.zeros(0, dtype=torch.int64),
        visible_until=torch.tensor([[4, 4, 3, 4, 0], [3, 3, 3, 0, 0]]),
    )
    amount = batch_amount(batch, seq2seq=False)
    assert (amount.tokens, amount.supervised) == (7, 4)
    assert amount.read_pairs == (4 + 3 + 1 + 1) + (3 + 2 + 1)
    batch.visible_until = None
    assert batch_amount(batch, seq2seq=False).read_pairs == 10 + 6


def test_amounts_of_packed_encoder_decoder_rows() -> None:
    """Two samples of 2 and 1 input tokens, with 1 and 2 targets, in one row with padding."""
    batch = Batch(
        ids=["a"],
        input_ids=torch.zeros(1, 4, dtype=torch.int64),
        attention_mask=torch.tensor([[1, 1, 1, 0]]).bool(),
        image_mask=torch.zeros(1, 4, dtype=torch.bool),
        labels=torch.tensor([[3, 4, 5]]),
        media_index=torch.zeros(0, dtype=torch.int64),
        samples=torch.tensor([[0, 0, 1, -1]]),
        label_samples=torch.tensor([[0, 1, 1]]),
    )
    amount = batch_amount(batch, seq2seq=True)
    assert amount == Amount(
        tokens=3, labels=3, read_pairs=4 + 1, written_pairs=(1 + 2) + (3 + 2), supervised=3
    )


def test_a_7b_image_in_branches_is_as_docs_gpu_says() -> None:
    """docs/gpu.md's arithmetic: operations of an image with 10 questions, and of their 10 rows."""
    text, vision = Shape("7b", VIT_L_336, DECODERS["7b"], False).configs()
    useful = Useful.of(text, vision, blocks=23, rank=16)
    prefix, question, answer = 581, 16, 2
    branches = prefix + 10 * question
    pairs = prefix * (prefix + 1) / 2 + 10 * sum(prefix + k for k in range(1, question + 1))
    one = useful.operations(Amount(branches, 0, pairs, 0, 10 * answer), 1)
    row = prefix + question
    rows = useful.operations(Amount(10 * row, 0, 10 * row * (row + 1) / 2, 0, 10 * answer), 10)
    shown = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    assert f"{one / 1e12:.1f} TFLOP" in shown
    assert f"{rows / 1e12:.0f} TFLOP" in shown


# --- search, profile, bars -----------------------------------------------------------------------


def test_the_search_doubles_while_it_fits_and_pays() -> None:
    def trial(batch: int) -> dict[str, float] | None:
        """10 GB of weights and 2 a row; no faster from 8 on."""
        tried.append(batch)
        rate = float(min(batch, 8))
        return {"questions_per_s": rate, "weights_gb": 10.0, "above_weights_gb": 2.0 * batch}

    tried: list[int] = []
    assert best_batch(trial, 1, 64, None)[0] == 8
    assert tried == [1, 2, 4, 8, 16]
    tried.clear()
    best, trials = best_batch(trial, 1, 64, 28.0)  # 4 rows take 18, 8 would take 26 of 26.04
    assert (best, list(trials)) == (8, ["1", "2", "4", "8"])
    assert best_batch(trial, 1, 64, 27.0)[0] == 4
    assert best_batch(lambda batch: trial(batch) if batch < 4 else None, 1, 64, None)[0] == 2
    with pytest.raises(RuntimeError, match="out of memory with a batch of 1"):
        best_batch(lambda batch: None, 1, 64, None)


def test_a_profile_in_shares() -> None:
    spans = [
        ("sm90_xmma_gemm_bf16", 0.0, 60.0),
        ("triton_poi_fused_mul", 50.0, 70.0),
        ("flash_fwd_kernel", 80.0, 100.0),
    ]
    figures = summarise(spans, ["aten::_local_scalar_dense", "cudaLaunchKernel"])
    assert figures["shares"] == {"matrix products": 0.6, "compiled": 0.2, "attention": 0.2}
    assert figures["idle"] == pytest.approx(0.1)  # 70 to 80
    assert figures["synchronisations"] == {"aten::_local_scalar_dense": 1}
    assert (figures["kernels"], figures["step_ms"]) == (3, 0.1)
    assert idle([]) == 0.0
    assert kind_of("kDequantizeBlockwise") == "4-bit"


def test_bars_count_what_was_reached() -> None:
    """MFU is on the best GEMM rate of all phases; a bar without its peer is left out."""
    trial = {"above_weights_gb": 9.0}
    branches = {
        "name": "7b branches",
        "batch": 16,
        "questions_per_s": 160.0,
        "operations_per_s": 300e12,
        "ms": 80.0,
        "trials": {"8": trial},
    }
    turns = {
        "name": "7b trl turns",
        "batch": 8,
        "questions_per_s": 80.0,
        "operations_per_s": 200e12,
        "ms": 100.0,
        "above_weights_gb": 18.0,
    }
    nf4 = {"name": "7b nf4", "batch": 16, "questions_per_s": 1.0, "ms": 96.0}
    phases = {
        "one": {"state": "DONE", "figures": {"gemm_per_s": 500e12}, "rows": [branches, nf4]},
        "two": {"state": "DONE", "figures": {"gemm_per_s": 600e12}, "rows": [turns]},
        "three": {"state": "NOT RUN", "reason": "no time was left"},
    }
    measured = {name: (bar["measured"], bar["met"]) for name, bar in bars(phases).items()}
    assert measured == {
        "7B, branches over TRL's turns": (2.0, True),
        "7B, MFU on the measured GEMM rate": (0.5, True),
        "7B, NF4 step over bf16 step": (pytest.approx(1.2), False),
        "7B, memory above weights at TRL's questions a step": (0.5, True),
    }
    assert "NOT RUN  three: no time was left" in list(table(phases))
