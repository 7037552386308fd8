"""Compares the two files of an export with the model: token ids, logits and greedy text.

Shapes: L tokens of a row, S supervised ones, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from vlm_tune.compat import cache_name
from vlm_tune.data.chat.reasoning import FIELDS
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media
from vlm_tune.exporting.gguf.language import ROPE_FACTORS
from vlm_tune.exporting.gguf.mmproj_reading import Mmproj
from vlm_tune.exporting.gguf.projector import IMAGE_SLOT
from vlm_tune.exporting.gguf.projectors import projector_of
from vlm_tune.exporting.gguf.sentencepiece import described_of, pieces_notes
from vlm_tune.exporting.gguf.tokenizer import MARKER, read_tokenizer, split_notes
from vlm_tune.exporting.gguf.writer import as_stored, read_fields, read_tensors
from vlm_tune.exporting.source import EXACT, Expected, check_answers, check_ids
from vlm_tune.exporting.verify import largest_difference, observe
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters, check_loading
from vlm_tune.quoting import applying

ANSWER = 16
"""Tokens of an answer that are compared."""


@dataclass(frozen=True)
class Files:
    """The two files of an export."""

    language: Path
    mmproj: Path


@dataclass(frozen=True)
class Verified:
    """How the files' logits and greedy text compare with the model's, and where llama.cpp deviates.

    `difference` is to the model. `allowed` limits the difference to the weights as stored, which
    q8_0 rounds: there `difference` is larger than `allowed`.
    """

    difference: float
    same_text: bool
    notes: list[str]
    allowed: float


def notes_of(model: VisionLanguageNetwork) -> list[str]:
    """Where llama.cpp's handling of images and text deviates from how the model was trained."""
    tokenizer = described_of(model.processor.tokenizer)
    return [
        *projector_of(model.config).notes(model),
        *pieces_notes(tokenizer),
        *split_notes(tokenizer),
    ]


def verify_gguf(
    files: Files, model: VisionLanguageNetwork, expected: Expected, dtype: str
) -> Verified:
    """Compares the files with the model: token ids, logits, and greedy text.

    The language model is opened by transformers, the mmproj file computed as llama.cpp does, and
    the tokenizer built from the file's metadata. Raises `ModelError` if anything differs from the
    model as stored, which q8_0 rounds.
    """
    stored = expected
    if dtype == "q8_0":
        for parameter in model.llm.model.parameters():
            parameter.data = as_stored("", parameter.data, dtype).to(parameter.device)
        cast_parameters(model, torch.float32)
        logits, texts = observe(model, expected.rows)
        stored = replace(expected, logits=logits.view_as(expected.logits), texts=texts)
    theirs, fields = _opened(files.language)
    activation = projector_of(model.config).vision(model.tower)[0].hidden_act
    trained = Mmproj(files.mmproj, exact=activation)
    _check_texts(fields, trained, model, expected.rows)
    reader = Reader(theirs.to(model.device), fields, model)
    approximate = Mmproj(files.mmproj)
    file_logits = reader.logits(expected.rows, trained)
    texts = reader.texts(expected.rows, trained)
    allowed = EXACT * max(1.0, float(stored.logits.abs().max()))
    check_answers(stored, file_logits, texts, allowed)
    moved = largest_difference(reader.logits(expected.rows, approximate), file_logits)
    notes = notes_of(model) + applying(
        (
            moved,
            "llama.cpp computes GELU in its tanh form, which moves this model's logits by up to "
            f"{moved:.2g}",
        )
    )
    return Verified(
        largest_difference(file_logits, expected.logits), texts == expected.texts, notes, allowed
    )


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """The language model as transformers reads it from a GGUF file, and the file's metadata.

    Raises `ModelError` for tensors that are missing or misshapen.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = read_fields(path)
    name = path.name
    config = AutoConfig.from_pretrained(path.parent, gguf_file=name)
    architecture = fields["general.architecture"]
    # transformers reads the head width for some architectures only.
    config.head_dim = fields[f"{architecture}.attention.key_length"]
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads
            if config.num_hidden_layers == 62
            else config.head_dim
        )
        if fields.get(f"{architecture}.rope.scaling.type") == "linear":
            config.rope_parameters["full_attention"] |= {
                "rope_type": "linear",
                "factor": fields[f"{architecture}.rope.scaling.factor"],
            }
    with redirect_stderr(StringIO()):  # the progress bar can't be switched off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
        )
    theirs, info = loaded
    check_loading(info, "nothing was written: the exported weights do not fit")
    factors = read_tensors(path, only=ROPE_FACTORS).get(ROPE_FACTORS)
    if factors is not None:
        theirs.base_model.rotary_emb.inv_freq /= factors
    return theirs.eval(), fields


def _check_texts(
    fields: dict[str, Any],
    mmproj: Mmproj,
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
) -> None:
    """Raises `ModelError` if the files' tokenizer, template and frames give other token ids."""
    image_ids = mmproj.projector.image_ids
    processor = model.processor
    tokenizer = read_tokenizer(fields)
    for row in rows:
        turns = [
            {
                "role": turn.role,
                "content": [_part(part) for part in turn.parts],
                FIELDS[0]: turn.reasoning,
            }
            for turn in row.messages
        ]
        pieces = tokenizer.apply_chat_template(turns, tokenize=False).split(MARKER)
        file_ids = tokenizer.encode(pieces[0], add_special_tokens=False)
        for media, piece in zip(row.media, pieces[1:], strict=False):
            file_ids += image_ids(tokenizer, mmproj.vision, media, processor)
            file_ids += tokenizer.encode(piece, add_special_tokens=False)
        (example,) = processor.examples(row)
        places = mmproj.projector.image_places(example, processor)
        ids = torch.from_numpy(example.input_ids).long().masked_fill(places, IMAGE_SLOT).tolist()
        check_ids(row, [*ids, int(example.labels[-1])], file_ids[: len(ids) + 1])


