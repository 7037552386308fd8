"""The blocks of a part, numbered from the input: counted by `layers`, followed by `layer_decay`."""

from __future__ import annotations

from torch import nn

from vlm_tune.errors import ModelError
from vlm_tune.model.vision.registry import PairVision

Depths = dict[str, int]
"""The depth of each parameter under the top of its part, by name.

0 is what follows the last block, 1 the last block, and so on.
"""


def columns(part: nn.Module) -> dict[str, nn.Module]:
    """The modules whose blocks are numbered separately, by the prefix of their names.

    These are the two towers of a pair, or the part itself with an empty prefix.
    """
    return (
        {f"towers.{name}.": tower for name, tower in part.towers.named_children()}
        if isinstance(part, PairVision)
        else {"": part}
    )


def block_names(module: nn.Module) -> list[str]:
    """The names of the repeated blocks in execution order; an encoder's come before its decoder's.

    Those of a convolutional backbone are the blocks of its stages. Raises `ModelError` for a module
    without repeated blocks.
    """
    names = [
        f"{name}.{child}"
        for name, stack in _stacks(module).items()
        for child, _ in stack.named_children()
    ]
    if not names:
        raise ModelError(f"{type(module).__name__} has no repeated blocks that could be counted")
    return names


def _stacks(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists of blocks by name.

    All blocks of a list are of one class, and each has submodules and parameters.
    """
    stacks: dict[str, nn.Module] = {}
    for name, stack in module.named_modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential) and not any(
            name.startswith(f"{outer}.") for outer in stacks
        ):
            blocks = list(stack.children())
            alike = len({type(block) for block in blocks}) == 1
            if alike and all(
                list(block.children()) and any(True for _ in block.parameters()) for block in blocks
            ):
                stacks[name] = stack
    return stacks


def depths(module: nn.Module, *, language: bool) -> Depths:
    """The depth of each parameter: 0 after the last block, 1 in the last block, embeddings deepest.

    A parameter outside the blocks has the depth of the block that follows it in the module.
    Exception: in a language model only embedding tables are below the first block; a norm that is
    registered before the blocks is above them.

    Args:
        module: the part, or one tower of a pair.
        language: whether the module is a language model.
    """
    blocks = block_names(module)
    tables = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    depth_of: Depths = {}
    passed = 0
    for name, parameter in module.named_parameters():
        block_index = next(
            (place for place, block in enumerate(blocks) if name.startswith(f"{block}.")), None
        )
        if block_index is not None:
            passed = level = block_index + 1
        elif id(parameter) in tables or (not passed and not language):
            level = 0
        else:
            level = passed + 1 if passed else len(blocks) + 1
        depth_of[name] = len(blocks) + 1 - level
    return depth_of
