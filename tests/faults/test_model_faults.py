"""FAULTS 28 to 36.

Weights and model configurations that must be refused, by name, before they do harm.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import (
    CLIP,
    LORA_TUNE,
    batch_of,
    built,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tower,
    with_tune,
)
from vlm_tune.config.model import Llm
from vlm_tune.errors import ModelError, RecipeError, VlmTuneError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.pretrained.language_model import load_llm
from vlm_tune.model.pretrained.tokenizer import load_tokenizer
from vlm_tune.model.weights import check_safetensors, read_safetensors


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.fixture
def folder(tiny_recipe: Callable[..., str], tmp_path: Path) -> Path:
    """A tiny Llama on disk."""
    return save_llm(tmp_path / "llama", "causal", rows_of(parsed(tiny_recipe("causal"))))


@pytest.fixture
def saved(tiny_recipe: Callable[..., str], tmp_path: Path) -> Path:
    """A saved model of ours with an adapter."""
    recipe = parsed(with_tune(tiny_recipe("causal"), LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path, **keys: Any) -> Any:
    return load_llm(Llm(kind="causal", name=str(folder), **keys), dtype=torch.float32)


def resealed(folder: Path) -> Path:
    """The folder with a manifest that holds for what is in it now."""
    from vlm_tune.model.committed_folders import _digest
    from vlm_tune.run_folder import MANIFEST

    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    entries = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}))
    return folder


# --- 28, 29: nothing is executed ---------------------------------------------------------------


def test_fault_28_pickled_llm_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "touched")))
    with pytest.raises(
        ModelError,
        match=r"no safetensors weights \(found pytorch_model\.bin: pickled weights are not loaded",
    ):
        load(folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_fault_28_pickled_tower_weights_are_refused(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    payload = pickle.dumps(Payload(tmp_path / "touched"))
    if kind == "open_clip":
        (tmp_path / "tower.pt").write_bytes(payload)
        tower = f"{{kind: open_clip, name: ViT-B-32, pretrained: {tmp_path / 'tower.pt'}}}"
    else:
        from transformers import CLIPVisionConfig

        CLIPVisionConfig(**CLIP).save_pretrained(tmp_path / "clip")
        (tmp_path / "clip" / "pytorch_model.bin").write_bytes(payload)
        tower = f"{{kind: transformers, name: {tmp_path / 'clip'}}}"
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        built(parsed(with_tower(tiny_recipe("causal"), tower)))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "pretrained", ["no_such_tag", "cut.safetensors", "of_another_model.safetensors"]
)
def test_fault_30_open_clip_weights_that_can_not_be_loaded(
    pretrained: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    name = pretrained
    if pretrained.endswith("safetensors"):
        name = str(tmp_path / pretrained)
        save_file({"visual.proj": torch.zeros(4)}, name)
    if pretrained.startswith("cut"):
        Path(name).write_bytes(Path(name).read_bytes()[:-4])
    with pytest.raises(ModelError, match=pretrained):
        built(
            parsed(
                with_tower(
                    tiny_recipe("causal"),
                    f"{{kind: open_clip, name: ViT-S-32-alt, pretrained: {name}}}",
                )
            )
        )


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_fault_29_remote_code_is_never_run(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    config["auto_map"]["AutoModelForSeq2SeqLM"] = "code.Model"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    load_tokenizer(Llm(kind=kind, name=str(folder)))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="can't load the language model"):
        load_llm(Llm(kind=kind, name=str(folder)), dtype=torch.float32)  # type: ignore[arg-type]
    assert not (tmp_path / "touched").exists()


# --- 30: cut and lying files -------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_fault_30_truncated_safetensors(share: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(folder)


def test_fault_30_a_file_that_is_too_long(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(ModelError, match=r"the file was truncated or changed"):
        load(folder)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9, 0, 1])
def test_fault_30_giant_header(length: int, tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 100)
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        check_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[1,2]",
        b"{not json",
        b'{"a": 3}',
        b'{"a": {"data_offsets": "x"}}',
        b"[" * 5000,
        b'"text"',
        b'{"a": {"data_offsets": [0, "9"]}}',
    ],
)
def test_fault_30_headers_that_make_no_sense(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match=r"odd\.safetensors"):
        read_safetensors(path)


def test_fault_30_missing_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / shard, metadata={"format": "pt"})
    index = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    load(folder)
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"missing shards: model-2-of-2\.safetensors"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index of shards"):
        load(folder)


@pytest.mark.parametrize("fault", ["cut", "no folder"])
def test_fault_30_tower_weights(
    fault: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    path = tmp_path / "clip" / "model.safetensors"
    if fault == "cut":
        CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="clip"):
        built(
            parsed(
                with_tower(
                    tiny_recipe("causal"), f"{{kind: transformers, name: {tmp_path / 'clip'}}}"
                )
            )
        )


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "connector.safetensors",
        "tokenizer.json",
        "config.json",
        "llm/model.safetensors",
    ],
)
def test_fault_30_any_changed_byte_of_a_saved_model(name: str, saved: Path) -> None:
    path = saved / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} is not what was written \(sha256 differs\)"):
        load_model(saved)
    path.unlink()
    with pytest.raises(ModelError, match=r"is missing or truncated|no such folder|holds no model"):
        load_model(saved)


# --- 31, 32: tensors that don't fit ------------------------------------------------------------


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_fault_31_llm_tensors_that_do_not_fit_are_listed(change: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "model.layers.7.mlp.up_proj.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_fault_31_connector_tensors_that_do_not_fit_are_listed(change: str, saved: Path) -> None:
    path = saved / "connector.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["layers.0.bias"]
    elif change == "unexpected":
        weights["layers.9.bias"] = torch.zeros(2)
    else:
        weights["layers.0.bias"] = torch.zeros(3)
    save_file(weights, path)
    messages = {
        "missing": r"missing: layers\.0\.bias",
        "unexpected": r"unexpected: layers\.9\.bias",
        "misshapen": r"layers\.0\.bias is \[3\]",
    }
    with pytest.raises(ModelError, match=messages[change]):
        load_model(resealed(saved))


def test_fault_31_a_tower_folder_that_lacks_a_tensor(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    name = next(name for name in weights if "layers.0.mlp.fc1.weight" in name)
    del weights[name]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.fc1\.weight"):
        built(
            parsed(
                with_tower(
                    tiny_recipe("causal"), f"{{kind: transformers, name: {tmp_path / 'clip'}}}"
                )
            )
        )


@pytest.mark.parametrize("change", ["renamed", "dropped", "added", "other rank"])
def test_fault_32_adapter_keys_that_apply_to_nothing(change: str, saved: Path) -> None:
    path = saved / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    stranger = name.replace("layers.0", "layers.5")
    if change in ("renamed", "added"):
        weights[stranger] = weights[name].clone()
    if change in ("renamed", "dropped"):
        del weights[name]
    if change == "other rank":
        weights[name] = weights[name][:2].clone()
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"layers\.[05]\.self_attn\.q_proj\.lora_A"):
        load_model(resealed(saved))


def test_fault_32_an_adapter_for_layers_that_are_not_there(saved: Path) -> None:
    path = saved / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = ["nothing_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the adapter fits no layer of the llm"):
        load_model(resealed(saved))


# --- 33 to 35 ----------------------------------------------------------------------------------


def test_fault_33_tokenizer_larger_than_the_embedding(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe("causal")
    folder = save_llm(tmp_path / "llama", "causal", rows_of(parsed(text)))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=rf"the tokenizer has {size + 1} tokens, the model's embedding {size}"
    ):
        built(parsed(with_llm(text, folder, "causal")))


MALICIOUS = {
    "attribute access": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "nested loops": "{% for a in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4,
    "a file": "{{ cycler.__init__.__globals__.os.system('touch TARGET') }}",
}


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", list(MALICIOUS))
def test_fault_34_a_folder_s_jinja_template_is_neither_run_nor_passed_on(
    kind: str, place: str, folder: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Rendered, the first and last would raise or write a file, and the second would not end."""
    program = MALICIOUS[kind].replace("TARGET", str(tmp_path / "touched"))
    if place == "chat_template.jinja":
        (folder / place).write_text(program)
    else:
        config = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(config | {"chat_template": program}))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).chat_template == program
    model = built(parsed(with_llm(tiny_recipe("causal"), folder, "causal")))
    assert model.processor.tokenizer.chat_template is None
    assert isinstance(model.chat("what color is it?", max_new_tokens=2), str)
    model.save_pretrained(tmp_path / "saved")
    assert not any(program in path.read_text() for path in (tmp_path / "saved").rglob("*.j*"))
    assert VisionLanguageModel.from_pretrained(tmp_path / "saved").chat(
        "what color is it?", max_new_tokens=2
    )
    assert not (tmp_path / "touched").exists()


