"""Writes models in the layouts of other libraries, and proves that these compute the same with them."""

from __future__ import annotations

from pathlib import Path

from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import ModelError
from vlm_tune.exporting.gguf.export import export_gguf, gguf_reasons
from vlm_tune.exporting.hf_llava import export_llava
from vlm_tune.exporting.llava_layout import llava_reasons
from vlm_tune.exporting.peft_adapter import adapter_reasons, export_adapter
from vlm_tune.exporting.source import ExportReport
from vlm_tune.model.base_places import AS_SAVED, BaseChoice
from vlm_tune.model.build import planned_config
from vlm_tune.precision import dtype_name
from vlm_tune.quoting import quoted

FORMATS = ("llava", "adapter", "gguf")

__all__ = ["FORMATS", "ExportReport", "export", "possible_exports"]


def export(
    path: Path,
    output: Path,
    *,
    format: str = "llava",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    base: BaseChoice = AS_SAVED,
) -> ExportReport:
    """Writes a run, a checkpoint or a merged folder as a `LlavaForConditionalGeneration` that plain transformers opens.

    With `format="adapter"` it is the LLM's adapter as a PEFT folder, with the connector and the tower's changes beside it;
    with `format="gguf"` the two files that llama.cpp reads, whose `dtype` may also be q8_0.
    Adapters are merged on the way, verified as by `merge`; where no `dtype` is given it is the merge's, or the model's
    own. What is written is opened before it gets its name, the LLaVA and the GGUF's language model by transformers alone:
    it must give the same token ids and greedy text, and logits within 1e-5 of the largest (2e-2 for a LLaVA in 16 bit).
    Raises `ModelError` for a model that the format can't express, an output that exists, too little memory or disk, and a
    failed verification; nothing is left then.
    """
    path = Path(path)
    output = Path(output)
    if format not in FORMATS:
        raise ModelError(f"format: there is no {quoted(format)}; there are {', '.join(FORMATS)}")
    dtype = dtype if format == "gguf" and dtype == "q8_0" else dtype_name(dtype)
    if format == "llava":
        return export_llava(path, output, dtype, max_shard_size, verify, base)
    if format == "adapter":
        return export_adapter(path, output, dtype, verify, base)
    return export_gguf(path, output, dtype, verify, base)


def possible_exports(recipe: Recipe) -> dict[str, str | None]:
    """By format why the model that a recipe trains could not be exported so; None where it could.

    Only configs are read, and a tokenizer's fitness for GGUF is left to the export. Raises `ModelError` for a config that
    can't be read.
    """
    config, text = planned_config(recipe)
    decoder = text if config.llm.kind == "causal" else None
    virtual = any(
        rule.how in ("prompt", "prefix")
        for _, stage in recipe.resolved_stages()
        for rule in stage.tune
    )
    prompt = ["a soft prompt (how: prompt or prefix) has no place there"] if virtual else []
    reasons = {
        "llava": prompt + llava_reasons(config, decoder),
        "adapter": prompt + adapter_reasons(recipe, config),
        "gguf": prompt + gguf_reasons(config, decoder),
    }
    return {name: "; ".join(found) or None for name, found in reasons.items()}
