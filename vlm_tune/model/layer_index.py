"""The blocks of a part, from the input up: what `layers` counts and learning rates decay along."""

from __future__ import annotations

from torch import nn

from vlm_tune.errors import ModelError
from vlm_tune.model.vision.registry import PairVision

Depths = dict[str, int]
"""By a parameter's name: how many steps it lies under the top of its part; the last block's are at 1, what follows it at 0."""


def columns(part: nn.Module) -> dict[str, nn.Module]:
    """What a part's blocks are counted in, by the prefix of its names: each of two towers side by side, or the part itself."""
    return (
        {f"towers.{name}.": tower for name, tower in part.towers.named_children()}
        if isinstance(part, PairVision)
        else {"": part}
    )


def block_names(module: nn.Module) -> list[str]:
    """Names of the repeated blocks in the order data goes through them; of an encoder-decoder the encoder's come first.

    A convolutional backbone's are the blocks of its stages. Raises `ModelError` for a module without any.
    """
    found = [
        f"{name}.{child}"
        for name, stack in _stacks(module).items()
        for child, _ in stack.named_children()
    ]
    if not found:
        raise ModelError(f"{type(module).__name__} has no repeated blocks that could be counted")
    return found


def _stacks(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists of blocks of one class, each block of several modules, by name."""
    found: dict[str, nn.Module] = {}
    for name, stack in module.named_modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential) and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            blocks = list(stack.children())
            alike = len({type(block) for block in blocks}) == 1
            if alike and all(
                list(block.children()) and any(True for _ in block.parameters()) for block in blocks
            ):
                found[name] = stack
    return found


def depths(module: nn.Module, *, language: bool) -> Depths:
    """How deep under the top each parameter lies: what follows the last block 0, the last block 1, the embeddings deepest.

    Outside the blocks a parameter goes with the block that follows it in the module. Of a language model only embedding
    tables lie under the first block; a norm that it lists before the blocks lies over them.
    """
    blocks = block_names(module)
    tables = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    found: Depths = {}
    passed = 0
    for name, parameter in module.named_parameters():
        own = next(
            (place for place, block in enumerate(blocks) if name.startswith(f"{block}.")), None
        )
        if own is not None:
            passed = level = own + 1
        elif id(parameter) in tables or (not passed and not language):
            level = 0
        else:
            level = passed + 1 if passed else len(blocks) + 1
        found[name] = len(blocks) + 1 - level
    return found
