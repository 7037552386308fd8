"""Writes models in the layouts of other libraries, and proves that these compute the same with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_tune.data.images import decode_image, encoded_bytes
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Media
from vlm_tune.errors import ModelError
from vlm_tune.merging import TOLERANCE, check_output, merged_model, observe, plain_probe, probe_rows
from vlm_tune.model.build import DTYPES, llm_config, load_llm
from vlm_tune.model.connectors import build_connector
from vlm_tune.model.llava import IMAGE_TOKEN, check_logits, check_target, llava_model, llava_processor
from vlm_tune.model.pretrained import find_vlm
from vlm_tune.model.store import ADAPTERS, commit_folder, find_model, load_model, read_config, verify_folder
from vlm_tune.model.towers import build_tower
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageModel
from vlm_tune.model.weights import cast_parameters, read_safetensors

EXACT = 1e-5
"""How far the logits of an fp32 export may be from the model's, as a share of the largest of them where that is over 1."""
PIXEL = 1e-3
"""How far normalised pixels may be apart; one level of 255 is more than ten times that."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its logits are from the model's (largest absolute difference; None if not verified)."""

    output: str
    format: str
    dtype: str
    merged: list[str]
    parameters: int
    difference: float | None
    same_text: bool | None


@dataclass(frozen=True)
class Expected:
    """What a model does with probe rows: fp32 logits [S, V] of their supervised tokens, and greedy answers."""

    rows: list[Conversation]
    logits: torch.Tensor
    texts: list[str]

    def tolerance(self, dtype: str) -> float:
        """How far the logits of an export may be from these."""
        return EXACT * max(1.0, float(self.logits.abs().max())) if dtype == "fp32" else TOLERANCE


def export(
    path: Path, output: Path, *, format: str = "llava", dtype: str | None = None, max_shard_size: str = "5GB", verify: bool = True
) -> ExportReport:
    """Writes a run, a checkpoint or a merged folder as a `LlavaForConditionalGeneration` that plain transformers opens.

    With `format="adapter"` it is the LLM's adapter as a PEFT folder, with the connector and the tower's changes beside it.
    Adapters are merged on the way, verified as by `merge`; where no `dtype` is given it is the merge's, or the model's
    own. What is written is opened by transformers alone before it gets its name: it must give the same token ids,
    pixels and greedy text, and logits within 1e-5 of the largest (2e-2 for 16 bit). Raises `ModelError` for a model that the format
    can't express, an output that exists, too little memory or disk, and a failed verification; nothing is left then.
    """
    if format == "adapter":
        return _export_adapter(Path(path), output, dtype, verify)
    if format != "llava":
        raise ModelError(f"no export format {format!r}; there are llava and adapter")
    source = find_model(Path(path))
    config = read_config(source)
    check_target(config)
    check_output(output)
    parameters = _check_room(source, config, output, dtype)
    model, merged = _whole_model(Path(path), source, output, dtype)
    dtype = model.config.precision
    expected = _expected(Path(path), model) if verify else None
    cast_parameters(model, DTYPES[dtype])
    found: list[tuple[float, bool]] = []

    def write(folder: Path) -> None:
        processor = llava_processor(model)
        image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        llava_model(model, image_token, DTYPES[dtype]).save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        if expected is not None:
            found.append(verify_llava(folder, model, expected, expected.tolerance(dtype)))
        report = _report(output, dtype, merged, parameters, found)
        (folder / "export.json").write_text(json.dumps(asdict(report), indent=1))
        (folder / "README.md").write_text(model_card(Path(path), model, report))

    commit_folder(output, write)
    return _report(output, dtype, merged, parameters, found)


def _report(output: Path, dtype: str, merged: list[str], parameters: int, found: list[tuple[float, bool]]) -> ExportReport:
    difference, same_text = found[0] if found else (None, None)
    return ExportReport(str(output), "llava", dtype, merged, parameters, difference, same_text)


def _whole_model(path: Path, source: Path, output: Path, dtype: str | None) -> tuple[VisionLanguageModel, list[str]]:
    """The model in 16 bit or fp32 without adapters or quantised weights, and the parts whose adapter was merged."""
    if any((source / name).is_dir() for name in ADAPTERS.values()):
        model, report = merged_model(path, output, dtype)
        return model, report.parts
    model = load_model(source, dtype=DTYPES[dtype] if dtype else None, quantize=False)
    model.config = model.config.model_copy(update={"precision": dtype or model.config.precision})
    return model, []


