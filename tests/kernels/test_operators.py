"""The operators' names and versions, reasons, and tensors of several devices."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from vlm_tune import kernels
from vlm_tune.kernels import KVCache, interval_attention, linear_cross_entropy, unsupported_reason
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.version import VERSION

FOLDER = Path(kernels.__file__).parent
SOURCES = {1: "784e5c6da27fbeb0"}
"""The checksum of the operators' sources for each version."""


def checksum() -> str:
    """Of all sources that decide what an operator computes."""
    files = [*FOLDER.glob("*.py"), *(FOLDER / "cpu").glob("*.cpp"), *(FOLDER / "cpu").glob("*.h")]
    named = {path.name: path for path in files if path.name not in ("version.py", "__init__.py")}
    text = b"".join(name.encode() + named[name].read_bytes() for name in sorted(named))
    return hashlib.sha256(text).hexdigest()[:16]


def test_changed_sources_have_a_version_of_their_own() -> None:
    """A compiler's cache knows operators by name: raise VERSION and record the checksum here."""
    assert list(SOURCES) == list(range(1, VERSION + 1))
    assert SOURCES[VERSION] == checksum()


def test_operators_are_named_by_their_version() -> None:
    for name in (
        "interval_attention",
        "lora_linear",
        "lora_gated_mlp",
        "linear_cross_entropy",
        "decoder_layer",
    ):
        assert hasattr(torch.ops.vlm_tune, f"{name}_{VERSION}")
        assert name in kernels.__all__


@pytest.mark.usefixtures("kernels")
def test_reasons_name_what_a_kernel_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    half, full, cpu = torch.bfloat16, torch.float32, torch.device("cpu")
    weight = torch.zeros(40, 64, dtype=half)
    assert unsupported_reason("interval_attention", half, cpu, 64) is None
    assert unsupported_reason("lora_linear", half, cpu, 64, [64]) is None
    assert unsupported_reason("lora_gated_mlp", half, cpu, 64, 96) is None
    assert unsupported_reason("linear_cross_entropy", half, weight) is None
    for operator, facts, reason in (
        ("interval_attention", (full, cpu, 64), "in bf16, not torch.float32"),
        ("interval_attention", (half, cpu, 48), "48 wide"),
        ("interval_attention", (half, torch.device("cuda"), 64), "not cuda"),
        ("lora_linear", (half, cpu, 64, [64, 5000]), "5,000 inputs or outputs"),
        ("lora_gated_mlp", (half, cpu, 64, 90), "no multiples of 32"),
        ("lora_gated_mlp", (half, cpu, 4096, 8192), "too large"),
        ("linear_cross_entropy", (half, weight.float()), "weight is torch.float32"),
        ("linear_cross_entropy", (half, torch.zeros(4, 40, dtype=half)), "width 40"),
    ):
        assert reason in str(unsupported_reason(operator, *facts)), (operator, facts)
    monkeypatch.setenv("VLM_TUNE_KERNELS", "reference")
    assert "reference" in str(unsupported_reason("interval_attention", half, cpu, 64))
    assert native.unavailable_reason() == native.kernel_status().reason


def test_tensors_of_several_devices_are_refused() -> None:
    query = torch.zeros(1, 2, 4, 32)
    ends = torch.full((1, 4), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="tensors of one device, got cpu and meta"):
        interval_attention(query, query, query.to("meta"), ends, 1.0)
    with pytest.raises(ValueError, match="tensors of one device, got cpu and meta"):
        linear_cross_entropy(torch.zeros(3, 8), torch.zeros(5, 8), ends[0, :3].long().to("meta"))


def test_numbers_of_another_type_are_refused() -> None:
    query = torch.zeros(1, 2, 4, 32)
    ends = torch.full((1, 4), 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"visible_until is int32, got torch\.int64"):
        interval_attention(query, query, query, ends, 1.0)
    with pytest.raises(TypeError, match=r"targets are int64, got torch\.int32"):
        linear_cross_entropy(torch.zeros(4, 8), torch.zeros(5, 8), ends[0].int())


@pytest.mark.usefixtures("kernels")
def test_targets_that_are_not_contiguous_are_read_as_they_are() -> None:
    hidden = torch.randn(64, 64).bfloat16()
    weight = torch.randn(50, 64).bfloat16()
    wide = torch.randint(0, 50, (64, 3))
    wanted = linear_cross_entropy(hidden, weight, wide[:, 1].contiguous())
    assert torch.equal(linear_cross_entropy(hidden, weight, wide[:, 1]), wanted)


def test_a_cache_that_is_no_longer_in_use_is_refused() -> None:
    query = torch.zeros(1, 2, 4, 32)
    ends = torch.full((1, 4), 4, dtype=torch.int32)
    handle = KVCache().handle
    with pytest.raises(KeyError):
        interval_attention(query, query, query, ends, 1.0, handle)


def test_caches_of_two_generations_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randn(1, 2, length, 32, generator=generator)

    ends = torch.full((1, 4), 4, dtype=torch.int32)
    caches = [KVCache(), KVCache()]
    rows = [[draw(4) for _ in range(3)] for _ in caches]
    for cache, row in zip(caches, rows, strict=True):
        interval_attention(*row, ends, 1.0, cache.handle)
        cache.branch(torch.ones(1, 1, 4, dtype=torch.bool))
    step = [draw(1) for _ in range(3)]
    both = [interval_attention(*step, ends[:, :1], 1.0, cache.handle)[0] for cache in caches]
    for output, (_, keys, values) in zip(both, rows, strict=True):
        scores = step[0] @ torch.cat([keys, step[1]], 2).transpose(2, 3)
        wanted = scores.softmax(-1) @ torch.cat([values, step[2]], 2)
        assert torch.allclose(output.transpose(1, 2), wanted, atol=1e-5)


def test_attention_in_fp16_has_a_score_for_what_is_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.full((1, 40), 40, dtype=torch.int32)
    ends[0, 10:20] = 20
    ends[0, 35:] = 0
    outputs = {}
    drawn = [torch.randn(1, 2, 40, 32, generator=generator) for _ in range(3)]
    for dtype in (torch.float32, torch.float16):
        inputs = [each.to(dtype, copy=True).requires_grad_() for each in drawn]
        out, _ = interval_attention(*inputs, ends, 0.2)
        out.sum().backward()
        outputs[dtype] = [out.detach(), *(each.grad for each in inputs if each.grad is not None)]
    for half, whole in zip(outputs[torch.float16], outputs[torch.float32], strict=True):
        assert torch.allclose(half.float(), whole, atol=2e-2)
