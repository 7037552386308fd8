"""Writes and reads GGUF files, tensor by tensor, in the types that llama.cpp computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
"""GGUF's name for each precision of a recipe."""
WIDTHS = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Bytes per weight."""
BLOCK = 32
"""Number of consecutive weights of a row that share a scale in q8_0."""


def check_gguf() -> None:
    """Raises `ModelError` where the package gguf is missing."""
    if find_spec("gguf") is None:
        raise ModelError("GGUF needs the package gguf: pip install 'vlm_tune[gguf]'")


def tensor_type(name: str, tensor: torch.Tensor, dtype: str) -> GGMLQuantizationType:
    """The type that a tensor is stored in.

    llama.cpp expects norms, biases, positions and most patch kernels in fp32.
    """
    from gguf import GGMLQuantizationType

    if tensor.dim() == 1 or "position_embd" in name:
        return GGMLQuantizationType.F32
    # llama.cpp transposes Gemma 3's matrix before it multiplies, which it does for these two alone.
    if tensor.dim() > 2 or name == "mm.input_projection.weight":
        return GGMLQuantizationType.F16 if dtype == "fp16" else GGMLQuantizationType.F32
    if dtype == "q8_0" and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[TYPES[dtype].upper()]


def _stored(tensor: torch.Tensor, kind: GGMLQuantizationType) -> Any:
    from gguf import quants

    return quants.quantize(tensor.detach().float().cpu().contiguous().numpy(), kind)


def as_stored(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor in fp32, rounded as it would be stored."""
    from gguf import quants

    kind = tensor_type(name, tensor, dtype)
    return torch.from_numpy(quants.dequantize(_stored(tensor, kind), kind)).view(tensor.shape)


def write_gguf(
    path: Path,
    architecture: str,
    describe: Callable[[GGUFWriter], None],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
) -> None:
    """Writes a file of tensors in `dtype` with the metadata that `describe` adds."""
    import numpy as np
    from gguf import GGUFWriter, LlamaFileType
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(path, architecture)
    describe(writer)
    writer.add_file_type(
        LlamaFileType[f"{'ALL' if dtype == 'fp32' else 'MOSTLY'}_{TYPES[dtype].upper()}"]
    )
    writer.add_quantization_version(2)
    entries = [(name, tensor, tensor_type(name, tensor, dtype)) for name, tensor in tensors]
    for name, tensor, kind in entries:
        shape = quant_shape_to_byte_shape(tuple(tensor.shape), kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, kind in entries:
            writer.write_tensor_data(_stored(tensor, kind).view(np.uint8))
    finally:
        writer.close()


def read_fields(path: Path) -> dict[str, Any]:
    """A file's metadata by key."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def read_tensors(path: Path, only: str | None = None) -> dict[str, torch.Tensor]:
    """A file's tensors by name, in fp32; with `only`, just the one of that name."""
    from gguf import GGUFReader, quants

    return {
        tensor.name: torch.from_numpy(
            quants.dequantize(tensor.data, tensor.tensor_type).copy()
        ).float()
        for tensor in GGUFReader(path).tensors
        if only in (None, tensor.name)
    }
