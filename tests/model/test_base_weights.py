"""The weights under a saved model.

Noted with a fingerprint, found where they are now, refused where they are others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.helpers.tiny_models import (
    CLIP,
    LORA_TUNE,
    built,
    largest,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tower,
    with_tune,
)
from tests.helpers.vlm_samples import save_llava, stir, with_pretrained
from vlm_tune.api import merge, sft
from vlm_tune.cli import app
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export
from vlm_tune.exporting.verify import observe
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build_processor
from vlm_tune.model.checkpoint import load_model

Tiny = Callable[..., str]
CHANGED = "model.layers.1.mlp.up_proj.weight"


def saved_over(base: Path, text: str, folder: Path) -> tuple[Path, Any]:
    """A LoRA model over a tiny Llama in `base`, saved; and its recipe."""
    recipe = parsed(
        with_tune(
            with_llm(text, save_llm(base, "causal", rows_of(parsed(text))), "causal"), LORA_TUNE
        )
    )
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    model.save_pretrained(folder)
    return folder, recipe


def change_one_number(folder: Path, name: str = CHANGED) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def test_another_base_in_the_place_of_the_old_one_is_refused(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """One number of one tensor differs: loading, merging and exporting name the tensor.

    Told to, they go on.
    """
    saved, _ = saved_over(tmp_path / "base", tiny_recipe("causal"), tmp_path / "saved")
    load_model(saved)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    change_one_number(tmp_path / "base")
    differs = (
        rf"its llm was .*base.*1 of 21 tensors differ \({CHANGED}\).*--base "
        r"PATH.*--accept-other-base"
    )
    with pytest.raises(ModelError, match=differs):
        VisionLanguageModel.from_pretrained(saved)
    with pytest.raises(ModelError, match=differs):
        merge(saved, tmp_path / "merged", dtype="fp32")
    with pytest.raises(ModelError, match=differs):
        export(saved, tmp_path / "exported", format="adapter")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "exported").exists()
    # A copy holds the same weights, whatever its name and time; the changed ones are taken when
    # that is said.
    merge(saved, tmp_path / "merged", dtype="fp32", base=tmp_path / "copy")
    merge(saved, tmp_path / "merged other", dtype="fp32", accept_other_base=True)
    copied, other = (
        load_file(tmp_path / name / "llm" / "model.safetensors")
        for name in ("merged", "merged other")
    )
    assert [name for name in copied if not torch.equal(copied[name], other[name])] == [CHANGED]


def test_the_bases_config_is_part_of_it(tiny_recipe: Tiny, tmp_path: Path) -> None:
    saved, _ = saved_over(tmp_path / "base", tiny_recipe("causal"), tmp_path / "saved")
    config = tmp_path / "base" / "config.json"
    config.write_text(
        json.dumps(
            {**json.loads(config.read_text()), "rms_norm_eps": 0.1, "transformers_version": "1"}
        )
    )
    with pytest.raises(
        ModelError, match=r"config.json has rms_norm_eps: .* -> 0.1. Name the original ones"
    ):
        load_model(saved)


def test_a_base_that_moved(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is found from elsewhere and where both folders moved together.

    One that is gone is named.
    """
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    saved_over(Path("models/base"), tiny_recipe("causal"), Path("runs/saved"))
    monkeypatch.chdir(tmp_path)
    first = load_model(project / "runs" / "saved")
    project.rename(tmp_path / "elsewhere")
    again = load_model(tmp_path / "elsewhere" / "runs" / "saved")
    assert Path(str(again.config.llm.name)) == tmp_path / "elsewhere" / "models" / "base"
    same = [
        torch.equal(a, b)
        for a, b in zip(first.llm.parameters(), again.llm.parameters(), strict=True)
    ]
    assert all(same)
    (tmp_path / "elsewhere" / "models" / "base").rename(tmp_path / "new place")
    for arguments in (
        ["chat", "--prompt", "hi"],
        ["merge", "--output", str(tmp_path / "merged"), "--dtype", "fp32"],
    ):
        command = [arguments[0], str(tmp_path / "elsewhere" / "runs" / "saved"), *arguments[1:]]
        gone = CliRunner().invoke(app, command)
        assert isinstance(gone.exception, ModelError)
        assert "it needs the weights of 'models/base'" in str(
            gone.exception
        ) and "--base PATH" in str(gone.exception)
        invocation = CliRunner().invoke(
            app, [*command, "--base", str(tmp_path / "new place")], catch_exceptions=False
        )
        assert invocation.exit_code == 0, invocation.output
    with pytest.raises(ModelError, match="base: no such file or folder: /nowhere"):
        VisionLanguageModel.from_pretrained(
            tmp_path / "elsewhere" / "runs" / "saved", base="/nowhere"
        )


def test_another_tower_is_refused_too(tiny_recipe: Tiny, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    for seed, name in enumerate(("clip", "other")):
        torch.manual_seed(seed)
        stir(CLIPVisionModel(CLIPVisionConfig(**CLIP))).save_pretrained(tmp_path / name)
    text = with_tower(
        tiny_recipe("causal"), f"{{kind: transformers, name: {tmp_path / 'clip'}, layer: -2}}"
    )
    built(parsed(with_tune(text))).save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "clip", tmp_path / "copy")
    shutil.rmtree(tmp_path / "clip")
    with pytest.raises(ModelError, match=r"needs the weights of .*clip.*--base tower=PATH"):
        load_model(tmp_path / "saved")
    VisionLanguageModel.from_pretrained(tmp_path / "saved", base={"tower": tmp_path / "copy"})
    with pytest.raises(ModelError, match=r"its tower was .*clip.*tensors differ"):
        VisionLanguageModel.from_pretrained(tmp_path / "saved", base={"tower": tmp_path / "other"})


