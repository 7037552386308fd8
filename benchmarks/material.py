"""Data and models for all trainers of a comparison.

The questions are written in two row forms, the models have the same shapes:

images/ and single.jsonl (one row per question), multi.jsonl (one row per image, questions as turns)
tower/   a CLIP vision tower with random weights, ViT-B/32 (49 tokens) or ViT-B/16 (196)
llava/   LlavaForConditionalGeneration of that tower and a real decoder, with its processor
smolvlm/ a model of SmolVLM-256M's shape of a random tower and connector and a real decoder, with
         its processor
t5/      a T5 of flan-t5-base's configuration with random weights, and a tokenizer trained on the
         questions
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_tune.data.sources.easy_vqa import KINDS, answer_type

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{% if message.content is string %}\
{{ message.content }}{% else %}\
{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\
{% endgeneration %}{% else %}\
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}\
{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\
<|im_end|>{% endif %}{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with the image before the first question; assistant turns are marked for TRL.

It ends with the last turn, since TRL trains on all that follows a prompt, a line break too.
"""

PATCH = {49: 32, 196: 16}
"""Patch size by the number of image tokens of a 224x224 image."""


def write_rows(
    folder: Path, count: int | None, part: str = "train", *, each: int | None = None
) -> list[str]:
    """Writes the questions about the first images of a part of easy-VQA in both row forms.

    With `each`, only images with so many questions are taken, and the first ones of each. Returns
    all answers, sorted.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install easy-vqa")
    source = Path(spec.origin).parent / "data" / part
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((source / "questions.json").read_text()):
        questions.setdefault(image, []).append((question, answer))
    if each is not None:
        questions = {image: some[:each] for image, some in questions.items() if len(some) >= each}
    chosen = sorted(questions)[:count]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    single = []
    multi = []
    for image in chosen:
        name = f"images/{image}.png"
        shutil.copy(source / name, folder / name)
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in questions[image]
        ]
        single += [{"messages": turn, "images": [name]} for turn in turns]
        multi.append(
            {"messages": [message for turn in turns for message in turn], "images": [name]}
        )
    for form, rows in (("single", single), ("multi", multi)):
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted(answer for image in chosen for _, answer in questions[image])


def write_preferences(folder: Path, count: int, each: int) -> None:
    """Writes preferences.jsonl: pairs of answers to questions about easy-VQA images.

    Takes the first `count` images with `each` questions. A rejected answer is another one of the
    right one's kind, drawn by the row. Rows are in TRL's conversational form.
    """
    write_rows(folder, count, each=each)
    draw = random.Random(0)
    rows = []
    for line in (folder / "single.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, answer = row["messages"]
        others = [
            each for each in KINDS[answer_type(answer["content"])] if each != answer["content"]
        ]
        rejected = {**answer, "content": draw.choice(others)}
        rows.append(
            {
                "prompt": [question],
                "chosen": [answer],
                "rejected": [rejected],
                "images": row["images"],
            }
        )
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_models(folder: Path, decoder: Path, image_tokens: int) -> None:
    """Writes the models that do not exist yet."""
    write_llava(folder, decoder, image_tokens)
    if not (folder / "t5" / "config.json").is_file():
        _write_t5(folder)


def write_llava(folder: Path, decoder: Path, image_tokens: int) -> Path:
    """Writes tower/ and llava/ if they do not exist yet, and returns the latter."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    if not (folder / "tower" / "config.json").is_file():
        CLIPVisionModel(
            CLIPVisionConfig(patch_size=PATCH[image_tokens], image_size=224)
        ).save_pretrained(folder / "tower")
    if not (folder / "llava" / "processor_config.json").is_file():
        _write_llava(folder, decoder)
    return folder / "llava"


def _write_llava(folder: Path, decoder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    language: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16)
    language.resize_token_embeddings(len(tokenizer))
    tower = CLIPVisionModel.from_pretrained(folder / "tower", dtype=torch.bfloat16)
    place = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_id=place,
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.save_pretrained(folder / "llava")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder / "llava")


SHUFFLE = 4
"""The side of the square of patches that SmolVLM's connector makes a token of."""

SMOLVLM_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
"""SmolVLM-256M's vision tower, a SigLIP-B/16."""


def write_smolvlm(folder: Path, decoder: Path, tower: Mapping[str, Any] = SMOLVLM_TOWER) -> Path:
    """Writes smolvlm/ if it does not exist yet, and returns it.

    As the published model it is an Idefics3 in transformers' classes, whose connector makes one
    token of 4 x 4 patches. Its processor makes one frame of an image, of the tower's size.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )
    from transformers.utils import logging

    home = folder / "smolvlm"
    if (home / "processor_config.json").is_file():
        return home
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    # The last one is added by the processor.
    markers = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    language: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16)
    language.resize_token_embeddings(len(tokenizer))
    config = Idefics3Config(
        vision_config=dict(tower),
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
    )
    model: Any = Idefics3ForConditionalGeneration(config).to(torch.bfloat16)
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.save_pretrained(home)
    side = tower["image_size"]
    Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": side}, max_image_size={"longest_edge": side}),
        tokenizer,
        image_seq_len=(side // tower["patch_size"] // SHUFFLE) ** 2,
        chat_template=TEMPLATE,
    ).save_pretrained(home)
    return home


def _write_t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    from vlm_tune.config.data import DataSection
    from vlm_tune.data.chat.template import load_template
    from vlm_tune.data.prepare.run import conversations
    from vlm_tune.model.pretrained.tokenizer import train_tokenizer

    data = DataSection.model_validate(
        {"template": "flan", "train": [{"kind": "file", "path": str(folder / "single.jsonl")}]}
    )
    tokenizer = train_tokenizer(conversations(data, data.train, 0), 2000, load_template("flan"))
    shape = {
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "feed_forward_proj": "gated-gelu",
    }
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    config = T5Config(**shape, **ids, vocab_size=32128, tie_word_embeddings=False, dropout_rate=0.0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
