"""Loading and saving weights: safetensors only, checked against the file's size beforehand."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import hashlib
import json
import mmap
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.compat_engines import is_zero3_parameter
from vlm_tune.errors import ModelError
from vlm_tune.paths import is_file, shown_path
from vlm_tune.quoting import reason_of

MAX_HEADER = 100_000_000
CPU = torch.device("cpu")
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
"""A mapping in /proc/self/smaps: its addresses and the inode of its file; its sizes follow."""


def check_safetensors(path: Path) -> dict[str, Any]:
    """Reads and checks a file's header.

    Raises `ModelError` if the file is missing or truncated, or its header is not valid.
    """
    if not is_file(path):
        raise ModelError(f"{shown_path(path)}: no such weights file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ModelError(
                f"{path}: not a complete safetensors file ({size:,} bytes, header of {length:,})"
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
            f"{path}: holds {size:,} bytes, its header promises {8 + length + end:,}; the file "
            "was truncated or changed"
        )
    return header


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Loads all tensors of a file to the CPU. Raises `ModelError` as `check_safetensors` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: {reason_of(error)}") from None


def safetensors_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name, from its header alone.

    Raises `ModelError` as `check_safetensors` does.
    """
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{path}: {reason_of(error)}") from None


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors to a file; tensors that share memory are written separately."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    written = {}
    storages = set()
    for name, value in tensors.items():
        cpu_tensor = value.detach().cpu().contiguous()
        storage = cpu_tensor.untyped_storage()
        # Copied only if necessary: a thread that writes during training should not keep the cores
        # busy.
        alone = (
            storage.data_ptr() not in storages
            and storage.nbytes() == cpu_tensor.numel() * cpu_tensor.element_size()
        )
        storages.add(storage.data_ptr())
        written[name] = cpu_tensor if alone else cpu_tensor.clone()
    save_file(written, path, metadata={"format": "pt"})


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU; one that is sharded (ZeRO-3, FSDP) is gathered.

    Every rank must call this for a sharded tensor.
    """
    tensor: Any = value
    if is_zero3_parameter(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return value.detach().cpu().clone()
    if hasattr(tensor, "full_tensor"):
        # Offloaded shards are gathered on the device on which the ranks can communicate.
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor().cpu()
    return value.detach().cpu()


def whole_state(
    module: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, torch.Tensor]:
    """The entries of a module's state dict whose names are `wanted`.

    Sharded tensors are gathered: every rank must call this, and only rank 0 gets them.
    """
    parameters: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    state = {}
    for name, value in module.state_dict().items():
        if not wanted(name):
            continue
        tensor = parameters.get(name, value)
        if not is_sharded(tensor):
            state[name] = value
            continue
        whole = whole_tensor(tensor)
        if torch.distributed.get_rank() == 0:
            state[name] = whole
    return state


def is_sharded(value: torch.Tensor) -> bool:
    """Whether a tensor is sharded across ranks."""
    return is_zero3_parameter(value) or hasattr(value, "full_tensor")


def load_into(module: nn.Module, tensors: Mapping[str, torch.Tensor], name: str | Path) -> None:
    """Loads tensors into a module; every one must match.

    Raises `ModelError` with the lists of missing, unexpected and misshapen tensors. `name` begins
    the message.
    """
    wanted = module.state_dict()
    shapes = {key: list(tensor.shape) for key, tensor in wanted.items()}
    check_tensors(tensors, shapes, f"{name} does not fit the model")
    module.load_state_dict(dict(tensors), strict=True)


def check_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, list[int]], fault: str
) -> None:
    """Raises `ModelError`, which begins with `fault`, for tensors of other names or shapes."""
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, expected {shapes[key]}"
        for key in shapes.keys() & tensors.keys()
        if list(tensors[key].shape) != shapes[key]
    ]
    missing = shapes.keys() - tensors.keys()
    check_fit(
        fault, missing=missing, unexpected=tensors.keys() - shapes.keys(), misshapen=misshapen
    )


def check_fit(fault: str, **unfit: Iterable[Any]) -> None:
    """Raises `ModelError`, which begins with `fault`, if there are tensors that do not fit.

    `unfit` are their names, or texts about them, by what is wrong with them (`missing`, ...).
    """
    listed = {word: sorted(map(str, entries)) for word, entries in unfit.items()}
    faults = [
        f"{word}: {', '.join(entries[:8])}"
        + (f" and {len(entries) - 8} more" if len(entries) > 8 else "")
        for word, entries in listed.items()
        if entries
    ]
    if faults:
        raise ModelError(f"{fault}; {'; '.join(faults)}")


def check_loading(info: Mapping[str, Any], fault: str) -> None:
    """Checks what transformers' `output_loading_info` gives, as `check_fit`."""
    check_fit(
        fault,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        misshapen=info["mismatched_keys"],
    )


