"""GGUF files of language models whose tokenizer is SentencePiece's.

Llama 2, Vicuna, Mistral, Gemma's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tests.helpers.export_samples import llava_text, saved_model
from tests.helpers.tiny_models import LLAMA, with_llm
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export
from vlm_tune.exporting.gguf.sentencepiece import described_of, merge_scores, opening_of
from vlm_tune.exporting.gguf.tokenizer import MARKER, read_tokenizer
from vlm_tune.exporting.gguf.writer import read_fields
from vlm_tune.model.checkpoint import find_model, load_model
from vlm_tune.model.pretrained.tokenizer import load_tokenizer

SENTENCES = (
    "USER: What color is it? ASSISTANT: red",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "Is it blue, green, or yellow?  No, it isn't: it's red.",
    "for place in range(10):    print(place,        end='')",
    "Wie heißt die Straße? Größer als 12.345 Äpfel, für 3,50 €.",
    "日本語のテスト と 日本語の文章",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen",
)
TEXTS = (
    *SENTENCES,
    "tab\tand\nnew lines\n\n\nend\r\n",
    "a  b   c    d     e      f       g        h                 i",
    "äöü ß – … „quoted“ ﬁ ½ ²",
    "日本 中文 한국어 🙂👩‍👩‍👧 \u200d\ufeff",
    "\x00\x01\x7f <0x41>",
    "</ s> < s> not a token",
    "1234567890 3.14159",
    "trailing   ",
    "\n",
    "x",
)
OPENINGS = {"llama": "string", "llama legacy": "section", "mistral": "section", "gemma": "nothing"}
"""Where a space is put by a Vicuna's tokenizer, a Llama's of old, a Mistral's and a Gemma's."""


def train_pieces(folder: Path, **options: Any) -> Path:
    """A folder's tokenizer.model, trained on the sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentences.txt").write_text("\n".join(SENTENCES * 3))
    trained = {
        "model_type": "bpe",
        "vocab_size": 460,
        "byte_fallback": True,
        "split_digits": True,
        "minloglevel": 2,
        "num_threads": 1,
    }
    spaces = {
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    SentencePieceTrainer.Train(
        input=str(folder / "sentences.txt"),
        model_prefix=str(folder / "tokenizer"),
        **trained | spaces | options,
    )
    return folder / "tokenizer.model"


def save_base(folder: Path, kind: str) -> Path:
    """A tiny Llama, Mistral or Gemma 3 with a tokenizer of that kind.

    Llama's as a tokenizer.model alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    gemma = {
        "add_dummy_prefix": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
    }
    gemma |= {"user_defined_symbols": ["<start_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁"]}
    train_pieces(folder, **gemma if kind == "gemma" else {})
    tokenizer_config: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    tokenizer_config |= (
        {"tokenizer_class": "GemmaTokenizer"}
        if kind == "gemma"
        else {"tokenizer_class": "LlamaTokenizer", "legacy": kind != "llama"}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if kind in ("mistral", "gemma"):
        described = described_of(AutoTokenizer.from_pretrained(folder))
        if kind == "mistral":
            steps = [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]
            described |= {
                "normalizer": {"type": "Sequence", "normalizers": steps},
                "pre_tokenizer": None,
            }
        (folder / "tokenizer.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    config: dict[str, Any] = {
        **LLAMA,
        "vocab_size": 480,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "gemma":
        config |= {
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
        }
    types = {"mistral": "mistral", "gemma": "gemma3_text"}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(types.get(kind, "llama"), **config)
    ).save_pretrained(folder)
    return folder


def vicuna_text(make: Callable[..., str], base: Path) -> str:
    return (
        with_llm(llava_text(make), base, "causal")
        .replace("template: chatml", "template: vicuna")
        .replace("max_length: 128", "max_length: 256")
    )


@pytest.mark.parametrize("kind", OPENINGS)
def test_pieces_give_the_models_tokens_logits_and_text(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", kind)
    run, _ = saved_model(vicuna_text(tiny_recipe, base), tmp_path / "saved")
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-5 and report.same_text
    assert any("also before a text that begins with one" in note for note in report.notes) == (
        kind == "llama legacy"
    )
    fields, chat_processor = (
        read_fields(tmp_path / "gguf" / "model-f32.gguf"),
        load_model(run).processor,
    )
    assert opening_of(described_of(chat_processor.tokenizer)) == OPENINGS[kind]
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.add_space_prefix"] == (OPENINGS[kind] == "section")
    tokenizer = read_tokenizer(fields)
    for text in TEXTS:
        # After the control token that every conversation begins with.
        assert tokenizer.encode(text) == chat_processor.encoder.text(text, "control"), text
    begun = tokenizer.encode(
        f"{chat_processor.tokenizer.bos_token}red{chat_processor.tokenizer.eos_token}"
    )
    assert (
        begun[0] == chat_processor.tokenizer.bos_token_id
        and begun[-1] == chat_processor.tokenizer.eos_token_id
    )
    messages = [{"role": "user", "content": f"{MARKER}\nwhat?"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown.startswith(f"{chat_processor.tokenizer.bos_token}A chat") and shown.endswith(
        f"USER: {MARKER}\nwhat? ASSISTANT:"
    )


@pytest.mark.parametrize("kind", OPENINGS)
def test_scores_and_types_are_those_of_the_sentencepiece_model(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", kind)
    run, _ = saved_model(vicuna_text(tiny_recipe, base), tmp_path / "saved")
    export(run, tmp_path / "gguf", format="gguf", dtype="fp32", verify=False)
    fields = read_fields(tmp_path / "gguf" / "model-f32.gguf")
    pieces: Any = SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    tokens, types, scores = (
        fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores")
    )
    count = pieces.get_piece_size()
    assert len(tokens) == len(types) == len(scores) == 480
    assert tokens[:count] == [pieces.id_to_piece(number) for number in range(count)]
    defined = 5 if kind == "gemma" else 0
    for number in range(count):
        kinds = {2: pieces.is_unknown, 3: pieces.is_control, 6: pieces.is_byte}
        expected = next(
            (kind for kind, holds in kinds.items() if holds(number)),
            4 if 4 <= number < 4 + defined else 1,
        )
        assert types[number] == expected, tokens[number]
    assert set(types[count + (kind == "gemma") :]) == {5}
    # What merges make has SentencePiece's own scores, and the order of those that merge first.
    merged = [number for number in range(count) if types[number] == 1 and len(tokens[number]) > 1]
    assert len(merged) > 80
    if kind != "gemma":
        assert [scores[number] for number in merged] == [
            pieces.get_score(number) for number in merged
        ]
        plain = read_tokenizer({**fields, "tokenizer.ggml.add_space_prefix": True})
        for text in TEXTS:
            assert plain.encode(text) == pieces.encode(text), text
    assert sorted(merged, key=lambda number: -scores[number]) == merged


def test_a_saved_tokenizer_is_the_one_of_training(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """transformers' Llama class makes another one of it, without the `legacy` of Mistral's."""
    base = save_base(tmp_path / "base", "llama legacy")
    run, recipe = saved_model(vicuna_text(tiny_recipe, base), tmp_path / "saved")
    trained, saved = (
        load_tokenizer(recipe.model.llm),
        load_tokenizer(recipe.model.llm, find_model(run)),
    )
    assert described_of(saved)["pre_tokenizer"]["prepend_scheme"] == "always"
    assert described_of(saved) == described_of(trained)
    assert saved("<s>red</s>blue").input_ids == trained("<s>red</s>blue").input_ids
    assert saved.special_tokens_map == trained.special_tokens_map


def test_what_llama_cpp_would_split_otherwise_is_refused_first(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Texts that begin without a control token, Unigram, and merges that scores would not make."""
    base = save_base(tmp_path / "base", "llama")
    (tmp_path / "plain.yaml").write_text(
        'name: plain\nlayouts: [causal]\nuser: [{text: "Q: "}, {content: prompt}]\n'
        'assistant: [{text: " A:"}, {content: trained}, {control: eos, trained: true}]\n'
    )
    text = vicuna_text(tiny_recipe, base).replace(
        "template: vicuna", f"template: {tmp_path / 'plain.yaml'}"
    )
    run, _ = saved_model(text, tmp_path / "opens with text")
    with pytest.raises(
        ModelError,
        match=r"a space before a string's first text alone, and its chat format begins with text",
    ):
        export(run, tmp_path / "no", format="gguf")

    run, _ = saved_model(vicuna_text(tiny_recipe, base), tmp_path / "merges")
    path = find_model(run) / "tokenizer.json"
    described = json.loads(path.read_text())
    merges = described["model"]["merges"]
    assert merge_scores(described) is not None
    for changed in (
        merges[:20] + merges[21:],
        [merges[40], *merges[:40], *merges[41:], merges[39]],
    ):
        assert (
            merge_scores({**described, "model": {**described["model"], "merges": changed}}) is None
        )
    described["model"]["merges"] = merges[:20] + merges[21:]
    path.write_text(json.dumps(described))
    with pytest.raises(ModelError, match="merges are not those that scores of pieces would make"):
        export(run, tmp_path / "no", format="gguf")

    described["model"]["byte_fallback"] = False
    path.write_text(json.dumps(described))
    with pytest.raises(
        ModelError,
        match=r"\(BPE\) is neither SentencePiece's BPE with bytes nor the byte-level BPE",
    ):
        export(run, tmp_path / "no", format="gguf")
    assert not (tmp_path / "no").exists()
