"""Exports models to the layouts of other libraries, and verifies that these compute the same."""

from __future__ import annotations

from pathlib import Path

from vlm_tune.config.model import NativeSection
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import ModelError
from vlm_tune.exporting.gguf.export import export_gguf, gguf_reasons
from vlm_tune.exporting.hf_export import export_transformers, transformers_reasons
from vlm_tune.exporting.native_model import export_native
from vlm_tune.exporting.peft_adapter import adapter_reasons, export_adapter
from vlm_tune.exporting.source import ExportReport
from vlm_tune.model.base_places import BaseArgument, base_choice
from vlm_tune.model.build import planned_config
from vlm_tune.model.checkpoint import find_single
from vlm_tune.model.restoring import read_config
from vlm_tune.paths import check_path
from vlm_tune.precision import dtype_name
from vlm_tune.quoting import quoted

FORMATS = ("transformers", "adapter", "gguf")

__all__ = ["FORMATS", "ExportReport", "export", "possible_exports"]


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "transformers",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    task: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
) -> ExportReport:
    """Exports a run, a checkpoint or a merged folder for another library.

    - `format="transformers"`: a model that plain transformers opens, of the class that it started
      from (BLIP-2, InstructBLIP, LLaVA-NeXT, LLaVA-OneVision, Idefics3, SmolVLM, InternVL, Gemma 3,
      PaliGemma, `kind: native`), or else a `LlavaForConditionalGeneration`.
    - `format="adapter"`: the LLM's adapter as a PEFT folder, with the connector and the tower's
      changes beside it.
    - `format="gguf"`: the two files that llama.cpp reads.

    For transformers and GGUF, adapters are merged first, with the checks of `merge`. The export is
    opened again before the output folder gets its name, the whole model and the GGUF's language
    model by transformers alone. It must give the same token ids and greedy text, and logits that
    differ by at most 1e-5 of the largest logit (2e-2 absolute for a whole model in 16 bit).

    Args:
        model: a run, a checkpoint or a merged folder.
        output: the folder to write.
        format: "transformers", "adapter" or "gguf".
        dtype: of the exported weights; for GGUF it may also be q8_0. By default the dtype that the
            merge chose, or the model's if nothing is merged.
        max_shard_size: the largest weight file of transformers' format, as its
            `save_pretrained` takes it.
        verify: whether the export is compared with the model.
        task: the task whose model is exported, as in `merge`.
        base: as in `merge`, like `accept_other_base`.

    Raises:
        ModelError: the format can't express the model, the output exists, memory or disk are too
            small, or verification fails. No output is left then.
    """
    check_path("model", model)
    check_path("output", output)
    path = Path(model) if task is None else find_single(Path(model), task)
    output = Path(output)
    choice = base_choice(base, accept_other_base)
    if format not in FORMATS:
        raise ModelError(f"format: {quoted(format)} is not one of {', '.join(FORMATS)}")
    dtype = dtype if format == "gguf" and dtype == "q8_0" else dtype_name(dtype)
    if format == "transformers" and isinstance(
        read_config(find_single(path), choice).model, NativeSection
    ):
        return export_native(path, output, dtype, max_shard_size, verify, choice)
    if format == "transformers":
        return export_transformers(path, output, dtype, max_shard_size, verify, choice)
    if format == "adapter":
        return export_adapter(path, output, dtype, verify, choice)
    return export_gguf(path, output, dtype, verify, choice)


def possible_exports(recipe: Recipe) -> dict[str, str | None]:
    """For each format, why the model that a recipe trains can't be exported; None if it can.

    Only configs are read. Whether the tokenizer fits GGUF is checked by the export itself. Raises
    `ModelError` for a config that can't be read.
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
        "transformers": prompt + transformers_reasons(config, decoder),
        "adapter": prompt + adapter_reasons(recipe, config),
        "gguf": prompt + gguf_reasons(config, decoder),
    }
    return {name: "; ".join(why) or None for name, why in reasons.items()}
