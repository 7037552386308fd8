"""Tiny vision-language models as transformers and the LLaVA repository write them.

Also recipes that start from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_samples import TEXTS, turns
from tests.helpers.tiny_models import CLIP, LLAMA, T5, batch_of
from vlm_tune.data.batch import Batch
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.types import Conversation, Example
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.pretrained.tokenizer import train_tokenizer

CHAT_TEMPLATES = {
    name: start + "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    for name, start in (("idefics3", "<|begin_of_text|>"), ("smolvlm", "<|im_start|>"))
}
"""The chat templates of HuggingFaceM4/Idefics3-8B-Llama3 and HuggingFaceTB/SmolVLM-Instruct.

As TRL 1.16 holds them in `trl/chat_templates` (Apache 2.0).
"""

QUERIES = 4
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "encoder_hidden_size": 32,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION = CLIP | {"num_hidden_layers": 2}
Blip = Literal["blip-2", "instructblip"]


def stir(module: nn.Module) -> Any:
    """The module in eval mode with every parameter moved, norms and biases too.

    A swapped or forgotten one shows.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def with_pretrained(recipe: str, name: Path | str, template: str, extra: str = "") -> str:
    """A tiny recipe's text that starts from an existing model."""
    head, _, rest = recipe.partition("\nmodel:")
    rest = rest[rest.index("\ndata:") :]
    for original in ("flan", "chatml"):
        rest = rest.replace(f"template: {original}\n", f"template: {template}\n")
    return f"{head}\nmodel: {{pretrained: {name}{extra}}}{rest}"


def text_tokenizer(rows: Sequence[Conversation], template: str, around: str) -> Any:
    """A tokenizer of the rows' words that puts tokens `around` a text, as Llama's and T5's do."""
    tokenizer = train_tokenizer(rows, 400, load_template(template))
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=ids
    )
    return tokenizer


@cache
def marked_tokenizer(name: str, *, rows_and_columns: bool, around: bool = True) -> Any:
    """A tokenizer with the special tokens of a chat format and of Idefics3's images.

    SmolVLM's has tokens for rows and columns, Idefics3's has none. Without `around` it lacks the
    token that stands around images.
    """
    template = load_template(name)
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    tokenizer = train_tokenizer(rows, 420, template)
    (start,) = [piece.control for piece in template.start]
    tokenizer.add_special_tokens({"bos_token": start, "eos_token": "<end_of_utterance>"})
    names = ["<image>", *(["<fake_token_around_image>"] if around else [])]
    if rows_and_columns:
        places = range(1, 7)
        names += ["<global-img>", *(f"<row_{r}_col_{c}>" for r in places for c in places)]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer


