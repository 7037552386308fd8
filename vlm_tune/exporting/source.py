"""Shared by all exports: the merged model, checks of memory and disk, and comparison of answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm_tune.data.types import Conversation
from vlm_tune.errors import ModelError
from vlm_tune.exporting.merge import merged_model
from vlm_tune.exporting.verify import TOLERANCE, observe, plain_probe, probe_rows
from vlm_tune.model.base_places import BaseChoice
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.committed_folders import commit_folder
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.pretrained.language_model import llm_config
from vlm_tune.model.pretrained.tokenizer import load_tokenizer
from vlm_tune.model.restoring import ADAPTERS, PROMPT
from vlm_tune.model.vision.registry import build_tower
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters
from vlm_tune.paths import writing
from vlm_tune.precision import DTYPES

EXACT = 1e-5
"""Allowed difference of an fp32 export's logits, relative to the largest logit if over 1."""


@dataclass(frozen=True)
class ExportReport:
    """The figures of an export, and how its logits compare with the model's.

    `difference` is the largest absolute difference over `rows` rows, None if not verified; at most
    `allowed` was accepted.
    """

    output: str
    format: str
    dtype: str
    merged: list[str]
    parameters: int
    difference: float | None
    same_text: bool | None
    notes: list[str] = field(default_factory=list)
    """Where the program that reads the format deviates from how the model was trained."""
    rows: int = 0
    allowed: float | None = None


@dataclass(frozen=True)
class Expected:
    """A model's fp32 logits [S, V] for the supervised tokens of probe rows, and greedy answers."""

    rows: list[Conversation]
    logits: torch.Tensor
    texts: list[str]

    def tolerance(self, dtype: str) -> float:
        """The allowed difference of an export's logits from these."""
        return EXACT * max(1.0, float(self.logits.abs().max())) if dtype == "fp32" else TOLERANCE


def whole_model(
    path: Path, source: Path, output: Path, dtype: str | None, base: BaseChoice
) -> tuple[VisionLanguageNetwork, list[str]]:
    """The model without adapters or quantised weights, and the parts whose adapter was merged.

    Its weights are in 16 bit or fp32.
    """
    if any((source / name).is_dir() for name in ADAPTERS.values()):
        model, report = merged_model(path, output, dtype, base=base)
        return model, report.parts
    model = load_model(source, dtype=DTYPES[dtype] if dtype else None, quantize=False, base=base)
    model.config = model.config.model_copy(update={"precision": dtype or model.config.precision})
    return model, []


def commit_export(output: Path, write: Callable[[Path], tuple[ExportReport, str]]) -> ExportReport:
    """Writes an output folder: the files of `write`, its report and its card.

    If `write` raises, no folder is left.
    """
    reports: list[ExportReport] = []

    def make(folder: Path) -> None:
        report, card = write(folder)
        (folder / "export.json").write_text(json.dumps(asdict(report), indent=1))
        (folder / "README.md").write_text(card)
        reports.append(report)

    with writing(output, "the export"):
        commit_folder(output, make)
    return reports[0]


# --- room -----------------------------------------------------------------------------------------


def check_room(parameters: int, output: Path, width: float, copies: float) -> None:
    """Raises `ModelError` if an export does not fit on disk or in memory.

    Args:
        parameters: number of parameters.
        output: the folder whose disk is checked.
        width: bytes per parameter in the export.
        copies: number of fp32 copies in memory beside it.
    """
    disk = int(parameters * width)
    memory = int(parameters * (4 * copies + width))
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if disk > free:
        raise ModelError(
            f"{output}: the export takes {_size(disk)} of disk, {_size(free)} are free; nothing "
            "was started"
        )
    available = available_memory()
    if memory > available:
        raise ModelError(
            f"the export takes {_size(memory)} of memory, {_size(available)} are free; nothing "
            "was started"
        )