# --- room ------------------------------------------------------------------------------------------------------------


def _check_room(source: Path, config: VisionLanguageConfig, output: Path, dtype: str | None) -> int:
    """The number of parameters. Raises `ModelError` if memory or disk hold less; no weights are loaded to tell."""
    parameters = count_parameters(source, config)
    width = DTYPES[dtype or config.precision].itemsize
    disk, memory = parameters * width, parameters * (4 + width)  # it is merged and compared in fp32
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if disk > free:
        raise ModelError(f"{output}: the export takes {_size(disk)} of disk, {_size(free)} are free; nothing was started")
    available = _available_memory()
    if memory > available:
        raise ModelError(f"the export takes {_size(memory)} of memory, {_size(available)} are free; nothing was started")
    return parameters


def _available_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def count_parameters(source: Path, config: VisionLanguageConfig) -> int:
    """A saved decoder model's parameters, adapters left out, from configs alone.

    Raises `ModelError` for a language model whose config can't be read, and one that scales its logits.
    """
    from transformers import AutoModelForCausalLM

    own = source / "llm"
    text = llm_config(config.llm, own if own.is_dir() else None)
    check_logits(text)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text)
        tower = build_tower(config.model.tower, config.tower_rebuild)
        connector = build_connector(config.model.connector, tower.measure()[1], language.get_input_embeddings().embedding_dim)
    return sum(parameter.numel() for part in (language, tower, connector) for parameter in part.parameters())


# --- verification ----------------------------------------------------------------------------------------------------


def _expected(path: Path, model: VisionLanguageModel) -> Expected:
    """What the model does, weights as they are and computed in fp32."""
    cast_parameters(model, torch.float32)
    controls = model.processor.encoder.controls_in
    # A text that writes a control token is that token to a plain tokenizer: ours keeps it text, so ids may differ.
    rows = [
        row for row in probe_rows(path, model) if not any(controls(part) for m in row.messages for part in m.parts if isinstance(part, str))
    ]
    rows = rows or [plain_probe(model)]
    logits, texts = observe(model, rows)
    return Expected(rows, logits.unflatten(0, (-1, model.llm.head.weight.shape[0])), texts)  # type: ignore[union-attr]


def verify_llava(folder: Path, model: VisionLanguageModel, expected: Expected, tolerance: float) -> tuple[float, bool]:
    """How far an exported folder's logits are from the model's, and that its greedy text is the same.

    The folder is opened by transformers' own classes, computing in fp32. Raises `ModelError` for other token ids,
    pixels, logits or text.
    """
    from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

    opened: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    theirs, info = opened
    faults = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if faults:
        raise ModelError(f"the exported weights don't fit: {', '.join(sorted(faults)[:8])}; nothing was written")
    theirs = theirs.to(model.device).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    # Pillow resizes as our own preprocessing does; torchvision, which transformers prefers, is off by a level or two.
    pillow: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    logits, texts = [], []
    for row in expected.rows:
        _check_pixels(pillow, model, row)
        logits.append(_their_logits(theirs, processor, model, row))
        texts.append(_their_answer(theirs, processor, model, row))
    size = expected.logits.shape[1]
    difference = float((torch.cat(logits)[:, :size] - expected.logits).abs().max())
    if not difference <= tolerance:
        raise ModelError(
            f"the exported model's logits differ from the model's by {difference:.3g}, more than {tolerance}; nothing was written"
        )
    if texts != expected.texts:
        odd = next(place for place, pair in enumerate(zip(texts, expected.texts, strict=True)) if pair[0] != pair[1])
        raise ModelError(
            f"the exported model answers {expected.rows[odd].id} with {texts[odd]!r}, the model with {expected.texts[odd]!r}; "
            "nothing was written"
        )
    return difference, True


def _messages(model: VisionLanguageModel, row: Conversation, *, prompt: bool = False) -> list[dict[str, Any]]:
    """A conversation as transformers' processors take it; images are those the tower sees, already square."""
    from PIL import Image

    def part(one: str | Media) -> dict[str, Any]:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        return {"type": "image", "image": Image.fromarray(model.processor.images(one).permute(1, 2, 0).numpy())}

    turns = row.messages[:-1] if prompt and row.messages[-1].role == "assistant" else row.messages
    return [{"role": turn.role, "content": [part(one) for one in turn.parts]} for turn in turns]