def bert_tokenizer(rows: Sequence[Conversation]) -> Any:
    """An uncased WordPiece tokenizer with BERT's start and end tokens."""
    specials = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    texts = [
        part
        for row in rows
        for message in row.messages
        for part in message.parts
        if isinstance(part, str)
    ]
    inner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=list(specials.values()), show_progress=False
        ),
    )
    ends = [(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, **specials)


def save_llava(
    folder: Path, rows: Sequence[Conversation], *, pad: bool = False, **changes: Any
) -> Any:
    """A tiny `LlavaForConditionalGeneration` with its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessor,
        LlavaProcessor,
    )

    tokenizer = text_tokenizer(rows, "vicuna", "<s> $A")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(2)
    text = LlamaConfig(**{**LLAMA, **ids, "vocab_size": len(tokenizer) + 3})
    theirs = stir(
        LlavaForConditionalGeneration(
            LlavaConfig(
                **{
                    "vision_config": CLIPVisionConfig(**CLIP),
                    "text_config": text,
                    "image_token_id": image,
                    **changes,
                }
            )
        )
    )
    theirs.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    images: Any = (
        LlavaImageProcessor(size=square, crop_size=square, do_pad=True)
        if pad
        else CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    )
    tokens: dict[str, Any] = {
        "patch_size": 16,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    LlavaProcessor(images, tokenizer, image_token="<image>", **tokens).save_pretrained(folder)
    return theirs


def save_llava_original(
    folder: Path, theirs: Any, source: Path, *, tower: bool, **changes: Any
) -> Path:
    """A tiny LLaVA, as `save_llava` made it, in the LLaVA repository's format.

    Also its CLIP, from which `mm_vision_tower` comes.
    """
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    vision = theirs.model.vision_tower.state_dict()
    if not tower:
        clip.load_state_dict(vision)
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder / "clip")
    names = {"linear_1": "0", "linear_2": "2"}
    projector = theirs.model.multi_modal_projector.state_dict().items()
    tensors = {
        f"model.{key}": value for key, value in theirs.model.language_model.state_dict().items()
    }
    tensors |= {f"model.mm_projector.{names[key[:8]]}{key[8:]}": value for key, value in projector}
    tensors |= {"lm_head.weight": theirs.lm_head.weight.data}
    if tower:
        tensors |= {
            f"model.vision_tower.vision_tower.vision_model.{key}": value
            for key, value in vision.items()
        }
        tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = (
            torch.arange(5)[None]
        )
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    llava = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(folder / "clip"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }
    text = theirs.config.text_config.to_dict() | {"rope_theta": 10000.0, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(text | llava | changes))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text())
    return folder


def _blip_t5(rows: Sequence[Conversation]) -> tuple[Any, dict[str, Any]]:
    """A tokenizer, and a T5's config whose head is its own."""
    tokenizer = text_tokenizer(rows, "flan", "$A </s>")
    settings = {"tie_word_embeddings": False, "dropout_rate": 0.0}
    start = {"decoder_start_token_id": tokenizer.pad_token_id}
    return tokenizer, {"model_type": "t5", **T5, **settings, **start}


def _blip_decoder(
    rows: Sequence[Conversation], language: Literal["opt", "llama"]
) -> tuple[Any, dict[str, Any]]:
    """A tokenizer whose start token is the end token, as OPT's and InstructBLIP's, and a config."""
    tokenizer = text_tokenizer(rows, "blip2_opt", "</s> $A")
    tokenizer.bos_token = "</s>"
    ids = {"bos_token_id": tokenizer.bos_token_id}
    if language == "llama":
        return tokenizer, {"model_type": "llama", **LLAMA, **ids}
    opt = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return tokenizer, {"model_type": "opt", **opt, **ids}


def save_blip(
    folder: Path,
    rows: Sequence[Conversation],
    kind: Blip,
    language: Literal["t5", "opt", "llama"] = "t5",
    **changes: Any,
) -> Any:
    """A tiny BLIP-2 or InstructBLIP with its processor, its Q-Former with the `changes`."""
    import transformers
    from transformers import AutoConfig, BlipImageProcessor

    tokenizer, text = _blip_t5(rows) if language == "t5" else _blip_decoder(rows, language)
    bert = bert_tokenizer(rows)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    name = "Blip2" if kind == "blip-2" else "InstructBlip"
    words: dict[str, Any] = {} if kind == "blip-2" else {"qformer_tokenizer": bert}
    processor = getattr(transformers, f"{name}Processor")(
        images, tokenizer, num_query_tokens=QUERIES, **words
    )
    processor.save_pretrained(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(4)
    config = getattr(transformers, f"{name}Config")(
        vision_config=getattr(transformers, f"{name}VisionConfig")(**VISION),
        qformer_config=getattr(transformers, f"{name}QFormerConfig")(
            **{**QFORMER, "vocab_size": len(bert) + 2, **changes}
        ),
        text_config=AutoConfig.for_model(**text | ids | {"vocab_size": len(tokenizer) + 3}),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    theirs: Any = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    if language != "opt":
        head = theirs.language_model.lm_head
        head.weight = nn.Parameter(torch.zeros_like(head.weight))
    stir(theirs)
    theirs.query_tokens.data *= (
        10  # a norm comes next: small queries would have gradients too large to compare
    )
    theirs.save_pretrained(folder)
    return theirs


IDEFICS3_SIDE = 32
"""Pixels of a frame's side, of 4 x 4 patches; a frame takes 4 tokens."""


def save_idefics3(
    folder: Path,
    kind: Literal["idefics3", "smolvlm"],
    *,
    tied: bool = False,
    smolvlm_tokenizer: bool = False,
) -> Any:
    """A tiny Idefics3 or SmolVLM with its processor, whose images are at most 2 x 2 tiles.

    An Idefics3 with SmolVLM's tokenizer is what the first SmolVLMs are.
    """
    import transformers

    name = "Idefics3" if kind == "idefics3" else "SmolVLM"
    words = "smolvlm" if smolvlm_tokenizer else kind
    tokenizer = marked_tokenizer(words, rows_and_columns=words == "smolvlm")
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {**VISION, "image_size": IDEFICS3_SIDE, "patch_size": 8}
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config={"model_type": "llama", **LLAMA, **ids, "vocab_size": len(tokenizer) + 3},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        scale_factor=2,
    )
    theirs = stir(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    theirs.save_pretrained(folder)
    options: Any = {
        "size": {"longest_edge": 2 * IDEFICS3_SIDE},
        "max_image_size": {"longest_edge": IDEFICS3_SIDE},
    }
    video = [transformers.SmolVLMVideoProcessor()] if kind == "smolvlm" else []
    processor = getattr(transformers, f"{name}Processor")(
        getattr(transformers, f"{name}ImageProcessor")(**options),
        tokenizer,
        *video,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATES[words],
    )
    processor.save_pretrained(folder)
    return theirs


def their_inputs(folder: Path, row: Conversation, text: str) -> Any:
    """Inputs that a model's own processor makes of a row's image and a text."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(
        folder, backend="pil"
    )  # Pillow resizes as we do
    return processor(
        images=Image.open(row.media[0].source).convert("RGB"), text=text, return_tensors="pt"
    )  # type: ignore[arg-type]


def our_pixels(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The normalised pixels that our tower sees."""
    assert batch.pixels is not None
    return batch.pixels.float() * model.tower.scale - model.tower.offset


def one_batch(model: VisionLanguageModel, row: Conversation) -> tuple[Example, Batch]:
    """A row's only example, and a batch of it."""
    (example,) = model.processor.examples(row)
    return example, batch_of(model, [example])
