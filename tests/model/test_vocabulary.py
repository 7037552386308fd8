"""New tokens, and training of the embedding and the head.

Beside quantised layers, and through merge and every export.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.export_samples import llava_text
from tests.helpers.tiny_models import (
    LORA_TUNE,
    built,
    largest,
    parsed,
    rows_of,
    save_llm,
    with_llm,
    with_tune,
)
from vlm_tune.api import merge, sft
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.exporting import export
from vlm_tune.exporting.verify import observe
from vlm_tune.model.checkpoint import load_model

Tiny = Callable[..., str]
WORDS = ["<loc_1>", "<loc_2>"]
ADDED = ", added_tokens: ['<loc_1>'], added_special_tokens: ['<loc_2>']"
RULES = """
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full}}
{rules}
  - {{match: "llm.*", how: {rest}}}
train:"""
LORA = "lora, r: 2, target_modules: all-linear"


def rules(*lines: str, rest: str = LORA) -> str:
    return RULES.format(rules="\n".join(f"  - {{{line}}}" for line in lines), rest=rest)


def with_places(folder: Path) -> None:
    """Rows whose answers hold the new tokens."""
    path = folder / "messages.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["messages"][1]["content"] = (
            f"{line['messages'][1]['content']} at {WORDS[number % 2]}{WORDS[0]}."
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained_run(
    text: str,
    base: Path,
    tune: str,
    *,
    kind: str = "causal",
    extra: str = "",
    steps: int = 4,
    **config: Any,
) -> Path:
    """A run over a saved tiny LLM."""
    named = with_llm(text, save_llm(base, kind, rows_of(parsed(text)), **config), kind, extra)
    recipe = parsed(
        with_tune(named, tune),
        train__steps=steps,
        train__learning_rate=2e-2,
        train__checkpoints={"every": steps},  # not after each epoch, which is two steps
        evaluate__every=steps,
    )
    return sft(recipe).folder


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_new_token_is_one_id_wherever_a_text_has_it(
    kind: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    text = tiny_recipe(kind)
    with_places(tmp_path)
    base = save_llm(tmp_path / "base", kind, rows_of(parsed(text)))
    plain = built(parsed(with_llm(text, base, kind)))
    model = built(parsed(with_llm(text, base, kind, ADDED)))
    tokenizer: Any = model.processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(WORDS)
    assert ids == [
        len(plain.processor.tokenizer),  # type: ignore[arg-type]
        len(plain.processor.tokenizer) + 1,  # type: ignore[arg-type]
    ]
    (example,) = model.processor.examples(rows_of(parsed(text))[1])
    labels = [int(label) for label in example.labels if label != -100]
    pieces = model.processor.encoder.text("no at", "text" if kind == "seq2seq" else None)
    end = labels[labels.index(ids[0]) + 1 :]
    assert labels == [*labels[: labels.index(ids[1])], ids[1], ids[0], *end]
    assert tokenizer.decode(labels[: labels.index(ids[1])]).strip() == "no at" and len(
        pieces
    ) <= labels.index(ids[1])
    assert not set(ids) & {
        int(label) for label in plain.processor.examples(rows_of(parsed(text))[1])[0].labels
    }
    assert model.processor.decode(labels) == "no at <loc_2><loc_1>."
    # What a user writes is still no control token.
    assert model.processor.encoder.is_control(model.processor.stop_ids[0])
    assert not set(model.processor.encoder.text("<loc_1>" + str(tokenizer.eos_token))) & set(
        model.processor.stop_ids
    )
    rows = model.llm.model.get_input_embeddings().weight
    assert torch.allclose(rows[ids[0]], rows[: ids[0]].mean(0), atol=1e-6)


def test_a_control_token_of_the_template_is_not_added(tiny_recipe: Tiny, tmp_path: Path) -> None:
    text = tiny_recipe("causal")
    base = save_llm(tmp_path / "base", "causal", rows_of(parsed(text)))
    with pytest.raises(
        DataError,
        match="'<|im_end|>' is a control token of the chat format 'chatml'".replace("|", r"\|"),
    ):
        built(parsed(with_llm(text, base, "causal", ", added_tokens: ['<|im_end|>']")))


def test_a_tokenizer_larger_than_the_embedding_says_what_to_do(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    text = tiny_recipe("causal")
    base = save_llm(tmp_path / "base", "causal", rows_of(parsed(text)))
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(base)
    with pytest.raises(
        ModelError,
        match=r"none for <loc_1>, <loc_2>\. Use the model's own tokenizer, or name these in "
        r"model.llm.added_tokens",
    ):
        built(parsed(with_llm(text, base, "causal")))
    model = built(parsed(with_llm(text, base, "causal", ADDED)))
    assert model.llm.model.get_input_embeddings().num_embeddings == len(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["", ", quantize: nf4"])
def test_new_tokens_are_trained_saved_merged_and_exported(
    quantize: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    text = llava_text(tiny_recipe)
    with_places(tmp_path)
    run = trained_run(text, tmp_path / "base", LORA_TUNE, extra=ADDED + quantize, steps=60)
    saved = load_model(run, dtype=torch.float32, quantize=False)
    rows = rows_of(parsed(text))
    logits, texts = observe(saved, rows)
    assert any("<loc_" in answer for answer in texts), texts
    assert (run / "model" / "llm.safetensors").is_file() and not (run / "model" / "llm").exists()
    merge(run, tmp_path / "merged", dtype="fp32")
    merged, answers = observe(load_model(tmp_path / "merged", dtype=torch.float32), rows)
    assert largest(merged, logits) <= 1e-4 and answers == texts
    for format in ("transformers", "adapter"):
        report = export(
            run, tmp_path / format, format=format, dtype="fp32" if format == "llava" else None
        )
        assert report.difference is not None and report.difference <= 1e-3
        tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / format)
        assert [
            len(tokenizer(f"at {word}", add_special_tokens=False).input_ids) for word in WORDS
        ] == [len(tokenizer("at ", add_special_tokens=False).input_ids) + 1] * 2


def test_everything_in_full_with_quantised_layers_is_refused(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    text = with_llm(tiny_recipe("causal"), tmp_path / "base", "causal", ", quantize: nf4")
    for tune in (
        '\ntune:\n  - {match: "tower.*", how: frozen}\n  - {match: "*", how: full}\ntrain:',
        '\ntune:\n  - {match: "*", how: full}\ntrain:',
        '\ntune:\n  - {match: "llm.*", how: last_layers, layers: 1}\n  - {match: "*", '
        "how: frozen}\ntrain:",
    ):
        with pytest.raises(
            RecipeError,
            match=r"recipe:\d+:\d+: .*reaches the llm's layers, and quantised weights can't be "
            r"trained",
        ):
            parsed(with_tune(text, tune))
    parsed(
        with_tune(
            text, '\ntune:\n  - {match: "llm.*", how: lora}\n  - {match: "*", how: full}\ntrain:'
        )
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "tune",
    [
        rules('match: "llm.model.embed_tokens.*", how: full', rest="frozen"),
        rules('match: "llm.lm_head.*", how: full'),
        rules(rest="lora, r: 2, target_modules: [lm_head, q_proj]"),
        rules(rest="lora, r: 2, target_modules: [embed_tokens]"),
    ],
    ids=["embedding", "head", "head LoRA", "embedding LoRA"],
)
def test_embedding_and_head_train_beside_quantised_layers(
    tied: bool, tune: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Trained weights are there again after loading, in the merged model, and in the export."""
    text = llava_text(tiny_recipe)
    run = trained_run(
        text, tmp_path / "base", tune, extra=", quantize: nf4", tie_word_embeddings=tied
    )
    rows = rows_of(parsed(text))
    logits, texts = observe(load_model(run, dtype=torch.float32, quantize=False), rows)
    base, _ = observe(load_model(run, dtype=torch.float32, quantize=False, adapters=False), rows)
    assert largest(logits, base) > 1e-3
    report = merge(run, tmp_path / "merged", dtype="fp32")
    assert (
        report.difference_to_run is not None
        and report.difference_to_run > report.difference_to_adapter
    )
    merged, answers = observe(load_model(tmp_path / "merged", dtype=torch.float32), rows)
    assert largest(merged, logits) <= 1e-4 and answers == texts
    exported = export(run, tmp_path / "llava", format="transformers", dtype="fp32")
    assert exported.difference is not None and exported.difference <= 1e-3
    if (run / "model" / "adapter").is_dir():
        assert export(run, tmp_path / "adapter", format="adapter").difference is not None
