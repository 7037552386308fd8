"""The preparation job of one part of a stage: its sources and all that its examples depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vlm_tune.config.data import SHARES, Clean, DataSection, DatasetSource, Source
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.sources.base import SourceReader
from vlm_tune.data.sources.registry import open_source

FORMAT = 10
"""Version of the prepared data; increased when the same input gives other prepared data."""

KEY_PARTS = {"max_length", "overlong", "clean", "group", "row_length", "split"}
"""Fields of the data section that enter the key; sources and templates are added separately."""

PartName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Job:
    """A part's sources, each with a reader and a processor for its template and system text."""

    part: PartName
    data: DataSection
    sources: Sequence[Source]
    readers: Sequence[SourceReader]
    processors: Sequence[Processor]
    seed: int
    parts: np.ndarray | None = None
    """The part that each row is held out for, if decided before few-shot examples were drawn."""

    @property
    def scored(self) -> bool:
        """Whether the rows are generated for and scored, not trained on."""
        return self.part != "train"

    @property
    def layout(self) -> Literal["causal", "seq2seq"]:
        """The layout of examples."""
        return self.processors[0].spec.layout

    @property
    def key(self) -> str:
        """A hash of everything the prepared examples depend on; the name of their folder."""
        options = self.data.model_dump(mode="json", include=KEY_PARTS)
        parts = [f"{FORMAT} {self.seed} {self.scored} {json.dumps(options, sort_keys=True)}"]
        for source, reader, processor in zip(
            self.sources, self.readers, self.processors, strict=True
        ):
            unused = SHARES if isinstance(source, DatasetSource) else SHARES | {"name"}
            parts += [
                source.model_dump_json(exclude=unused),
                reader.fingerprint(),
                processor.fingerprint(),
            ]
        if self.parts is not None:
            parts.append(hashlib.sha256(self.parts.tobytes()).hexdigest())
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def plan_job(
    data: DataSection, sources: Sequence[Source], processor: Processor, *, seed: int, part: PartName
) -> Job:
    """Makes a part's job. Raises `DataError` if a source or template cannot be opened."""
    readers = [open_source(source, seed=seed) for source in sources]
    bounded = replace(processor, spec=replace(processor.spec, max_length=data.max_length))
    processors = [
        bounded.variant(source.template, source.system, source.enable_thinking)
        for source in sources
    ]
    return Job(part, part_section(data, part), sources, readers, processors, seed)


def task_names(sources: Sequence[Source]) -> list[str]:
    """The task of each source, by which its rows are scored; by default the source's name."""
    names = _source_names(sources)
    return [source.task_name or name for source, name in zip(sources, names, strict=True)]


def distinct_tasks(sources: Sequence[Source]) -> list[str]:
    """The tasks of sources, each once, in order of first use."""
    return list(dict.fromkeys(task_names(sources)))


def _source_names(sources: Sequence[Source]) -> list[str]:
    """The name of each source.

    It is the recipe's name, else that of the source's file or folder; equal names are replaced by
    longer ones.
    """
    options = [source.model_dump() for source in sources]
    names = [each.get("name") or _path_name(each.get("path", each["kind"])) for each in options]
    longer = [
        f"{name}:{each['split']}" if "split" in each else each["name"] or each["path"]
        for each, name in zip(options, names, strict=True)
    ]
    return [
        name if names.count(name) == 1 else other for name, other in zip(names, longer, strict=True)
    ]


def _path_name(path: str) -> str:
    """A file's stem or a folder's name; a glob pattern unchanged."""
    return path if any(sign in path for sign in "*?[") else Path(path).resolve().stem


def part_section(data: DataSection, part: PartName) -> DataSection:
    """The data section for a part: rows to score are not cleaned, split, joined or shortened."""
    if part == "train":
        return data
    overlong = "fail" if data.overlong == "fail" else "drop"
    return data.model_copy(
        update={"split": None, "group": "none", "clean": Clean(), "overlong": overlong}
    )