def available_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def text_config(source: Path, config: VisionLanguageConfig) -> Any:
    """transformers' config of a saved model's LLM. Raises `ModelError` if it can't be read."""
    folder = source / "llm"
    text = llm_config(config.llm, folder if folder.is_dir() else None)
    if config.llm.words:
        text.vocab_size = max(text.vocab_size, len(load_tokenizer(config.llm, source)))
    return text


def count_parameters(text: Any, config: VisionLanguageConfig) -> int:
    """The number of a model's parameters without adapters, from configs alone."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    factory = AutoModelForSeq2SeqLM if text.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        language = factory.from_config(text)
        tower = build_tower(config.model.tower, config.tower_rebuild)
        connector = build_connector(
            config.model.connector,
            tower.measure()[1],
            language.get_input_embeddings().embedding_dim,
        )
    return sum(
        parameter.numel()
        for part in (language, tower, connector)
        for parameter in part.parameters()
    )


def check_prompt(source: Path) -> None:
    """Raises `ModelError` for a soft prompt or prefix, which other formats have no place for."""
    if (source / PROMPT).is_dir():
        raise ModelError(
            f"{source} has a soft prompt (how: prompt or prefix), which can't be exported; "
            "nothing was started"
        )


# --- answers --------------------------------------------------------------------------------------


def expected_of(
    path: Path,
    model: VisionLanguageNetwork,
    comparable: Callable[[Conversation], Conversation | None] | None = None,
) -> Expected:
    """The model's logits and answers for probe rows, computed in fp32 with its current weights.

    `comparable` gives what is compared of a row, if anything; by default it is the row.
    """
    cast_parameters(model, torch.float32)
    controls = model.processor.encoder.controls_in
    # Rows whose text spells a control token are left out: a plain tokenizer makes it that token,
    # ours keeps it as text, so ids may differ.
    rows = [
        row
        for row in map(model.processor.shown, probe_rows(path, model))
        if not any(
            controls(part) for m in row.messages for part in m.parts if isinstance(part, str)
        )
    ]
    if comparable is not None:
        rows = [cut for row in rows if (cut := comparable(row)) is not None]
    rows = rows or [plain_probe(model)]
    logits, texts = observe(model, rows)
    return Expected(
        rows,
        logits.unflatten(0, (-1, model.llm.head.weight.shape[0])),  # type: ignore[union-attr]
        texts,
    )


def check_answers(
    expected: Expected, logits: torch.Tensor, texts: list[str], tolerance: float
) -> float:
    """The largest difference of an export's logits [S, V] from the model's.

    Raises `ModelError` if it is over `tolerance`, or if `texts` differ from the model's answers.
    """
    difference = float((logits - expected.logits).abs().max())
    if not difference <= tolerance:
        raise ModelError(
            f"the exported model's logits differ from the model's by {difference:.3g}, more than "
            f"{tolerance:.2g}; nothing was written"
        )
    if texts != expected.texts:
        odd = next(
            place
            for place, pair in enumerate(zip(texts, expected.texts, strict=True))
            if pair[0] != pair[1]
        )
        raise ModelError(
            f"the exported model answers {expected.rows[odd].id} with {texts[odd]!r}, the model "
            f"with {expected.texts[odd]!r}; nothing was written"
        )
    return difference


def check_ids(row: Conversation, model_ids: Sequence[int], export_ids: Sequence[int]) -> None:
    """Raises `ModelError` if an export's token ids differ from the model's."""
    if list(model_ids) != list(export_ids):
        place = next(
            (n for n, (a, b) in enumerate(zip(model_ids, export_ids, strict=False)) if a != b),
            min(len(model_ids), len(export_ids)),
        )
        raise ModelError(
            f"the chat template gives other token ids for {row.id} than the model was trained "
            f"with, from position {place}: {list(export_ids[place : place + 4])}, expected "
            f"{list(model_ids[place : place + 4])}; nothing was written"
        )
