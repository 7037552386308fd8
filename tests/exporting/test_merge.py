"""Merged models do what the adapter does, and say how far from it they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_same_outputs,
    built,
    largest,
    parsed,
    rows_of,
    run_card,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tune,
)
from vlm_tune.errors import ModelError
from vlm_tune.exporting.merge import merge
from vlm_tune.exporting.verify import observe, probe_rows
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.committed_folders import verify_folder
from vlm_tune.rendering.proofs import merge_proof

BOTH = """
tune:
  - {match: "tower.*", how: lora, r: 2}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, target_modules: all-linear}
train:"""


def trained(text: str, folder: Path, tune: str = LORA_TUNE, scale: float = 0.3) -> tuple[Path, Any]:
    recipe = parsed(with_tune(text, tune))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model, scale)
    model.save_pretrained(folder)
    return folder, recipe


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["scratch", "named"])
def test_merged_is_the_adapter_and_not_the_base(
    kind: str, dtype: str, source: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe(kind)
    if source == "named":
        # T5's own random weights are of another size than trained ones, whose logits bf16 hardly
        # moves.
        config = {"initializer_factor": 0.3} if kind == "seq2seq" else {}
        text = with_llm(
            text, save_llm(tmp_path / "base", kind, rows_of(parsed(text)), **config), kind
        )
    saved, recipe = trained(
        text,
        tmp_path / "saved",
        scale=0.3 if dtype == "fp32" else 0.05 if kind == "causal" else 0.07,
    )
    report = merge(saved, tmp_path / "merged", dtype=dtype)
    bound = 1e-4 if dtype == "fp32" else 2e-2
    assert report.difference_to_adapter <= bound < report.difference_to_base
    assert report.parts == ["llm"]
    assert (dtype in report.base) and report.same_text
    rows = rows_of(recipe)
    precision = torch.float32 if dtype == "fp32" else torch.bfloat16
    merged = VisionLanguageModel.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapter = load_model(saved, dtype=precision).float()
    base = load_model(saved, dtype=precision, adapters=False).float()
    logits, texts = observe(merged, rows)
    assert largest(logits, observe(adapter, rows)[0]) <= bound
    assert largest(logits, observe(base, rows)[0]) > bound
    assert texts == observe(adapter, rows)[1]
    assert not merged.adapters
    # The folder stands alone: nothing of the base's folder is read.
    verify_folder(tmp_path / "merged")
    if source == "named":
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        again = VisionLanguageModel.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert_same_outputs(observe(again, rows)[0], logits)


def test_merged_files(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved, _ = trained(tiny_recipe("causal"), tmp_path / "saved")
    report = merge(saved, tmp_path / "merged", dtype="fp32")
    names = {
        str(path.relative_to(tmp_path / "merged"))
        for path in (tmp_path / "merged").rglob("*")
        if path.is_file()
    }
    expected = {
        "config.json",
        "connector.safetensors",
        "tower.safetensors",
        "llm/model.safetensors",
        "llm/config.json",
        "tokenizer.json",
    }
    assert names >= expected | {"merge.json", "README.md", "manifest.json", "chat_template.jinja"}
    assert not any("adapter" in name for name in names)
    assert (
        json.loads((tmp_path / "merged" / "merge.json").read_text())["difference_to_base"]
        == report.difference_to_base
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "llm")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == plain.config.vocab_size


def test_the_towers_adapter_is_merged_too(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    saved, recipe = trained(tiny_recipe("causal"), tmp_path / "saved", BOTH)
    report = merge(saved, tmp_path / "merged", dtype="fp32")
    assert report.parts == ["llm", "tower"]
    rows = rows_of(recipe)
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert (
        largest(observe(merged, rows)[0], observe(load_model(saved, dtype=torch.float32), rows)[0])
        <= 1e-4
    )


def test_loading_in_half_precision_keeps_the_pixel_scale(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Buffers are not weights: pixels are normalised after loading as they were in training."""
    saved, recipe = trained(tiny_recipe("causal"), tmp_path / "saved")
    model, loaded = built(recipe), load_model(saved, dtype=torch.bfloat16)
    assert torch.equal(model.tower.scale, loaded.tower.scale)
    assert torch.equal(model.tower.offset, loaded.tower.offset)
    assert {parameter.dtype for parameter in loaded.tower.parameters()} == {torch.bfloat16}


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        merge(tmp_path / "nothing", tmp_path / "merged")
    with pytest.raises(ModelError, match="holds no model"):
        merge(tmp_path, tmp_path / "merged")