def test_what_is_no_whole_model_says_which_folder_to_take(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    text = tiny_recipe("causal")
    saved, recipe = saved_over(tmp_path / "base", text, tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    merge(saved, tmp_path / "merged", dtype="fp32")
    shutil.copytree(tmp_path / "base", tmp_path / "both")
    for path in (saved / "adapter").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "both")
    expected = {
        saved / "adapter": "is a PEFT adapter over .*base.*; merge it first",
        tmp_path / "both": "is a PEFT adapter over",
        tmp_path / "run": "is a run of vlm_tune; run `vlm-tune merge",
        saved: "is a model of vlm_tune with all its parts; run `vlm-tune merge",
        tmp_path / "merged": (
            "name its language model, .*merged/llm, or model.pretrained: .*merged for all parts"
        ),
        tmp_path / "missing": "model.llm.name: no such folder: ",
    }
    for folder, message in expected.items():
        with pytest.raises(ModelError, match=message):
            build_processor(parsed(with_llm(text, folder, "causal")), rows_of(recipe))
        with pytest.raises(ModelError, match=message):
            built(parsed(with_llm(text, folder, "causal")))
    for folder, message in (
        (saved, "parts that are not merged \\(adapter\\)"),
        (saved / "adapter", "PEFT adapter"),
        (tmp_path / "run", "a run"),
    ):
        with pytest.raises(ModelError, match=f"model.pretrained: .*{message}"):
            built(parsed(with_pretrained(text, folder, "chatml")))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_run_starts_from_a_merged_folder(kind: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """All parts of a merged folder, or its LLM alone.

    The next run begins as the first one ended.
    """
    text = tiny_recipe(kind, output="first")
    sft(
        parsed(
            with_tune(
                text, LORA_TUNE.replace('"tower.*", how: frozen', '"tower.*", how: lora, r: 2')
            ),
            train__steps=6,
        )
    )
    merge(tmp_path / "first", tmp_path / "merged", dtype="fp32")
    rows = rows_of(parsed(text))
    expected, texts = observe(load_model(tmp_path / "merged", dtype=torch.float32), rows)
    following = with_tune(
        with_pretrained(
            tiny_recipe(kind, output="next"),
            tmp_path / "merged",
            "chatml" if kind == "causal" else "flan",
        )
    )
    start, answers = observe(built(parsed(following)).float(), rows)
    assert largest(start, expected) <= 1e-5 and answers == texts
    last = _losses(sft(parsed(following, train__learning_rate=1e-6)).folder)[0]
    assert last == pytest.approx(_loss_of(expected, tmp_path / "merged", rows), rel=1e-2)
    # What it saves needs nothing of the merged folder's tower and connector, and notes its LLM.
    notes = json.loads((tmp_path / "next" / "model" / "bases.json").read_text())
    assert list(notes["parts"]) == ["llm"] and notes["parts"]["llm"]["name"] == str(
        tmp_path / "merged" / "llm"
    )
    from_llm = built(parsed(with_llm(tiny_recipe(kind), tmp_path / "merged" / "llm", kind)))
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(from_llm.llm.parameters(), merged.llm.parameters(), strict=True)
    )


def _losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


def _loss_of(logits: torch.Tensor, folder: Path, rows: Any) -> float:
    """The mean cross-entropy of what `observe` gives for rows."""
    model = load_model(folder, dtype=torch.float32)
    examples = [example for row in rows for example in model.processor.examples(row)]
    targets = torch.cat([torch.from_numpy(e.labels[e.labels != -100]).long() for e in examples])
    return float(torch.nn.functional.cross_entropy(logits.view(len(targets), -1), targets))


def test_a_run_starts_from_an_exported_llava(tiny_recipe: Tiny, tmp_path: Path) -> None:
    text = tiny_recipe("causal", output="first")
    save_llava(tmp_path / "llava", rows_of(parsed(text)))
    first = with_tune(with_pretrained(text, tmp_path / "llava", "vicuna"), LORA_TUNE)
    sft(parsed(first))
    export(tmp_path / "first", tmp_path / "exported", format="transformers", dtype="fp32")
    rows = rows_of(parsed(first))
    expected, texts = observe(load_model(tmp_path / "first", dtype=torch.float32), rows)
    following = with_tune(
        with_pretrained(tiny_recipe("causal", output="next"), tmp_path / "exported", "vicuna"),
        LORA_TUNE,
    )
    start, answers = observe(built(parsed(following)).float(), rows)
    assert answers == texts
    # The exported vocabulary has <image> as well.
    vocabulary = load_model(tmp_path / "first").llm.head.weight.shape[0]  # type: ignore[union-attr]
    expected = expected.view(-1, vocabulary)
    assert largest(start.view(len(expected), -1)[:, :vocabulary], expected) <= 1e-4
    sft(parsed(following, train__steps=1))
    load_model(tmp_path / "next")


def test_a_run_is_resumed_over_a_base_that_moved_and_not_over_another(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    text = tiny_recipe("causal")
    save_llm(tmp_path / "base", "causal", rows_of(parsed(text)))

    def resume(base: str) -> None:
        recipe = parsed(
            with_tune(with_llm(text, tmp_path / base, "causal"), LORA_TUNE), train__steps=6
        )
        sft(recipe, resume=True, accept_changes=True)

    sft(parsed(with_tune(with_llm(text, tmp_path / "base", "causal"), LORA_TUNE)))
    (tmp_path / "base").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    change_one_number(tmp_path / "other")
    with pytest.raises(ModelError, match="1 of 21 tensors differ"):
        resume("other")
    resume("moved")
    load_model(tmp_path / "run")
