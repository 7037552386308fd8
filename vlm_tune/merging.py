"""Merges LoRA adapters into the base weights, and proves that the merge did what the adapter does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vlm_tune.data.collate import collate
from vlm_tune.data.prepare import conversations
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.model.adapters import merge_adapter
from vlm_tune.model.build import DTYPES
from vlm_tune.model.llm import Decoding
from vlm_tune.model.store import find_model, load_model, read_config, save_model
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.model.weights import cast_parameters
from vlm_tune.recipe import load_recipe

TOLERANCE = 2e-2
PROBED = 10_000
"""Rows that the probes are spread over."""
PROBES = 4


@dataclass(frozen=True)
class MergeReport:
    """How far merged logits are from the adapter's and from the base's (largest absolute difference), and greedy text.

    `rows` were compared, and `allowed` is how far from the adapter's the logits might have been.
    """

    output: str
    parts: list[str]
    base: str
    difference_to_adapter: float
    difference_to_base: float
    same_text: bool
    rows: int
    allowed: float = TOLERANCE


def merge(path: Path, output: Path, *, dtype: str | None = None) -> MergeReport:
    """Merges a run's or checkpoint's adapters into 16-bit base weights (fp32 on request) and writes a model folder.

    A 4- or 8-bit run is merged into its base loaded in `dtype`, never into quantised weights. Before anything is
    written, the merged logits must equal the adapter's within 2e-2 (and give the same greedy text) and differ from
    the base's. Where no `dtype` is given it is bf16, or, if rounding to bf16 moves the logits further, fp16 (not for
    encoder-decoders, which overflow in it), or else fp32. Raises `ModelError` if there is nothing to merge, the output exists, or
    verification fails.
    """
    check_output(output)
    model, report = merged_model(Path(path), output, dtype)

    def extra(folder: Path) -> None:
        (folder / "merge.json").write_text(json.dumps(asdict(report), indent=1))
        (folder / "README.md").write_text(model_card(model, report))

    save_model(model, output, extra)
    return report


def check_output(output: Path) -> None:
    """Raises `ModelError` unless the output folder is free."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output}: the output folder is not empty")


def merged_model(path: Path, output: Path, dtype: str | None) -> tuple[VisionLanguageModel, MergeReport]:
    """The model that `merge` writes, verified, and its report. Raises `ModelError` as `merge`."""
    source = find_model(path)
    config = read_config(source)
    model, report = _merged(path, source, output, dtype or "bf16", config.llm.quantize)
    # A real LLM's logits, tens in size, can be off by more than the tolerance in fp16 too.
    for finer in () if dtype else ("fp32",) if config.llm.kind == "seq2seq" else ("fp16", "fp32"):
        if report.difference_to_adapter <= TOLERANCE and report.same_text:
            break
        model, report = _merged(path, source, output, finer, config.llm.quantize)
    check_merge(report)
    return model, report


def _merged(path: Path, source: Path, output: Path, dtype: str, quantized: str | None) -> tuple[VisionLanguageModel, MergeReport]:
    """A run's model merged in one precision, not yet written, and how far it is from adapter and base."""
    precision = DTYPES[dtype]
    model = load_model(source, dtype=precision, quantize=False)
    if not model.adapters:
        raise ModelError(f"{source} has no adapter: nothing to merge, it can be used as it is")
    merged_parts = sorted(model.adapters)
    model.float()
    probes = probe_rows(path, model)
    adapter_logits, adapter_text = observe(model, probes)
    base_logits = _without_adapters(model, probes)
    for part in merged_parts:
        merge_adapter(model, part)
    cast_parameters(model, precision)
    cast_parameters(model, torch.float32)
    merged_logits, merged_text = observe(model, probes)
    model.changed |= {"tower", "llm"}
    model.config = model.config.model_copy(update={"precision": dtype})
    cast_parameters(model, precision)
    return model, MergeReport(
        output=str(output),
        parts=merged_parts,
        base=f"{model.config.llm.name or 'the trained base'} in {dtype}" + (f" (the run was {quantized})" if quantized else ""),
        difference_to_adapter=_largest(adapter_logits, merged_logits),
        difference_to_base=_largest(base_logits, merged_logits),
        same_text=adapter_text == merged_text,
        rows=len(probes),
    )


