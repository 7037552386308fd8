"""Public benchmarks whose local copies are read and scored by their own rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError, Problem, RecipeError
from vlm_tune.evaluation.benchmarks.chartqa import CHARTQA
from vlm_tune.evaluation.benchmarks.mmbench import MMBENCH
from vlm_tune.evaluation.benchmarks.pope import POPE
from vlm_tune.evaluation.benchmarks.rows import Benchmark
from vlm_tune.evaluation.benchmarks.scienceqa import SCIENCEQA
from vlm_tune.evaluation.benchmarks.textvqa import TEXTVQA
from vlm_tune.quoting import quoted

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (POPE, MMBENCH, SCIENCEQA, TEXTVQA, CHARTQA)
}


def read_benchmarks(copies: str | Sequence[str]) -> list[Conversation]:
    """The rows of local copies, or of one, each written as `name=path`.

    Raises `RecipeError` for a copy that is not written so or of no benchmark, and `DataError` for
    one that can't be used or has no rows.
    """
    rows: list[Conversation] = []
    listed = copies if isinstance(copies, list | tuple) else [copies]
    for copy in listed:
        name, equals, path = str(copy).partition("=")
        if name not in BENCHMARKS or not equals or not path:
            known = ", ".join(BENCHMARKS)
            message = f"expected NAME=PATH with a name of {known}, got {quoted(copy)}"
            raise RecipeError([Problem("--benchmark", message)])
        read = BENCHMARKS[name].read(Path(path).expanduser())
        if not read:
            raise DataError(f"this copy of {name} has no rows", source=path)
        rows += read
    return rows
