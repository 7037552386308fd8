"""FAULTS 54 and 56 to 59 of exports.

Corrupted, cut short, unreadable elsewhere, impossible, too large.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.export_samples import llava_text, photos, saved_model
from tests.helpers.tiny_models import built, parsed, with_tower
from vlm_tune.cli import main
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.exporting import export, hf_export, merge, source
from vlm_tune.exporting.gguf import export as gguf
from vlm_tune.exporting.gguf import verification
from vlm_tune.exporting.gguf.writer import read_fields
from vlm_tune.exporting.hf_export import verify_transformers
from vlm_tune.exporting.source import Expected, count_parameters, expected_of, text_config
from vlm_tune.exporting.verify import observe, probe_rows
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model import committed_folders
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.committed_folders import verify_folder
from vlm_tune.model.restoring import read_config

WITHOUT_EFFECT = ("post_layernorm", "k_proj.bias")
"""A norm that no feature passes, and biases that add one number to all of a query's scores."""


def test_fault_54_an_adapter_that_is_not_applied_is_not_exported(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved", lora=True, sharpen=1.0)
    monkeypatch.setattr(
        merge, "merge_adapter", lambda model, part: model.adapters.pop(part).unload()
    )
    with pytest.raises(ModelError, match="the merge had no effect"):
        export(run, tmp_path / "llava", verify=False)
    assert [path.name for path in tmp_path.iterdir() if "llava" in path.name] == []


def test_fault_56_sigterm_leaves_nothing_of_an_export(
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved", lora=True)
    before = sorted(tmp_path.rglob("*"))

    def signalled(folder: Path) -> None:
        assert any(tmp_path.glob(".merged.tmp-*/*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(committed_folders, "write_manifest", signalled)
    handler = signal.getsignal(signal.SIGTERM)
    arguments = ["vlm-tune", "merge", str(run), "--output", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_fault_54_any_corrupted_tensor_is_found(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    export(run, tmp_path / "llava", dtype="fp32")
    ours = load_model(run / "model", dtype=torch.float32)
    rows = probe_rows(run, ours)
    logits, texts = observe(ours, rows)
    expected = Expected(rows, logits.unflatten(0, (-1, len(ours.processor.tokenizer))), texts)
    difference, _ = verify_transformers(tmp_path / "llava", ours, expected, 1e-5)
    assert difference <= 1e-5
    whole = load_file(tmp_path / "llava" / "model.safetensors")
    names = [
        name for name in whole if not name.endswith(WITHOUT_EFFECT) and "post_layernorm" not in name
    ]
    assert len(names) > 40
    # One of each kind of tensor, of the last layer that has it.
    kinds = {re.sub(r"\.\d+\.", ".N.", name): name for name in sorted(names)}
    assert len(kinds) > 20
    generator = torch.Generator().manual_seed(2)
    for name in kinds.values():
        changed = whole[name] + torch.randn(whole[name].shape, generator=generator) * 0.1
        save_file(
            {**whole, name: changed},
            tmp_path / "llava" / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(ModelError, match="differ from the model's"):
            verify_transformers(tmp_path / "llava", ours, expected, 1e-5)
            raise AssertionError(name)
    del whole[names[0]]
    save_file(whole, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="nothing was written: the exported weights do not fit"):
        verify_transformers(tmp_path / "llava", ours, expected, 1e-5)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("chat_template.jinja", ("assistant", "Assistant"), "other token ids"),
        ("processor_config.json", ('"shortest_edge": 32', '"shortest_edge": 40'), "other pixels"),
        ("processor_config.json", ("0.48145466", "0.5"), "other pixels"),
    ],
)
def test_fault_54_a_processor_that_does_something_else_is_found(
    file: str,
    change: tuple[str, str],
    message: str,
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    photos(tmp_path)

    def corrupted(folder: Path, *rest: Any) -> Any:
        text = (folder / file).read_text()
        assert change[0] in text
        (folder / file).write_text(text.replace(*change))
        return verify_transformers(folder, *rest)

    monkeypatch.setattr(hf_export, "verify_transformers", corrupted)
    with pytest.raises(ModelError, match=message):
        export(run, tmp_path / "llava")
    assert [path.name for path in tmp_path.iterdir() if "llava" in path.name] == []


def test_fault_56_an_interrupted_export_leaves_no_folder(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    target = tmp_path / "out" / "llava"
    for place, error in (
        ("verify_transformers", KeyboardInterrupt),
        ("model_card", OSError(28, "No space left on device")),
    ):
        with monkeypatch.context() as patch:

            def fails(*arguments: Any, error: Any = error) -> None:
                raise error

            patch.setattr(hf_export, place, fails)
            with pytest.raises(
                (KeyboardInterrupt, RecipeError), match=r"^$|no space left on device: make room"
            ):
                export(run, target)
            assert list((tmp_path / "out").iterdir()) == []
    child = os.fork()
    if child == 0:
        hf_export.model_card = lambda *arguments: os._exit(9)
        export(run, target)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not target.exists()
    export(run, target)
    verify_folder(target)
    with pytest.raises(ModelError, match="not empty"):
        export(run, target)


PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vlm_tune", "open_clip"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

def answers(model, processor, questions, **options):
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": Image.open(image)}, \
{"type": "text", "text": text}]}]
        for image, text in questions
    ]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, \
return_tensors="pt", processor_kwargs={"padding": True}
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=8, **options)
    found = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return [text.strip() for text in found]

questions, beams, by_folder = json.loads(sys.argv[1]), {"num_beams": 3}, {}
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    opened = model, AutoProcessor.from_pretrained(folder, backend="pil")
    by_folder[folder] = {
        "greedy": [answers(*opened, [one])[0] for one in questions],
        "beams": [answers(*opened, [one], **beams)[0] for one in questions],
        "greedy batch": answers(*opened, questions),
        "beams batch": answers(*opened, questions, **beams),
    }
modules = [name for name in sys.modules if name.startswith("vlm_tune")]
print(json.dumps({"folders": by_folder, "modules": modules}))
"""


def test_fault_57_plain_transformers_opens_it_offline_and_answers_the_same(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Exports of several chat formats, in one process without `vlm_tune`."""
    photos(tmp_path)
    images = sorted(map(str, tmp_path.glob("*.png")))
    questions = [
        (image, question)
        for image in images
        for question in ("what color is it?", "is it red? say yes or no, please")
    ]
    requests = [{"prompt": question, "images": [image]} for image, question in questions]
    expected = {}
    for template in ("chatml", "vicuna", "smollm2", "flan"):
        text = (
            llava_text(tiny_recipe)
            .replace("template: chatml", f"template: {template}")
            .replace("max_length: 128", "max_length: 200")
        )
        run, _ = saved_model(text, tmp_path / "saved", sharpen=2.0)
        export(run, tmp_path / template, dtype="fp32")
        ours = VisionLanguageModel.from_pretrained(run, dtype=torch.float32)
        expected[str(tmp_path / template)] = (
            ours.chat_batch(requests, max_new_tokens=8),
            ours.chat_batch(requests, max_new_tokens=8, num_beams=3),
        )
        shutil.rmtree(run)
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, json.dumps(questions), *expected],
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["modules"] == []
    for folder, (greedy, beams) in expected.items():
        theirs = answers["folders"][folder]
        assert theirs["greedy"] == theirs["greedy batch"] == greedy, folder
        assert theirs["beams"] == theirs["beams batch"] == beams, folder
        assert len(set(greedy)) > 1 and any(greedy), folder


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("seq2seq", ("", ""), "an encoder-decoder"),
        ("causal", ("norm: true", "norm: true"), "begins with a LayerNorm"),
        ("causal", ("{kind: mlp, norm: true}", "{kind: mlp, depth: 3}"), "has 3 layers"),
        ("causal", ("{kind: mlp, norm: true}", "{kind: pixel_shuffle}"), "of kind pixel_shuffle"),
        ("causal", ("{kind: mlp, norm: true}", "{kind: resampler, heads: 2}"), "of kind resampler"),
        ("causal", ("image_size: 32}}", "image_size: 32}, grid: 1}"), "pools to a grid"),
        ("causal", ("image_size: 32}}", "image_size: 32}, tiles: [[1, 2]]}"), "as tiles"),
    ],
)
def test_fault_58_an_impossible_target_is_refused_first(
    kind: str, change: tuple[str, str], reason: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe(kind)
    assert change[0] in text
    built(parsed(text.replace(*change))).save_pretrained(tmp_path / "saved")
    for path in tmp_path.glob("saved/**/*.safetensors"):
        path.unlink()  # no weights are needed to tell
    with pytest.raises(ModelError, match=f"can't be exported as LLaVA: .*{reason}"):
        export(tmp_path / "saved", tmp_path / "llava")
    assert not (tmp_path / "llava").exists()


def test_fault_58_every_reason_is_named_at_once(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = with_tower(tiny_recipe("seq2seq"), "{kind: timm, name: resnet10t, image_size: 32}")
    built(parsed(text)).save_pretrained(tmp_path / "saved")
    with pytest.raises(
        ModelError, match=r"of kind timm.*pools to a grid.*LayerNorm.*encoder-decoder"
    ):
        export(tmp_path / "saved", tmp_path / "llava")


def test_fault_58_other_towers_of_open_clip_and_transformers(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
        )
    ).save_pretrained(tmp_path / "dino")
    vit = "layers: 2, width: 32, head_width: 16, patch_size: 16, image_size: 32"
    for number, (tower, reason) in enumerate(
        {
            f"{{kind: transformers, name: {tmp_path / 'dino'}}}": "of type dinov2",
            "{kind: open_clip, config: {layers: [1, 1, 1, 1], width: 16, image_size: 64, "
            "head_width: 16}}": "not a ViT",
            f"{{kind: open_clip, config: {{{vit}, ls_init_value: 0.1}}}}": "no plain CLIP",
            f"{{kind: open_clip, config: {{{vit}, no_ln_pre: true}}}}": "no plain CLIP",
        }.items()
    ):
        built(parsed(with_tower(llava_text(tiny_recipe), tower))).save_pretrained(
            tmp_path / f"saved{number}"
        )
        with pytest.raises(ModelError, match=reason):
            export(tmp_path / f"saved{number}", tmp_path / "llava")
    assert not (tmp_path / "llava").exists()


def test_fault_58_a_decoder_that_scales_its_logits(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    scaled = "model_type: granite, vocab_size: 400, config: {logits_scaling: 8.0, "
    text = llava_text(tiny_recipe).replace("model_type: llama, vocab_size: 400, config: {", scaled)
    assert "granite" in text
    built(parsed(text)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match="scales, caps or shifts its logits"):
        export(tmp_path / "saved", tmp_path / "llava")


def test_fault_59_too_little_disk_or_memory_is_said_before_starting(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(source, "load_model", never)
    config = read_config(run / "model")
    parameters = count_parameters(text_config(run / "model", config), config)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        source.shutil, "disk_usage", lambda path: usage._replace(free=parameters * 4 - 1)
    )
    with pytest.raises(
        ModelError, match=r"takes 0\.8 MB of disk, 0\.8 MB are free; nothing was started"
    ):
        export(run, tmp_path / "llava", dtype="fp32")
    with pytest.raises(AssertionError, match="weights were loaded"):
        export(run, tmp_path / "llava", dtype="bf16")
    monkeypatch.setattr(source, "available_memory", lambda: 1000)
    with pytest.raises(ModelError, match=r"of memory, 0\.0 MB are free"):
        export(run, tmp_path / "llava", dtype="bf16")
    assert not (tmp_path / "llava").exists()


# --- gguf --------------------------------------------------------------------------------------


def test_fault_54_any_corrupted_tensor_of_a_gguf_is_found(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from gguf import GGUFReader

    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    ours = load_model(run / "model", dtype=torch.float32)
    expected = expected_of(run, ours)
    files = gguf.Files(tmp_path / "gguf" / "model-f32.gguf", tmp_path / "gguf" / "mmproj-f32.gguf")
    assert gguf.verify_gguf(files, ours, expected, "fp32").difference <= 1e-5
    generator = torch.Generator().manual_seed(2)
    # One of each kind of tensor, of either file: all of them would take a minute.
    for path, names in (
        (
            files.language,
            (
                "token_embd",
                "output",
                "blk.0.attn_q",
                "blk.1.attn_k",
                "blk.1.attn_v",
                "blk.0.attn_output",
                "blk.1.ffn_gate",
            ),
        ),
        (files.language, ("blk.0.ffn_norm", "output_norm")),
        (
            files.mmproj,
            (
                "v.class_embd",
                "v.patch_embd",
                "v.position_embd",
                "v.pre_ln",
                "v.blk.0.attn_q",
                "v.blk.0.ffn_up",
                "mm.0",
                "mm.2",
            ),
        ),
    ):
        for name in names:
            tensor = next(
                one
                for one in GGUFReader(path, "r+").tensors
                if one.name in (name, f"{name}.weight")
            )
            before = tensor.data.copy()
            tensor.data[...] += torch.randn(before.shape, generator=generator).numpy() * 0.1
            with pytest.raises(ModelError, match="differ from the model's"):
                gguf.verify_gguf(files, ours, expected, "fp32")
                raise AssertionError(name)
            tensor.data[...] = before
    assert gguf.verify_gguf(files, ours, expected, "fp32").same_text


def test_fault_54_a_gguf_with_another_tokenizer_is_found(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    for key, change in (
        ("tokenizer.chat_template", lambda text: text.replace("assistant", "Assistant")),
        ("tokenizer.ggml.merges", lambda merges: merges[: len(merges) // 2]),
    ):

        def altered(path: Path, key: str = key, change: Any = change) -> dict[str, Any]:
            fields = read_fields(path)
            return {**fields, key: change(fields[key])}

        monkeypatch.setattr(verification, "read_fields", altered)
        with pytest.raises(ModelError, match="other token ids"):
            export(run, tmp_path / "gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []


@pytest.mark.parametrize("place", ["write_mmproj", "verify_gguf", "model_card"])
def test_fault_56_an_interrupted_gguf_export_leaves_no_folder(
    place: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise KeyboardInterrupt

    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    monkeypatch.setattr(gguf, place, fails)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out" / "gguf", format="gguf", verify=place == "verify_gguf")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("seq2seq", {}, "an encoder-decoder"),
        ("causal", {"{kind: mlp, norm: true}": "{kind: linear}"}, "of kind linear"),
        ("causal", {"{kind: mlp, norm: true}": "{kind: mlp, depth: 3}"}, "has 3 layers"),
        (
            "causal",
            {"image_size: 32}}": "image_size: 32}, class_token: true}"},
            "gets the class token",
        ),
        ("causal", {"image_size: 32}}": "image_size: 32}, grid: 1}"}, "pools to a grid"),
        (
            "causal",
            {"model_type: llama": "model_type: olmo"},
            "type olmo, not llama, mistral, qwen2, qwen3",
        ),
        (
            "causal",
            {"hidden_size: 32,": "hidden_size: 32, attention_bias: true,"},
            "has biases .attention_bias",
        ),
    ],
)
def test_fault_58_what_llama_cpp_can_not_hold_is_refused_first(
    kind: str, changes: dict[str, str], reason: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe(kind)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    model = built(parsed(text))
    model.changed |= {"llm", "tower"}
    model.save_pretrained(tmp_path / "saved")
    for path in tmp_path.glob("saved/**/*.safetensors"):
        path.unlink()  # no weights are needed to tell
    with pytest.raises(
        ModelError, match=f"can't be exported as GGUF: .*{reason}.*llama.cpp holds a decoder"
    ):
        export(tmp_path / "saved", tmp_path / "gguf", format="gguf")
    assert not (tmp_path / "gguf").exists()


def test_fault_58_a_soft_prompt_has_no_place(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    (run / "model" / "prompt").mkdir()
    for format in ("transformers", "gguf"):
        with pytest.raises(ModelError, match="has a soft prompt"):
            export(run, tmp_path / "out", format=format)


def test_fault_59_too_little_disk_for_a_gguf_is_said_before_starting(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    config = read_config(run / "model")
    parameters = count_parameters(text_config(run / "model", config), config)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        source.shutil, "disk_usage", lambda path: usage._replace(free=parameters * 2)
    )
    with pytest.raises(ModelError, match=r"of disk, .* nothing was started"):
        export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert export(run, tmp_path / "gguf", format="gguf", dtype="q8_0", verify=False).dtype == "q8_0"