def check_merge(report: MergeReport) -> None:
    """Raises `ModelError` for a merge that changed nothing, or that changed something else than the adapter does."""
    if not report.difference_to_base > 0:  # so that it holds for a difference that is no number
        raise ModelError("the merge did nothing: merged logits equal the base model's (an adapter of zeros, or one that was never applied)")
    if not report.difference_to_adapter <= TOLERANCE:
        raise ModelError(
            f"merged logits differ from the adapter's by {report.difference_to_adapter:.3g}, more than {TOLERANCE}; "
            "nothing was written. Try --dtype fp32"
        )
    if not report.same_text:
        raise ModelError("the merged model's greedy text differs from the adapter's; nothing was written. Try --dtype fp32")


def _without_adapters(model: VisionLanguageModel, probes: Sequence[Conversation]) -> torch.Tensor:
    for tuner in model.adapters.values():
        tuner.disable_adapter_layers()
    logits, _ = observe(model, probes)
    for tuner in model.adapters.values():
        tuner.enable_adapter_layers()
    return logits


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def probe_rows(path: Path, model: VisionLanguageModel) -> list[Conversation]:
    """Rows to compare models by: of the run's own data where it can be read, else a blank image and a question."""
    for folder in (path, *path.parents):
        if (folder / "recipe.yaml").is_file():
            try:
                recipe = load_recipe(folder / "recipe.yaml").resolved_stages()[-1][1]
                rows = list(islice(conversations(recipe.data, recipe.data.validation or recipe.data.train, recipe.seed), PROBED))
            except Exception as error:  # the data may have moved since; a merge does not need it
                if isinstance(error, RecipeError):
                    raise
                break
            if rows:
                return rows[:: max(len(rows) // PROBES, 1)][:PROBES]
            break
    return [plain_probe(model)]


def plain_probe(model: VisionLanguageModel) -> Conversation:
    """A question about an image of one colour."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (model.tower.image_size, model.tower.image_size), (180, 60, 60)).save(buffer, format="PNG")
    question = Message("user", (Media(buffer.getvalue()), "What does the image show?"))
    return Conversation("probe", (question, Message("assistant", ("a red square",))))


@torch.inference_mode()
def observe(model: VisionLanguageModel, rows: Sequence[Conversation]) -> tuple[torch.Tensor, list[str]]:
    """What a model does with rows: logits of their supervised tokens (fp32, flat), and its greedy answers."""
    model.eval()
    examples = [example for row in rows for example in model.processor.examples(row)]
    found: list[torch.Tensor] = []
    for example in examples:
        batch = collate([example], model.processor.spec, fetch=model.processor.images).to(model.device)
        embeds: Any = model.embed(batch)
        found.append(model.llm.supervised_logits(embeds, batch).float().flatten())
    texts = model.answers(model.processor.prompts(rows), Decoding(16), fetch=model.processor.images)
    return torch.cat(found), texts


def model_card(model: VisionLanguageModel, report: MergeReport) -> str:
    """The README of a merged folder."""
    section = model.config.model
    return f"""---
library_name: vlm_tune
pipeline_tag: image-text-to-text
base_model: {section.llm.name or "none"}
---

A vision-language model merged by vlm_tune {_version()}.

- tower: {section.tower.kind} {getattr(section.tower, "name", None) or "(from scratch)"}
- connector: {section.connector.kind}
- language model: {report.base}
- merged: LoRA on {", ".join(report.parts)}; merged logits differ from the adapter's by at most {report.difference_to_adapter:.2g}

```python
from vlm_tune import VisionLanguageModel

folder = "{report.output}"
vlm = VisionLanguageModel.from_pretrained(folder)
print(vlm.chat("What does the image show?", images=["image.png"]))
```
"""


def _version() -> str:
    from vlm_tune import __version__

    return __version__