def _inputs(processor: Any, model: VisionLanguageModel, messages: list[dict[str, Any]], *, prompt: bool) -> Any:
    return processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt").to(
        model.device
    )


@torch.inference_mode()
def _their_logits(theirs: Any, processor: Any, model: VisionLanguageModel, row: Conversation) -> torch.Tensor:
    """Logits [S, V] where the model's own example has labels; token ids must be its own."""
    image_token = theirs.config.image_token_id
    (example,) = model.processor.examples(row)
    inputs = _inputs(processor, model, _messages(model, row), prompt=False)
    ids = torch.from_numpy(example.input_ids).long().masked_fill(torch.from_numpy(example.image_mask), image_token).tolist()
    _check_ids(row, [*ids, int(example.labels[-1])], inputs["input_ids"][0, : len(ids) + 1].tolist())
    return theirs(**inputs).logits[0, : len(ids)].float()[torch.from_numpy(example.labels).to(model.device) != IGNORE_INDEX]


def _check_ids(row: Conversation, own: Sequence[int], found: Sequence[int]) -> None:
    if list(own) != list(found):
        place = next((n for n, (a, b) in enumerate(zip(own, found, strict=False)) if a != b), min(len(own), len(found)))
        raise ModelError(
            f"the chat template gives other token ids for {row.id} than the model was trained with, from place {place}: "
            f"{list(found[place : place + 4])}, expected {list(own[place : place + 4])}; nothing was written"
        )


@torch.inference_mode()
def _their_answer(theirs: Any, processor: Any, model: VisionLanguageModel, row: Conversation) -> str:
    inputs = _inputs(processor, model, _messages(model, row, prompt=True), prompt=True)
    ids = theirs.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


def _check_pixels(images: Any, model: VisionLanguageModel, row: Conversation) -> None:
    """Raises `ModelError` if a row's images, resized and normalised by the exported processor, are not what the tower sees."""
    for media in row.media:
        scale, offset = model.tower.scale.cpu(), model.tower.offset.cpu()
        own = model.processor.images(media).float() * scale[0] - offset[0]
        found = images(decode_image(encoded_bytes(media), media.name), return_tensors="pt")["pixel_values"][0]
        if own.shape != found.shape or float((own - found).abs().max()) > PIXEL:
            raise ModelError(
                f"the exported image processor gives other pixels for {media.name} than the model was trained with; nothing was written"
            )


# --- adapters --------------------------------------------------------------------------------------------------------