def check_folder(folder: Path) -> list[Path]:
    """The weight files of a local transformers folder, whose headers are checked.

    Raises `ModelError` for truncated files, missing shards, and folders with pickled weights only.
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
            f" (found {', '.join(pickled)}: pickled weights are not loaded, "
            "convert them to safetensors)"
            if pickled
            else ""
        )
        raise ModelError(f"{folder}: no safetensors weights{hint}")
    for file in files:
        check_safetensors(file)
    return files


def count_of(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter; bitsandbytes packs two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def castable(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the floating-point parameters that may be in half precision.

    These are all but those of layers with batch statistics.
    """
    for owner in module.modules():
        if getattr(owner, "running_mean", None) is None:
            yield from (
                parameter
                for parameter in owner.parameters(recurse=False)
                if parameter.dtype.is_floating_point
            )


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters that `castable` yields, in place.

    Buffers keep their dtype: pixel scales, running statistics and rotary frequencies need fp32.
    """
    for parameter in castable(module):
        parameter.data = parameter.data.to(dtype)


RELEASED = 64_000_000
"""Bytes of weights from which on the pages that they are mapped to are released.

Finding them takes a tenth of a second in a process with thousands of mappings.
"""


@torch.no_grad()
def own_memory(module: nn.Module) -> None:
    """Copies every parameter on the CPU to anonymous memory.

    While one parameter is still a mapping of its file, the file's touched pages stay in memory, so
    they are released on the way.
    """
    copied = 0
    for parameter in module.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
            copied += parameter.nbytes
            if copied > RELEASED:
                release_mapped(module)
                copied = 0


def release_mapped(module: nn.Module) -> None:
    """Releases the memory of a module's weights that are mapped from files.

    Their pages are read from the file again when they are touched. A mapping of which a page was
    written stays as it is, as do small modules, and all where the system has no `/proc/self/smaps`.
    """
    if sum(parameter.nbytes for parameter in module.parameters()) < RELEASED:
        return
    places = sorted(
        parameter.data_ptr() for parameter in module.parameters() if parameter.device.type == "cpu"
    )
    libc = ctypes.CDLL(None)
    for start, end in _unwritten_files():
        first = bisect.bisect_left(places, start)
        if first < len(places) and places[first] < end:
            libc.madvise(
                ctypes.c_void_p(start),
                ctypes.c_size_t(end - start),
                ctypes.c_int(mmap.MADV_DONTNEED),
            )


def _unwritten_files() -> Iterator[tuple[int, int]]:
    """The address ranges of this process's mapped files of which no page was written."""
    span: tuple[int, int] | None = None
    with contextlib.suppress(OSError), open("/proc/self/smaps", errors="replace") as lines:
        for line in lines:
            if match := MAPPING.match(line):
                span = (int(match[1], 16), int(match[2], 16)) if match[3] != "0" else None
            elif span is not None and line.startswith("Anonymous:"):
                if line.split()[1] == "0":
                    yield span
                span = None


ALIGNMENT = 64
"""Alignment of tensors in a file, in bytes.

Rounding may depend on where in a vector register a row begins.
"""


def page_out(module: nn.Module, folder: Path) -> int:
    """Moves a CPU module's frozen weights to an unnamed temporary file in `folder`.

    The weights are then a mapping of the file with the same values, and take memory again, page by
    page, only when they are read. A write goes to memory and not to the file, which exists as long
    as the weights.

    Returns:
        The number of bytes moved.

    Raises:
        OSError: the file can't be written; the module is unchanged.
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
    """The sha256 of a module's tensors: their names, dtypes, shapes and bytes."""

    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, value = item
        digest = hashlib.sha256(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return hashlib.sha256(
            b"".join(pool.map(one, sorted(module.state_dict().items())))
        ).hexdigest()
