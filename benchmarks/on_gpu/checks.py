"""Losses, gradients and answers that must agree: a small Llama or gated T5 behind a small CLIP.

Without a GPU the same is compared with itself on the CPU, which proves the code and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.material import write_rows
from benchmarks.on_gpu.material import tokenizer_of
from benchmarks.on_gpu.measuring import device_type
from benchmarks.on_gpu.report import Report
from vlm_tune.config.load import parse_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.packing import branch_layout, pack_layout
from vlm_tune.data.prepare.run import conversations, prepare
from vlm_tune.data.types import Conversation, Example
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.acceleration.compiling import blocks, compiled
from vlm_tune.model.build import build
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.tuning import apply_rules
from vlm_tune.precision import DTYPES

IMAGES, EACH = 3, 4
"""Images and questions about each."""

LOSS, GRADIENT = 1e-5, 1e-4
"""Largest relative differences in fp32: of the loss, and of a gradient's L2 norm."""

HALF_LOSS, HALF_GRADIENT = 1e-2, 1e-1
"""The same of bf16 against fp32, of all gradients together."""

NEW_TOKENS = 6

WIDTHS = {"causal": 256, "seq2seq": 128}
TINY_WIDTH = 32
Gradients = dict[str, torch.Tensor]


def checks(report: Report) -> None:
    """Runs the checks of a kind of language model."""
    torch.backends.cudnn.allow_tf32 = False
    small = write_small(report.folder, report.options["kind"], tiny=report.tiny)
    reference = tuned(small.recipe())
    batches = small.batches(reference)
    expected = gradients(reference, batches["rows"])
    device = device_type()
    model = tuned(small.recipe(), device=device)
    model.load_state_dict(reference.state_dict())
    compare(report, f"fp32: {device} = cpu", gradients(model, batches["rows"]), expected)
    with torch.autocast(device, torch.bfloat16):
        half = gradients(model, batches["rows"])
    _half(report, half, expected)
    for name, batch in batches.items():
        if name != "rows":
            compare(report, f"{name} = rows", gradients(model, batch), expected)
    _compiled(report, model, batches)
    _nf4(report, small)
    _answers(report, model, small)
    _flex(report, small)


# --- the small models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A small model's folder and its recipe's text."""

    kind: str
    home: Path

    def recipe(self, **llm: Any) -> Recipe:
        """The recipe, with further keys of `model.llm`."""
        return parse_recipe(recipe_text(self.kind, self.home, self.home / "run", **llm))

    def rows(self) -> list[Conversation]:
        """The conversations."""
        recipe = self.recipe()
        return list(conversations(recipe.data, recipe.data.train, 0))

    def batches(self, model: VisionLanguageModel) -> dict[str, Batch]:
        """The same questions as rows, as branches (of a decoder) and packed, on the CPU."""
        recipe = self.recipe()
        prepared = prepare(recipe.data, recipe.data.train, model.processor, seed=0)
        examples = [prepared.store[place] for place in range(len(prepared.store))]
        by_image: dict[Any, list[Example]] = {}
        for example in examples:
            by_image.setdefault(example.media, []).append(example)
        layouts: dict[str, list[Example]] = {"rows": examples}
        layouts["packed"] = [pack_layout(group, self.kind) for group in _pairs(examples)]
        if self.kind == "causal":
            trees = [tree for group in by_image.values() for tree in branch_layout(group, 4096)]
            layouts["branches"] = trees
            layouts["packed branches"] = [pack_layout(trees, self.kind)]
        spec = model.processor.spec
        return {
            name: collate(rows, spec, fetch=model.processor.images)
            for name, rows in layouts.items()
        }


