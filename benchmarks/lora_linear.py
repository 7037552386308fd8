"""PEFT's LoRA layers against the fused ones: one decoder block's linear layers, both passes.

Run: python -m benchmarks.lora_linear

Shapes are SmolLM2-135M's. Passes are interleaved and medians compared, so that a busy machine slows
all alike. The GEMM rate counts useful work only: per token, 4 operations for each frozen weight
(outputs, and gradients of inputs) and 6 for each adapter weight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraModel
from torch import nn

from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections
from vlm_tune.train.allocator import keep_freed_memory

BLOCK = {
    "q_proj": (0, 0),
    "k_proj": (0, 1),
    "v_proj": (0, 1),
    "o_proj": (0, 0),
    "gate_proj": (0, 2),
    "up_proj": (0, 2),
    "down_proj": (2, 0),
}
"""Layers of a block, with the indices of their input and output widths."""


class Block(nn.ModuleDict):
    """The linear layers of a decoder block, with inputs of the right shapes and nothing between."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__(
            {
                name: nn.Linear(widths[read], widths[written], bias=False)
                for name, (read, written) in BLOCK.items()
            }
        )

    def forward(
        self, normed: torch.Tensor, mixed: torch.Tensor, inner: torch.Tensor
    ) -> list[torch.Tensor]:
        """Outputs of all layers for inputs [B, L, d], [B, L, d] and [B, L, f]."""
        inputs = [normed, normed, normed, mixed, mixed, mixed, inner]
        return [layer(x) for layer, x in zip(self.values(), inputs, strict=True)]


def block(kind: str, widths: tuple[int, int, int], rank: int, dtype: torch.dtype) -> nn.Module:
    """A block with LoRA on every layer.

    `kind` is peft, fused (layer by layer) or merged (projections too).
    """
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(BLOCK))
    if kind != "peft":
        config._register_custom_module({nn.Linear: LoraLinear})
    model = Block(widths)
    LoraModel(model, {"default": config}, "default")
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data.to(dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if kind == "merged":
        merge_projections(model)
    return model


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm(
    widths: tuple[int, int, int], tokens: int, dtype: torch.dtype, device: str
) -> Callable[[], float]:
    """A function that runs a plain GEMM of the block's largest shape and returns its operations."""
    rows = torch.randn(tokens, widths[0], dtype=dtype, device=device)
    weight = torch.randn(2 * widths[2], widths[0], dtype=dtype, device=device)

    def work() -> float:
        torch.mm(rows, weight.t())
        return 2.0 * tokens * weight.numel()

    return work


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--kv-width", type=int, default=192)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument(
        "--plain-malloc", action="store_true", help="leave the C allocator as it is"
    )
    options = parser.parse_args()
    if not options.plain_malloc:
        keep_freed_memory()
    widths = (options.width, options.kv_width, options.inner)
    dtype = torch.bfloat16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ["peft", "fused", "merged"]
    models = {kind: block(kind, widths, options.rank, dtype).to(device) for kind in kinds}
    merge_projections(models["merged"])
    shape = (8, options.tokens // 8)
    inputs = [
        torch.randn(*shape, width, dtype=dtype, device=device).requires_grad_()
        for width in (options.width, options.width, options.inner)
    ]
    outputs = [
        torch.randn(*shape, widths[written], dtype=dtype, device=device)
        for _, written in BLOCK.values()
    ]

    def work(model: nn.Module) -> None:
        with (
            torch.autocast(device, torch.bfloat16),
            disable_input_dtype_casting(model, active=True),
        ):
            block_outputs = model(*inputs)
        torch.autograd.backward(block_outputs, outputs)
        for leaf in (*inputs, *model.parameters()):
            leaf.grad = None

    plain = gemm(widths, options.tokens, dtype, device)
    seconds: dict[str, list[float]] = {kind: [] for kind in (*kinds, "gemm")}
    for place in range(options.repeat + 3):
        for kind in kinds:
            elapsed = timed(lambda kind=kind: work(models[kind]))
            if place >= 3:
                seconds[kind].append(elapsed)
        if place >= 3:
            seconds["gemm"].append(timed(plain))
    rate = plain() / statistics.median(seconds["gemm"])
    frozen = sum(widths[read] * widths[written] for read, written in BLOCK.values())
    low = sum(options.rank * (widths[read] + widths[written]) for read, written in BLOCK.values())
    useful = options.tokens * (4 * frozen + 6 * low)
    print(
        f"{options.tokens} tokens, widths {widths}, r={options.rank}, bf16; GEMM {rate / 1e12:.2f} "
        f"TFLOP/s, {torch.get_num_threads()} threads"
    )
    print(f"{'':8} {'ms':>8} {'x PEFT':>8} {'of GEMM':>8}")
    for kind in kinds:
        middle = statistics.median(seconds[kind])
        ratio = statistics.median(
            one / other for one, other in zip(seconds["peft"], seconds[kind], strict=True)
        )
        print(f"{kind:8} {middle * 1e3:8.2f} {ratio:8.2f} {useful / middle / rate:8.1%}")


if __name__ == "__main__":
    main()
