"""GGUF files give, read by others' code, the tokens, logits and text of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from tests.helpers.export_samples import llava_text, photos, saved_model, tower_text
from tests.helpers.tiny_models import cli, parsed, rows_of, save_llm, with_llm, with_tower
from vlm_tune.exporting import export
from vlm_tune.exporting.gguf.language import decoder_reasons
from vlm_tune.exporting.gguf.tokenizer import (
    ASCII_CASES,
    MARKER,
    SPLITS,
    TEKKEN,
    _steps,
    read_tokenizer,
    split_notes,
)
from vlm_tune.exporting.gguf.writer import read_fields, read_tensors
from vlm_tune.model.checkpoint import load_model

LLAMA3 = (
    "rope_parameters: {rope_type: llama3, rope_theta: 500000.0, factor: 8.0, "
    "low_freq_factor: 1.0, high_freq_factor: 4.0, "
    "original_max_position_embeddings: 32}"
)
DECODERS = {
    "llama": ("llama", "head_dim: 24"),
    "tied llama 3": ("llama", f"tie_word_embeddings: true, {LLAMA3}"),
    "mistral": ("mistral", "sliding_window: 128"),
    "qwen2": ("qwen2", "tie_word_embeddings: true"),
    "qwen3": ("qwen3", "head_dim: 24"),
    "gemma 3": (
        "gemma3_text",
        "head_dim: 24, query_pre_attn_scalar: 24, sliding_window: 24, tie_word_embeddings: true",
    ),
}


def decoder_text(make: Callable[..., str], decoder: str) -> str:
    kind, extra = DECODERS[decoder]
    text = (
        llava_text(make)
        .replace("model_type: llama", f"model_type: {kind}")
        .replace("hidden_size: 32,", f"hidden_size: 32, {extra},")
    )
    # Every sixth of its layers has no window.
    return (
        text.replace("num_hidden_layers: 2", "num_hidden_layers: 7")
        if decoder == "gemma 3"
        else text
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_the_same_logits(
    decoder: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    photos(tmp_path)
    run, _ = saved_model(decoder_text(tiny_recipe, decoder), tmp_path / "saved")
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-5 and report.same_text
    assert {path.name for path in (tmp_path / "gguf").glob("*.gguf")} == {
        "model-f32.gguf",
        "mmproj-f32.gguf",
    }
    fields = read_fields(tmp_path / "gguf" / "model-f32.gguf")
    name = fields["general.architecture"]
    assert name == {"tied llama 3": "llama", "mistral": "llama", "gemma 3": "gemma3"}.get(
        decoder, decoder
    )
    # What is read back here is what transformers' reader leaves out, or takes from its own
    # defaults.
    assert fields[f"{name}.context_length"] == (128 if decoder == "mistral" else 256)
    names = {tensor.name for tensor in GGUFReader(tmp_path / "gguf" / "model-f32.gguf").tensors}
    assert ("output.weight" in names) == ("tie" not in DECODERS[decoder][1])
    assert ("rope_freqs.weight" in names) == (decoder == "tied llama 3")


@pytest.mark.parametrize("tower", ["open_clip", "clip", "clip larger images", "siglip"])
def test_every_tower_gives_the_same_logits(
    tower: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = with_tower(llava_text(tiny_recipe), tower_text(tmp_path, tower))
    photos(tmp_path)
    run, _ = saved_model(text, tmp_path / "saved")
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-5 and report.same_text
    fields = read_fields(tmp_path / "gguf" / "mmproj-f32.gguf")
    # The keys without which llama.cpp's clip.cpp does not load a file, or computes something else.
    assert (
        fields["general.architecture"] == "clip"
        and fields["clip.projector_type"] == "mlp"
        and fields["clip.has_vision_encoder"]
    )
    assert fields["clip.vision.feature_layer"] == [fields["clip.vision.block_count"]]
    assert fields["clip.vision.image_size"] == {"clip larger images": 64}.get(tower, 32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "q8_0"])
def test_adapters_are_merged_and_tensors_stored_in_the_type_asked_for(
    dtype: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """With the connector's LayerNorm, which mmproj has a place for."""
    text = llava_text(tiny_recipe, "{kind: mlp, norm: true}")
    run, _ = saved_model(text, tmp_path / "saved", lora=True, sharpen=1.0)
    report = export(run, tmp_path / "gguf", format="gguf", dtype=dtype)
    assert report.merged == ["llm"] and report.difference is not None
    assert 1e-5 < report.difference < 0.1 if dtype == "q8_0" else report.difference <= 1e-5
    kind = {"bf16": "bf16", "fp16": "f16", "q8_0": "q8_0"}[dtype]
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in GGUFReader(tmp_path / "gguf" / f"model-{kind}.gguf").tensors
    }
    assert kinds["blk.0.attn_q.weight"] == kind.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == kind.upper()
    mmproj = next((tmp_path / "gguf").glob("mmproj-*.gguf"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(mmproj).tensors}
    assert kinds["v.position_embd.weight"] == kinds["v.post_ln.weight"] == "F32"
    assert kinds["mm.0.weight"] == {"fp16": "F16"}.get(dtype, "BF16")


def test_queries_and_keys_are_in_llama_cpp_order(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Rows i and i + d/2 of a head become neighbours, as its rotary embedding turns them."""
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    export(run, tmp_path / "gguf", format="gguf", dtype="fp32", verify=False)
    llm: Any = load_model(run, dtype=torch.float32).llm.model
    tensors = read_tensors(tmp_path / "gguf" / "model-f32.gguf")
    query, key = (
        getattr(llm.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj")
    )
    for rows, stored in (
        (query, tensors["blk.0.attn_q.weight"]),
        (key, tensors["blk.0.attn_k.weight"]),
    ):
        for head in range(len(rows) // 16):
            order = [16 * head + half * 8 + i for i in range(8) for half in (0, 1)]
            assert torch.equal(stored[16 * head : 16 * head + 16], rows[order])


def test_the_files_tokenizer_is_the_models(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    """Ids of texts no probe has; rows of the embedding that no token has are marked unused.

    Ends stop llama.cpp.
    """
    text = llava_text(tiny_recipe)
    llm = save_llm(tmp_path / "base", "causal", rows_of(parsed(text)), vocab_size=512)
    run, _ = saved_model(with_llm(text, llm, "causal"), tmp_path / "saved")
    output = cli(
        "export",
        str(run),
        "--format",
        "gguf",
        "--output",
        str(tmp_path / "gguf"),
        "--dtype",
        "fp32",
    )
    assert "gguf of" in output and "passed  logits within" in output
    assert "note: llama.cpp versions with its issue 25814" in output
    assert (
        "note: llama.cpp pads images to squares, this model was trained with resize: crop" in output
    )
    fields = read_fields(tmp_path / "gguf" / "model-f32.gguf")
    chat_processor = load_model(run).processor
    tokenizer = read_tokenizer(fields)
    for words in (
        "What's in it?  12345 äöü\n\n\tend",
        "<|im_start|>user\nhi<|im_end|>\n",
        "日本 \u200d 🙂",
    ):
        assert tokenizer.encode(words, add_special_tokens=False) == chat_processor.tokenizer.encode(
            words, add_special_tokens=False
        )
    assert (
        len(fields["tokenizer.ggml.tokens"]) == 512 and fields["tokenizer.ggml.token_type"][-1] == 5
    )
    assert fields["tokenizer.ggml.token_type"][chat_processor.encoder.control("<|im_end|>")] == 3
    assert (
        fields["tokenizer.ggml.eos_token_id"] == chat_processor.stop_ids[0]
        and fields["tokenizer.ggml.eot_token_id"] == chat_processor.stop_ids[1]
    )
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and not fields["tokenizer.ggml.add_bos_token"]
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{MARKER}what?"}], tokenize=False, add_generation_prompt=True
    )
    assert shown.endswith(f"<|im_start|>user\n{MARKER}what?<|im_end|>\n<|im_start|>assistant\n")
    report = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert report["same_text"] and any("tanh" in note for note in report["notes"])
    assert "mmproj-f32.gguf" in (tmp_path / "gguf" / "README.md").read_text()


def test_a_gemma_3_that_llama_cpp_takes_for_another_is_refused() -> None:
    from transformers import Gemma3TextConfig

    shape: dict[str, Any] = {"num_hidden_layers": 12, "head_dim": 24, "query_pre_attn_scalar": 24}
    assert decoder_reasons(Gemma3TextConfig(**shape)) == []
    others: dict[str, dict[str, Any]] = {
        "query_pre_attn_scalar 24": {"query_pre_attn_scalar": 32},
        "every sixth layer with full attention": {"layer_types": ["full_attention"] * 12},
        "no attention to what follows": {"use_bidirectional_attention": True},
        "no soft caps": {"final_logit_softcapping": 30.0},
        "a rotary embedding that is scaled linearly or not at all": {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
        "the rotary base 10000 in its windows": {"rope_local_base_freq": 20_000.0},
    }
    for reason, changed in others.items():
        assert decoder_reasons(Gemma3TextConfig(**{**shape, **changed})) == [
            f"its language model is not a Gemma 3 with {reason}"
        ]


def test_splits_are_recognised_by_what_they_do() -> None:
    from tokenizers import Regex, pre_tokenizers

    byte_level, split = pre_tokenizers.ByteLevel, pre_tokenizers.Split
    llama3 = SPLITS["llama-bpe"][0][0][1]

    def steps(part: Any) -> Any:
        return _steps(json.loads(part.__getstate__()))

    whole = pre_tokenizers.Sequence(
        [split(Regex(llama3), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
    )
    assert steps(whole) == SPLITS["llama-bpe"][0]
    assert steps(byte_level(add_prefix_space=False)) == SPLITS["gpt-2"][0]
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
    )
    assert steps(digits) == SPLITS["smollm"][0]
    assert steps(byte_level(add_prefix_space=True)) is None
    assert (
        steps(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Whitespace(), byte_level(add_prefix_space=False)]
            )
        )
        is None
    )


def test_tekkens_split_is_that_of_llama_cpp_but_for_cases_and_accents_beyond_ascii() -> None:
    from tokenizers import Regex, pre_tokenizers

    def pieces(pattern: str, text: str) -> list[str]:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        return [piece for piece, _ in split.pre_tokenize_str(text)]

    for text in (
        "What's inTheImage?  A1b2\n\n\tend",
        "naïve café, ÄÖÜ",
        "日本 🙂 ../x\r\n",
        "HTTPServer",
    ):
        assert pieces(TEKKEN, text) == pieces(ASCII_CASES, text)
    for text in ("éÉcole", "e\u0301a"):
        assert pieces(TEKKEN, text) != pieces(ASCII_CASES, text)
    described = {
        "pre_tokenizer": json.loads(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(TEKKEN), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ).__getstate__()
        ),
        "model": {"type": "BPE", "ignore_merges": True},
    }
    (note,) = split_notes(described)
    assert "a capital that is not A to Z" in note