BESIDE = ("connector.safetensors", "tower.safetensors", "tower_adapter", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What goes with an adapter, where the model's folder has it."""


def _export_adapter(path: Path, output: Path, dtype: str | None, verify: bool) -> ExportReport:
    """Writes the LLM's adapter as a PEFT folder. Raises `ModelError` for a model without one, or whose base has no name."""
    source = find_model(path)
    config = read_config(source)
    verify_folder(source)
    if not (source / ADAPTERS["llm"]).is_dir():
        raise ModelError(f"{source} has no adapter of the language model to export")
    if (source / "llm").is_dir() or config.llm.name is None:
        raise ModelError(f"the adapter's base is no model with a name, it is in {source}: use merge, or --format llava")
    if find_vlm(config.llm.name) is not None:
        raise ModelError(f"the adapter's base is a part of {config.llm.name}, which PEFT can't load alone: use merge, or --format llava")
    if dtype is not None:
        raise ModelError("an adapter is exported as it was trained; leave out --dtype")
    check_output(output)
    found: list[tuple[float, bool]] = []
    reports: list[ExportReport] = []

    def write(folder: Path) -> None:
        shutil.copytree(source / ADAPTERS["llm"], folder, dirs_exist_ok=True)
        for name in BESIDE:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        tensors = read_safetensors(folder / "adapter_model.safetensors")
        if verify:
            found.append((verify_adapter(folder, path, source), True))
        difference = found[0][0] if found else None
        report = ExportReport(str(output), "adapter", "fp32", [], sum(map(torch.numel, tensors.values())), difference, None)
        (folder / "export.json").write_text(json.dumps(asdict(report), indent=1))
        (folder / "README.md").write_text(_adapter_card(path, config, report))
        reports.append(report)

    commit_folder(output, write)
    return reports[0]


@torch.inference_mode()
def verify_adapter(folder: Path, path: Path, source: Path) -> float:
    """How far the logits of plain PEFT over the base are from the model's, for the text of probe rows, in fp32.

    Raises `ModelError` if that is too far, or if the adapter changes nothing.
    """
    from peft import PeftModel

    model = load_model(source, dtype=torch.float32, quantize=False)
    rows = probe_rows(path, model)
    ids = [
        torch.from_numpy(e.input_ids[~e.image_mask]).long()[None].to(model.device) for row in rows for e in model.processor.examples(row)
    ]
    llm = model.config.llm.model_copy(update={"quantize": None})
    base = load_llm(llm, dtype=torch.float32).to(model.device).eval()
    seq2seq = model.llm.layout == "seq2seq"
    own, plain = ([_text_logits(module, one, seq2seq) for one in ids] for module in (model.llm.model, base))
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    found = [_text_logits(theirs, one, seq2seq) for one in ids]
    difference, change = (max(float((a - b).abs().max()) for a, b in zip(own, other, strict=True)) for other in (found, plain))
    if not change > 0:
        raise ModelError("the adapter changes nothing: the model's logits equal its base's; nothing was written")
    if not difference <= EXACT * max(1.0, *(float(one.abs().max()) for one in own)):
        raise ModelError(f"PEFT's logits with the exported adapter differ from the model's by {difference:.3g}; nothing was written")
    return difference


def _text_logits(module: Any, ids: torch.Tensor, seq2seq: bool) -> torch.Tensor:
    """fp32 logits of a text; an encoder-decoder has it as the input and as the answer."""
    return module(input_ids=ids, **({"labels": ids} if seq2seq else {})).logits.float()


# --- the card --------------------------------------------------------------------------------------------------------


def model_card(path: Path, model: VisionLanguageModel, report: ExportReport) -> str:
    """The README of an exported folder: what it is made of, how to use it, its recipe and scores where they are known."""
    from vlm_tune import __version__

    section = model.config.model
    tower = getattr(section.tower, "name", None) or "from scratch"
    verified = "not verified" if report.difference is None else f"logits within {report.difference:.2g} of the model's, same greedy text"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        f"base_model: {section.llm.name or 'none'}",
        "---",
        "",
        f"A LLaVA written by vlm_tune {__version__}.",
        "",
        f"- tower: {tower} ({section.tower.kind})",
        f"- connector: {section.connector.kind}",
        f"- language model: {section.llm.name or 'from scratch'}",
        f"- merged adapters: {', '.join(report.merged) or 'none'}",
        f"- {report.parameters:,} parameters in {report.dtype}; {verified}",
        "",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        f'processor = AutoProcessor.from_pretrained("{report.output}")',
        f'model = AutoModelForImageTextToText.from_pretrained("{report.output}")',
        'content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What does the image show?"}]',
        'turns = [{"role": "user", "content": content}]',
        'inputs = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")',
        "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True))",
        "```",
    ]
    return "\n".join([*lines, *_run_lines(path)]) + "\n"


def _adapter_card(path: Path, config: VisionLanguageConfig, report: ExportReport) -> str:
    base = f"{config.llm.name}" + (f" ({config.llm.gguf_file})" if config.llm.gguf_file else "")
    lines = ["---", "library_name: peft", f"base_model: {config.llm.name}", "---", ""]
    lines += [f"The language model's LoRA adapter of a vision-language model, over {base}: {report.parameters:,} parameters."]
    lines += ["Beside it: `connector.safetensors`, and what was changed of the tower."]
    return "\n".join([*lines, *_run_lines(path)]) + "\n"


def _run_lines(path: Path) -> list[str]:
    """Scores and recipe of the run that a model lies in."""
    run = next((folder for folder in (path, *path.resolve().parents) if (folder / "recipe.yaml").is_file()), None)
    if run is None:
        return []
    scores: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((run / "result.json").read_text())
        scores = ["", "## Scores", "", f"Exact match on {result['n']:,} test questions: {result['accuracy']:.4f}"]
    return [*scores, "", "## Recipe", "", "```yaml", (run / "recipe.yaml").read_text().rstrip(), "```"]
