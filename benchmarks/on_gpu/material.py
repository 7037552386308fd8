"""Models of random weights in real shapes, and questions; written once and loaded by both sides.

SHAPE/llava/   LlavaForConditionalGeneration with its processor: tower, projector and decoder
t5-xl/tower/   a CLIP tower; t5-xl/t5/ a T5 with its tokenizer
SHAPE/         images/, single.jsonl (a row a question), multi.jsonl (a row an image)
SHAPE/test/    the same of other images, to be answered
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.material import TEMPLATE, write_rows

EACH = 10
"""Questions an image."""

RANK = 16
"""Of LoRA, on every linear layer of the language model."""

VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
DECODERS: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
"""Vicuna's shape, and that of Llama-3.2-1B."""

T5_XL = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 32,
    "vocab_size": 32128,
}
TINY_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TINY_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
TINY_T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "vocab_size": 512,
}
VOCABULARY = 400
"""Most tokens of the tokenizers, which know little more than the questions."""


@dataclass(frozen=True)
class Shape:
    """A model's configs, by the keys of transformers; `text` is of a T5 if `seq2seq`."""

    name: str
    vision: dict[str, Any]
    text: dict[str, Any]
    seq2seq: bool

    @property
    def blocks(self) -> int:
        """The tower's blocks that are run: LLaVA takes the output of the last but one."""
        return self.vision["num_hidden_layers"] - (0 if self.seq2seq else 1)

    @property
    def image_tokens(self) -> int:
        """Tokens an image takes."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    def configs(self) -> tuple[Any, Any]:
        """transformers' configs of the language model and of the tower."""
        from transformers import CLIPVisionConfig, LlamaConfig, T5Config

        vision = CLIPVisionConfig(**self.vision)
        if self.seq2seq:
            fixed = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
            return T5Config(**self.text, **fixed, tie_word_embeddings=False), vision
        return LlamaConfig(**self.text, max_position_embeddings=4096), vision


def shape(name: str, *, tiny: bool) -> Shape:
    """The shape of a name: 7b, 1b or t5-xl; tiny ones for a CPU."""
    seq2seq = name == "t5-xl"
    if tiny and not seq2seq:
        tied = DECODERS[name].get("tie_word_embeddings", False)
        return Shape(name, TINY_VIT, {**TINY_DECODER, "tie_word_embeddings": tied}, seq2seq)
    if tiny:
        return Shape(name, TINY_VIT, TINY_T5, seq2seq)
    return Shape(name, VIT_L_336, T5_XL if seq2seq else DECODERS[name], seq2seq)


def material(folder: Path, name: str, *, tiny: bool) -> Path:
    """The folder of a shape's model and questions, written if it is not there."""
    home = folder / name
    done = home / "written"
    if done.is_file():
        return home
    if home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True)
    images = 8 if tiny else 640
    write_rows(home, images, each=EACH)
    write_rows(home / "test", 2 if tiny else 50, "test", each=EACH)
    kind = shape(name, tiny=tiny)
    if kind.seq2seq:
        _write_t5(home, kind)
    else:
        _write_llava(home, kind)
    done.touch()
    return home


def tokenizer_of(rows: Path, template: str) -> Any:
    """A byte-level tokenizer trained on rows, with the template's control tokens."""
    from vlm_tune.config.data import DataSection
    from vlm_tune.data.chat.template import load_template
    from vlm_tune.data.prepare.run import conversations
    from vlm_tune.model.pretrained.tokenizer import train_tokenizer

    data = DataSection.model_validate(
        {"template": template, "train": [{"kind": "file", "path": str(rows)}]}
    )
    return train_tokenizer(conversations(data, data.train, 0), VOCABULARY, load_template(template))


def random_model(build: Any) -> Any:
    """A model of random bf16 weights, drawn on the device: on a CPU 7B would take minutes."""
    import torch

    from benchmarks.on_gpu.measuring import device_type

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device_type()):
            return build()
    finally:
        torch.set_default_dtype(before)


def _write_llava(home: Path, kind: Shape) -> None:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tokenizer_of(home / "single.jsonl", "chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text, vision = kind.configs()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, getattr(tokenizer, name))
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=kind.image_tokens,
        tie_word_embeddings=kind.text.get("tie_word_embeddings", False),
    )
    model = random_model(lambda: LlavaForConditionalGeneration(config))
    model.save_pretrained(home / "llava")
    side = kind.vision["image_size"]
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=kind.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(home / "llava")


def _write_t5(home: Path, kind: Shape) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModel, T5ForConditionalGeneration

    tokenizer = tokenizer_of(home / "single.jsonl", "flan")
    text, vision = kind.configs()
    text.pad_token_id = text.decoder_start_token_id = tokenizer.pad_token_id
    text.eos_token_id = tokenizer.eos_token_id
    random_model(lambda: CLIPVisionModel(vision)).save_pretrained(home / "tower")
    random_model(lambda: T5ForConditionalGeneration(text)).save_pretrained(home / "t5")
    tokenizer.save_pretrained(home / "t5")
    side = kind.vision["image_size"]
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(home / "llava")