def test_fault_35_t5_in_fp16_is_refused_in_a_recipe(tiny_recipe: Callable[..., str]) -> None:
    with pytest.raises(RecipeError, match="T5's activations overflow in fp16"):
        parsed(tiny_recipe("seq2seq", precision="fp16"))
    with pytest.raises(RecipeError, match="T5's activations overflow in fp16"):
        parsed(tiny_recipe("seq2seq") + "stages: [{name: one, train: {precision: fp16}}]\n")


def test_fault_35_t5_in_fp16_is_refused_when_it_is_loaded(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    model = built(parsed(tiny_recipe("seq2seq")))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match="fp16"):
        load_model(tmp_path / "saved", dtype=torch.float16)
    assert load_model(tmp_path / "saved", dtype=torch.bfloat16).llm.model.dtype == torch.bfloat16
    assert (
        load_model(tmp_path / "saved").llm.model.dtype == torch.float32
    )  # the run's own precision


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a packed tower", r"tower\.extra is nf4, expected not packed"),
        ("a packed connector", r"connector\.extra is nf4, expected not packed"),
        ("a packed head", r"lm_head is nf4, expected not packed"),
        ("a block left out", r"layers\.1\.mlp\.up_proj is not packed, expected nf4"),
        ("another type", r"layers\.1\.mlp\.up_proj is fp4, expected nf4"),
    ],
)
def test_fault_36_a_dtype_map_that_is_not_the_recipes_is_refused(
    fault: str, message: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from bitsandbytes.nn import Linear4bit

    from vlm_tune.model.pretrained.language_model import check_packed

    text = tiny_recipe("causal", precision="bf16")
    folder = save_llm(
        tmp_path / "wide", "causal", rows_of(parsed(text)), hidden_size=64, intermediate_size=128
    )
    model: Any = built(
        parsed(with_tune(with_llm(text, folder, "causal", ", quantize: nf4"), LORA_TUNE))
    )
    check_packed(model)
    mlp = model.llm.model.model.layers[1].mlp
    if fault == "a packed head":
        model.llm.model.lm_head = Linear4bit(64, 400, bias=False, quant_type="nf4")
    elif fault.startswith("a packed"):
        getattr(model, fault.rsplit(" ", 1)[1]).extra = Linear4bit(64, 64, quant_type="nf4")
    elif fault == "a block left out":
        mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    else:
        mlp.up_proj = Linear4bit(64, 128, bias=False, quant_type="fp4")
    with pytest.raises(ModelError, match=message):
        check_packed(model)


def test_every_model_fault_ends_with_exit_code_4() -> None:
    assert ModelError("").exit_code == 4
    assert issubclass(ModelError, VlmTuneError)


def test_an_encoder_decoder_that_names_no_start_token_is_refused(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("seq2seq"))
    model = built(recipe)
    batch = batch_of(
        model, [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    )
    model.llm.model.config.decoder_start_token_id = None
    with pytest.raises(
        ModelError, match="T5ForConditionalGeneration's config names no decoder_start_token_id"
    ):
        model(batch)