def _part(part: str | Media) -> dict[str, str]:
    return {"type": "text", "text": part if isinstance(part, str) else MARKER}


@dataclass(frozen=True)
class Reader:
    """Runs rows through a language model that was read from a GGUF file."""

    theirs: Any
    fields: dict[str, Any]
    model: VisionLanguageNetwork

    @torch.inference_mode()
    def logits(self, rows: Sequence[Conversation], mmproj: Mmproj) -> torch.Tensor:
        """Logits [S, V] of the rows' supervised tokens."""
        logits = []
        for row in rows:
            (example,) = self.model.processor.examples(row)
            supervised = torch.from_numpy(example.labels).to(self.model.device) != IGNORE_INDEX
            logits.append(self.theirs(**self._inputs(example, mmproj)).logits[0, supervised])
        return torch.cat(logits).float()

    @torch.inference_mode()
    def texts(self, rows: Sequence[Conversation], mmproj: Mmproj) -> list[str]:
        """Greedy answers to the rows."""
        reader = AnswerReader(self.model.processor, ())
        return [
            reader.answer(self._answer(self.model.processor.prompt(row), mmproj), None).text
            for row in rows
        ]

    def _answer(self, prompt: Example, mmproj: Mmproj) -> list[int]:
        """The ids of a greedy answer."""
        from transformers import DynamicCache

        stops = [
            self.fields[key]
            for kind in ("eos", "eot", "eom")
            if (key := f"tokenizer.ggml.{kind}_token_id") in self.fields
        ]
        cache = {cache_name(): DynamicCache(config=self.theirs.config)}
        inputs = self._inputs(prompt, mmproj)
        ids: list[int] = []
        while len(ids) < ANSWER and not (ids and ids[-1] in stops):
            last = self.theirs(**inputs, **cache, logits_to_keep=1).logits[0, -1]
            ids.append(int(last.argmax()))
            inputs = {"input_ids": torch.tensor([ids[-1:]], device=self.model.device)}
        return ids

    def _inputs(self, example: Example, mmproj: Mmproj) -> dict[str, Any]:
        """The embeddings of an example, and the attention masks that differ from a decoder's."""
        ids = torch.from_numpy(example.input_ids).long().to(self.model.device)
        shown = mmproj.projector.image_places(example, self.model.processor).to(ids.device)
        embeds = self.theirs.get_input_embeddings()(ids)
        if example.media:
            images = [mmproj.features(self.model.processor.images(each)) for each in example.media]
            embeds[shown] = torch.cat(images).to(embeds.device)
            if mmproj.projector.both_ways:
                counts = torch.tensor([len(image) for image in images], device=embeds.device)
                masks = self._masks(shown, counts)
                return {"inputs_embeds": embeds[None], "attention_mask": masks}
        return {"inputs_embeds": embeds[None]}

    def _masks(self, shown: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The numbers that llama.cpp adds to scores, [1, 1, L, L], by the kind of a layer.

        It computes an image's tokens at once without a causal mask, and a window hides what is too
        far before a token. `shown` bool[L] are images' tokens, `counts` the number of each image's.
        """
        place = torch.arange(len(shown), device=shown.device)
        image = torch.full_like(place, -1)
        numbers = torch.arange(len(counts), device=shown.device)
        image[shown] = numbers.repeat_interleave(counts)
        distance = place[:, None] - place
        visible = (distance >= 0) | ((image[:, None] == image) & shown[:, None])
        window = visible & (distance < self.theirs.config.sliding_window)
        lowest = torch.finfo(torch.float32).min
        return {
            name: torch.zeros(mask.shape, device=shown.device).masked_fill(~mask, lowest)[
                None, None
            ]
            for name, mask in (("full_attention", visible), ("sliding_attention", window))
        }
