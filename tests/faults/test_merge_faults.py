"""FAULTS 54 to 56.

Merges that did nothing, merges into quantised weights, and saves that are cut short.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_same_bits,
    built,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tune,
)
from vlm_tune.errors import ModelError
from vlm_tune.exporting.merge import MergeReport, check_merge, merge
from vlm_tune.model import checkpoint, committed_folders
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.committed_folders import commit_folder, is_whole, verify_folder


def trained(text: str, folder: Path, *, scale: float = 0.3) -> Path:
    """A saved model whose adapter changes it by `scale`."""
    recipe = parsed(with_tune(text, LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model, scale)
    model.save_pretrained(folder)
    return folder


def test_fault_54_a_zeroed_adapter_is_not_merged(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    saved = trained(tiny_recipe("causal"), tmp_path / "saved", scale=0.0)
    with pytest.raises(
        ModelError, match="the merge had no effect: merged logits equal the base model's"
    ):
        merge(saved, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_fault_54_a_merge_that_changed_something_else_is_refused(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlm_tune.exporting.merge as merging

    saved = trained(tiny_recipe("seq2seq"), tmp_path / "saved")
    right = merging.merge_adapter

    def wrong(model: Any, part: str) -> None:
        right(model, part)
        for parameter in model.llm.parameters():
            parameter.data.mul_(1.2)

    monkeypatch.setattr(merging, "merge_adapter", wrong)
    with pytest.raises(ModelError, match=r"more than 0\.02; nothing was written"):
        merge(saved, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_fault_54_other_text_is_refused_even_where_logits_are_near() -> None:
    good = MergeReport("out", ["llm"], "base", 0.001, 0.5, True, 4)
    check_merge(good)
    with pytest.raises(ModelError, match="greedy text differs"):
        check_merge(replace(good, same_text=False))
    with pytest.raises(ModelError, match="more than"):
        check_merge(replace(good, difference_to_adapter=0.021))
    with pytest.raises(ModelError):
        check_merge(replace(good, difference_to_adapter=float("nan")))
    with pytest.raises(ModelError):
        check_merge(replace(good, difference_to_base=float("nan")))


def test_fault_54_a_model_without_an_adapter_has_nothing_to_merge(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    built(parsed(tiny_recipe("causal"))).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="nothing to merge"):
        merge(tmp_path / "plain", tmp_path / "merged")


def test_fault_54_an_adapter_that_is_not_finite_is_not_merged(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    saved = trained(tiny_recipe("causal"), tmp_path / "saved", scale=float("inf"))
    with pytest.raises(ModelError):
        merge(saved, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_fault_55_a_quantised_run_is_merged_into_its_16_bit_base(
    quantize: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe("causal", precision="bf16")
    base = save_llm(tmp_path / "base", "causal", rows_of(parsed(text)), hidden_size=64)
    saved = trained(
        with_llm(text, base, "causal", f", quantize: {quantize}"), tmp_path / "saved", scale=0.05
    )
    report = merge(saved, tmp_path / "merged")
    assert report.base == f"{base} in bf16 (the run was {quantize})"
    assert f"(the run was {quantize})" in (tmp_path / "merged" / "README.md").read_text()
    merged, exact = (
        load_file(tmp_path / "merged" / "llm" / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    assert merged.keys() == exact.keys()
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    adapter = load_file(saved / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    change = (
        2
        * adapter[f"base_model.model.{name}.lora_B.weight"].float()
        @ adapter[f"base_model.model.{name}.lora_A.weight"].float()
    )
    expected = exact[f"{name}.weight"].bfloat16().float() + change
    assert torch.allclose(merged[f"{name}.weight"].float(), expected, rtol=2**-7, atol=1e-4)
    assert torch.equal(
        merged["model.embed_tokens.weight"], exact["model.embed_tokens.weight"].bfloat16()
    )
    with pytest.raises(ModelError, match="can't be merged into quantised weights"):
        checkpoint.load_model(saved)  # the packed base is what a run is used with ...
        from vlm_tune.model.lora import merge_adapter

        merge_adapter(load_model(saved), "llm")  # ... and never what is merged into


def test_fault_56_the_output_folder_must_be_free(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    saved = trained(tiny_recipe("causal"), tmp_path / "saved")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="not empty"):
        merge(saved, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_fault_56_an_error_in_a_save_leaves_no_partial_folder(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save fails at its first, second, ... write, until it goes through."""
    model = built(parsed(tiny_recipe("causal")))
    target = tmp_path / "out" / "saved"
    calls, limit = [0], [0]

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] > limit[0]:
                raise OSError(28, "No space left on device")
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(checkpoint, "write_safetensors", counted(checkpoint.write_safetensors))
    monkeypatch.setattr(committed_folders, "_sync", counted(committed_folders._sync))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    for limit[0] in range(100):
        calls[0] = 0
        try:
            model.save_pretrained(target)
        except OSError:
            left = [path.name for path in (tmp_path / "out").iterdir()]
            assert left == [] or (left == ["saved"] and is_whole(target))
            continue
        break
    assert limit[0] > 5
    verify_folder(target)


def test_fault_56_a_failed_replacement_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    commit_folder(
        target, lambda folder: save_file({"a": torch.ones(2)}, folder / "a.safetensors") and None
    )

    def fails(folder: Path) -> None:
        save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_folder(target, fails)
    verify_folder(target)
    assert torch.equal(load_file(target / "a.safetensors")["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fault_56_a_save_that_fails_at_the_last_rename_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    commit_folder(
        target, lambda folder: save_file({"a": torch.ones(2)}, folder / "a.safetensors") and None
    )
    rename = Path.rename

    def fails(self: Path, other: Any) -> Any:
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        commit_folder(
            target,
            lambda folder: save_file({"a": torch.zeros(2)}, folder / "a.safetensors") and None,
        )
    monkeypatch.undo()
    verify_folder(target)
    assert torch.equal(load_file(target / "a.safetensors")["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fault_56_a_kill_in_a_merge_leaves_no_folder_that_loads(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """The process dies (no handler runs) while the files are written; the next try goes through."""
    saved = trained(tiny_recipe("causal"), tmp_path / "saved")
    target = tmp_path / "merged"
    child = os.fork()
    if child == 0:

        def die(folder: Path) -> None:
            (folder / "half.bin").write_bytes(b"x")
            os._exit(9)

        commit_folder(target, die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not target.exists()
    assert merge(saved, target).same_text
    verify_folder(target)
    assert_same_bits(target, target)
