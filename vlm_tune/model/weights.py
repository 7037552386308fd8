"""Reading and writing weights: safetensors only, checked against the file's size before memory is taken."""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.errors import ModelError
from vlm_tune.paths import is_file, shown_path
from vlm_tune.quoting import reason_of

MAX_HEADER = 100_000_000


def check_safetensors(path: Path) -> dict[str, Any]:
    """The file's header. Raises `ModelError` if the file is missing, cut, or its header can't be true."""
    if not is_file(path):
        raise ModelError(f"{shown_path(path)}: no such weights file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ModelError(
                f"{path}: not a whole safetensors file ({size:,} bytes, header of {length:,})"
            )
        try:
            header = json.loads(file.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
            end = int(max(ends, default=0))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ModelError(f"{path}: its safetensors header can't be read") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path}: holds {size:,} bytes, its header promises {8 + length + end:,}; the file was cut or changed"
        )
    return header


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file on the CPU. Raises `ModelError` as `check_safetensors`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: {reason_of(error)}") from None


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors to a file; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    written = {}
    seen = set()
    for name, value in tensors.items():
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        # Copied only where it must be: a thread that writes beside training should not keep the cores busy.
        alone = (
            storage.data_ptr() not in seen and storage.nbytes() == own.numel() * own.element_size()
        )
        seen.add(storage.data_ptr())
        written[name] = own if alone else own.clone()
    save_file(written, path, metadata={"format": "pt"})


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor whole on the CPU; of one that processes hold in shares (ZeRO-3, FSDP) every one of them must ask for it."""
    held: Any = value
    if hasattr(held, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([held]):
            return value.detach().cpu().clone()
    if hasattr(held, "full_tensor"):
        # Offloaded shares are gathered where the processes can talk to each other.
        return held.detach().to(held.device_mesh.device_type).full_tensor().cpu()
    return value.detach().cpu()


def whole_state(
    module: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, torch.Tensor]:
    """The wanted part of a module's state dict; of sharded weights every process must ask, and the first one gets them whole."""
    held: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for name, value in module.state_dict().items():
        if not wanted(name):
            continue
        own = held.get(name, value)
        if not is_sharded(own):
            found[name] = value
            continue
        whole = whole_tensor(own)
        if torch.distributed.get_rank() == 0:
            found[name] = whole
    return found


def is_sharded(value: torch.Tensor) -> bool:
    """Whether processes hold a tensor in shares."""
    return hasattr(value, "ds_id") or hasattr(value, "full_tensor")


def load_into(module: nn.Module, tensors: Mapping[str, torch.Tensor], name: str | Path) -> None:
    """Loads tensors into a module, all of them and nothing else.

    Raises `ModelError` with the lists of missing, unexpected and misshapen tensors.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{key} is {list(tensors[key].shape)}, expected {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & tensors.keys())
        if tensors[key].shape != wanted[key].shape
    ]
    faults = [
        f"{word}: {', '.join(found[:8])}"
        + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        for word, found in (("missing", missing), ("unexpected", extra), ("misshapen", shapes))
        if found
    ]
    if faults:
        raise ModelError(f"{name} does not fit the model; " + "; ".join(faults))
    module.load_state_dict(dict(tensors), strict=True)


def check_folder(folder: Path) -> list[Path]:
    """The weight files of a local transformers folder, checked before they are loaded.

    Raises `ModelError` for cut files, missing shards, and folders that hold pickled weights only.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{index}: not an index of shards") from None
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(f"{folder}: missing shards: {', '.join(missing)}")
        files = [folder / shard for shard in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = (
            f" (found {', '.join(pickled)}: pickled weights are not loaded, convert them to safetensors)"
            if pickled
            else ""
        )
        raise ModelError(f"{folder}: no safetensors weights{hint}")
    for file in files:
        check_safetensors(file)
    return files


def castable(module: nn.Module) -> Iterator[nn.Parameter]:
    """Floating-point parameters that may be in half precision: all but those beside batch statistics."""
    for owner in module.modules():
        if getattr(owner, "running_mean", None) is None:
            yield from (
                parameter
                for parameter in owner.parameters(recurse=False)
                if parameter.dtype.is_floating_point
            )


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts what may be cast, in place. Buffers stay as they are: pixel scales, running statistics and rotary frequencies need fp32."""
    for parameter in castable(module):
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def own_memory(module: nn.Module) -> None:
    """Copies every parameter: as long as one is read from the mapping of its file, all pages that were touched stay in memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


ALIGNMENT = 64
"""Bytes that a tensor's place in a file is a multiple of: rounding may depend on where in a vector register a row begins."""


def page_out(module: nn.Module, folder: Path) -> int:
    """Moves a CPU module's frozen weights to an unnamed temporary file in `folder`; returns the bytes moved.

    The weights are the file's mapping then, with the same values: they take memory again, page by page, only when they are
    read. A write goes to memory and not to the file, which lasts as long as the weights. Raises `OSError` where the file
    can't be written; then nothing has changed.
    """
    parameters = [
        each
        for each in module.parameters()
        if not each.requires_grad and each.is_contiguous() and each.numel()
    ]
    offsets: list[int] = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for parameter in parameters:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offsets.append(file.tell())
            file.write(parameter.data.flatten().view(torch.uint8).numpy().data)
        file.flush()
        if not parameters:
            return 0
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for parameter, offset in zip(parameters, offsets, strict=True):
        mapped = torch.frombuffer(
            mapping, dtype=parameter.dtype, count=parameter.numel(), offset=offset
        )
        parameter.data = mapped.view(parameter.shape)
    return len(mapping)


def fingerprint(module: nn.Module) -> str:
    """sha256 of a module's tensors by name, dtype, shape and bytes."""

    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, value = item
        digest = hashlib.sha256(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # Python lets go of its lock while it hashes
        return hashlib.sha256(
            b"".join(pool.map(one, sorted(module.state_dict().items())))
        ).hexdigest()