def _pairs(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [examples[start : start + 2] for start in range(0, len(examples), 2)]


def recipe_text(kind: str, home: Path, output: Path, train: str = "", **llm: Any) -> str:
    """A recipe that trains LoRA and the connector of a small model; `train` adds to its section."""
    keys = "".join(f", {key}: {value}" for key, value in llm.items())
    return f"""
name: small
output: {output}
model:
  tower: {{kind: transformers, name: {home / "tower"}}}
  llm: {{kind: {kind}, name: {home / "llm"}{keys}}}
data:
  template: {"flan" if kind == "seq2seq" else "chatml"}
  max_length: 1024
  workers: 1
  train: [{{kind: file, path: {home / "single.jsonl"}}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full}}
  - {{match: "llm.*", how: lora, r: 8, lora_alpha: 16, target_modules: all-linear}}
train: {{steps: 6, batch_size: 4, precision: fp32, learning_rate: 1.0e-3{train}}}
evaluate: {{samples: 0, max_new_tokens: {NEW_TOKENS}}}
"""


def write_small(folder: Path, kind: str, *, tiny: bool) -> Small:
    """Writes a small model and its questions, if they are not there yet."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    home = folder / f"small-{kind}"
    if not (home / "written").is_file():
        write_rows(home, IMAGES, each=EACH)
        torch.manual_seed(0)
        width = TINY_WIDTH if tiny else WIDTHS[kind]
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2 if tiny else 3,
            num_attention_heads=2,
            # On a GPU 256 tokens: FlexAttention goes by blocks of 128.
            image_size=32 if tiny else 128,
            patch_size=16 if tiny else 8,
        )
        CLIPVisionModel(vision).save_pretrained(home / "tower")
        template = "flan" if kind == "seq2seq" else "chatml"
        tokenizer = tokenizer_of(home / "single.jsonl", template)
        _language(kind, width, tokenizer).save_pretrained(home / "llm")
        tokenizer.save_pretrained(home / "llm")
        (home / "written").touch()
    return Small(kind, home)


def _language(kind: str, width: int, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "causal":
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=max(width // 64, 2),
            num_key_value_heads=max(width // 128, 1),
            bos_token_id=tokenizer.bos_token_id,
            **ids,
        )
        return LlamaForCausalLM(config)
    config = T5Config(
        vocab_size=512,
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        **ids,
    )
    return T5ForConditionalGeneration(config)


def tuned(
    recipe: Recipe, change: Callable[[Any], None] | None = None, *, device: str = "cpu"
) -> VisionLanguageModel:
    """The recipe's model with its adapters awake; `change` comes before they are added."""
    model = build(recipe, [], device=torch.device(device), model_class=VisionLanguageModel)
    if change:
        change(model)
    torch.manual_seed(0)
    apply_rules(
        model,
        recipe.tune,
        learning_rate=recipe.train.learning_rate,
        precision=DTYPES[recipe.train.precision],
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


# --- what is compared ----------------------------------------------------------------------------


def gradients(model: VisionLanguageModel, batch: Batch) -> tuple[float, Gradients]:
    """The summed loss of a batch and the gradients of what trains, on the CPU in fp64."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss: Any = model(copy.deepcopy(batch).to(model.device))
    loss.sum.backward()
    return float(loss.sum.detach()), {
        name: parameter.grad.detach().double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative difference of two tensors in the L2 norm."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def compare(
    report: Report,
    name: str,
    measured: tuple[float, Gradients],
    expected: tuple[float, Gradients],
) -> None:
    """Checks that losses and every gradient agree to fp32's rounding."""
    (loss, mine), (wanted, theirs) = measured, expected
    report.below(f"{name}, loss", abs(loss - wanted) / abs(wanted), LOSS)
    report.check(f"{name}, names of gradients", mine.keys() == theirs.keys(), f"{len(mine)}")
    differences = {key: relative(mine[key], theirs[key]) for key in mine.keys() & theirs.keys()}
    worst = max(differences, key=lambda key: _sortable(differences[key]))
    report.below(f"{name}, gradients ({worst})", differences[worst], GRADIENT)


def _sortable(value: float) -> float:
    """The value, with NaN as the largest."""
    return math.inf if math.isnan(value) else value


def _half(
    report: Report, measured: tuple[float, Gradients], expected: tuple[float, Gradients]
) -> None:
    """Checks bf16 against fp32: the loss, and all gradients together."""
    (loss, mine), (wanted, theirs) = measured, expected
    report.below("bf16 = fp32, loss", abs(loss - wanted) / abs(wanted), HALF_LOSS)
    one, other = (torch.cat([each[key].flatten() for key in theirs]) for each in (mine, theirs))
    report.below("bf16 = fp32, gradients", relative(one, other), HALF_GRADIENT)


def _compiled(report: Report, model: VisionLanguageModel, batches: dict[str, Batch]) -> None:
    name = "compiled = eager"
    if report.tiny:
        report.not_run(name, "a CPU compiles for too long; tests/model compare it there")
        return
    with compiled(blocks(model.llm, training=True)):
        for layout, batch in batches.items():
            torch.compiler.set_stance("default")
            fast = gradients(model, batch)
            with torch.compiler.set_stance("force_eager"):
                compare(report, f"{name}, {layout}", fast, gradients(model, batch))


def _nf4(report: Report, small: Small) -> None:
    """NF4 layers against plain ones that hold the same de-quantised weights."""
    from bitsandbytes.functional import dequantize_4bit

    packed = tuned(small.recipe(quantize="nf4"), device=device_type())
    weights = {
        name.replace(".base_layer", ""): dequantize_4bit(layer.weight.data, state).cpu()
        for name, layer in packed.llm.named_modules()
        if (state := getattr(getattr(layer, "weight", None), "quant_state", None)) is not None
    }

    def fill(model: VisionLanguageModel) -> None:
        for name, weight in weights.items():
            layer: Any = model.llm.get_submodule(name)
            layer.weight.data.copy_(weight)

    plain = tuned(small.recipe(), fill, device=device_type())
    plain.connector.load_state_dict(packed.connector.state_dict())
    report.check("NF4 packs the blocks' layers", len(weights) > 6, f"{len(weights)} layers")
    for name, batch in small.batches(plain).items():
        compare(
            report,
            f"NF4 = de-quantised, {name}",
            gradients(packed, batch),
            gradients(plain, batch),
        )


def _flex(report: Report, small: Small) -> None:
    """FlexAttention against SDPA."""
    name = "FlexAttention = SDPA"
    if small.kind == "seq2seq":
        report.not_run(name, "an encoder-decoder attends by masks")
        return
    if device_type() == "cpu":
        report.not_run(name, "FlexAttention has no backward pass on a CPU")
        return
    by_name = {
        attention: tuned(small.recipe(attention=attention), device=device_type())
        for attention in ("sdpa", "flex")
    }
    by_name["flex"].load_state_dict(by_name["sdpa"].state_dict())
    for layout, batch in small.batches(by_name["sdpa"]).items():
        expected = gradients(by_name["sdpa"], batch)
        compare(report, f"{name}, {layout}", gradients(by_name["flex"], batch), expected)


# --- answers -------------------------------------------------------------------------------------


def _answers(report: Report, model: VisionLanguageModel, small: Small) -> None:
    """Greedy ids: prompts as branches, one by one, and by transformers' own generate."""
    model.eval()
    prompts = model.processor.prompts(small.rows())
    together = answer_ids(model, prompts, batch_size=64)
    alone = [answer_ids(model, [prompt], batch_size=1)[0] for prompt in prompts]
    theirs = transformers_ids(model, prompts)
    tokens = f"{sum(map(len, together))} ids of {len(prompts)} answers"
    layout = "branches" if small.kind == "causal" else "padded rows"
    report.check(f"greedy ids of {layout} = rows", together == alone, tokens)
    report.check("greedy ids of rows = transformers", alone == theirs, tokens)


def answer_ids(
    model: VisionLanguageModel, prompts: Sequence[Example], batch_size: int
) -> list[list[int]]:
    """Our greedy ids of each prompt, without the end token."""
    answers = prompt_answers(
        model,
        prompts,
        Decoding(NEW_TOKENS),
        fetch=model.processor.images,
        batch_size=batch_size,
    )
    return [list(answer.ids) for answer in answers]


@torch.inference_mode()
def transformers_ids(model: VisionLanguageModel, prompts: Sequence[Example]) -> list[list[int]]:
    """The greedy ids of transformers' `generate`, padded on the left, up to the end token."""
    stops = model.processor.stop_ids
    language = model.llm.model
    batches = [
        collate([prompt], model.processor.spec, fetch=model.processor.images).to(model.device)
        for prompt in prompts
    ]
    embeds = [model.embed(batch)[0] for batch in batches]
    flipped = pad_sequence([each.flip(0) for each in embeds], batch_first=True).flip(1)
    lengths = torch.tensor([len(each) for each in embeds], device=model.device)
    places = torch.arange(flipped.shape[1], device=model.device)
    mask = (places >= flipped.shape[1] - lengths[:, None]).long()
    ids = language.generate(
        inputs_embeds=flipped,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=model.processor.spec.pad_id,
    ).tolist()
    if language.config.is_encoder_decoder:
        ids = [row[1:] for row in ids]
    return [
        row[: next((place for place, token in enumerate(row) if token in stops), len(row))]
        for row in ids
    ]