def test_what_a_merge_says_and_its_card(
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, _ = trained(tiny_recipe("causal"), tmp_path / "saved")
    report = merge(saved, tmp_path / "merged", dtype="fp32")
    lines = merge_proof(report).splitlines()
    assert lines[0] == "verified on 1 row, computed in fp32:"
    assert [line.split()[0] for line in lines[1:]] == ["passed"] * 3
    assert (
        f"within {report.difference_to_adapter:.2g} of" in lines[1]
        and "(0.02 is allowed)" in lines[1]
    )
    printed = run_card(tmp_path / "merged", monkeypatch, capsys)
    assert printed.endswith("\n") and len(printed.splitlines()) >= 1


def test_a_coarse_merge_is_allowed_and_one_in_fp32_says_why(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal"), LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    model.llm.head.weight.data *= 3000  # type: ignore[operator, union-attr]
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    fine = merge(saved, tmp_path / "fine")
    assert fine.dtype == "fp32" and fine.why_dtype is not None
    assert (
        "bf16 moves the logits by" in fine.why_dtype and "--tolerance allows more" in fine.why_dtype
    )
    assert f"merged in fp32 because {fine.why_dtype}" in merge_proof(fine)
    assert (
        f"merged in fp32 because {fine.why_dtype}" in (tmp_path / "fine" / "README.md").read_text()
    )
    coarse = merge(saved, tmp_path / "coarse", tolerance=1e3)
    assert coarse.dtype == "bf16" and coarse.why_dtype is None and coarse.allowed == 1e3
    assert coarse.difference_to_adapter > 2e-2
    with pytest.raises(
        ModelError,
        match=r"more than 0\.02; nothing was written. Try --dtype fp32, or allow it with "
        r"--tolerance",
    ):
        merge(saved, tmp_path / "refused", dtype="bf16")


def test_a_quantised_run_is_compared_as_it_was_trained(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe("causal")
    named = with_llm(
        text,
        save_llm(tmp_path / "base", "causal", rows_of(parsed(text))),
        "causal",
        ", quantize: nf4",
    )
    saved, _ = trained(named, tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text(with_tune(named))
    report = merge(saved, tmp_path / "merged", dtype="fp32")
    assert report.quantized == "nf4" and report.difference_to_run is not None and report.scored == 8
    rows = probe_rows(saved, load_model(saved))
    as_trained, _ = observe(load_model(saved, dtype=torch.float32), rows)
    merged, _ = observe(load_model(tmp_path / "merged", dtype=torch.float32), rows)
    assert report.difference_to_run == pytest.approx(largest(as_trained, merged), rel=1e-3)
    assert report.difference_to_run > 10 * report.difference_to_adapter
    proof = merge_proof(report)
    assert "from those of the run as it was trained, over its nf4 base" in proof
    assert (
        f"exact match on 8 validation rows: {report.run_accuracy:.4f} as trained, "
        f"{report.merged_accuracy:.4f} merged" in proof
    )
    assert (
        json.loads((tmp_path / "merged" / "merge.json").read_text())["run_accuracy"]
        == report.run_accuracy
    )
    (tmp_path / "messages.jsonl").unlink()
    assert "its validation part can't be read" in str(
        merge(saved, tmp_path / "again", dtype="fp32").unscored
    )
