"""Last layers, norms, biases and layer-wise rate decay.

Which parameters, and the rates that reach the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import built, parsed, stage_loop, with_tower, with_tune
from vlm_tune.config.tune import TuneRule
from vlm_tune.errors import ModelError
from vlm_tune.model.layer_index import block_names, depths
from vlm_tune.model.tuning import apply_rules

FROZEN = TuneRule(match="*", how="frozen")
LLMS = {
    "llama": ("causal", "num_hidden_layers: 3", "model.layers"),
    "gpt2": ("causal", "n_layer: 3, n_embd: 32, n_head: 2, n_positions: 128", "transformer.h"),
    "opt": (
        "causal",
        "num_hidden_layers: 3, hidden_size: 32, ffn_dim: 48, num_attention_heads: 2, "
        "max_position_embeddings: 128, word_embed_proj_dim: 32",
        "model.decoder.layers",
    ),
}
TOWERS = {
    "open_clip": (
        "{kind: open_clip, config: {layers: 3, width: 64, head_width: 32, patch_size: "
        "16, image_size: 32}}",
        3,
    ),
    "timm_vit": ("{kind: timm, name: vit_tiny_patch16_224, image_size: 32, grid: 2}", 12),
    "resnet": ("{kind: timm, name: resnet18, image_size: 32, grid: 2}", 8),
    "convnext": ("{kind: timm, name: convnext_atto, image_size: 64, grid: 2}", 12),
}


def llm_recipe(text: str, model_type: str) -> Any:
    kind, config, _ = LLMS[model_type]
    if model_type == "llama":
        return parsed(text.replace("num_hidden_layers: 2", config))
    scratch = f"{{model_type: {model_type}, vocab_size: 400, config: {{{config}}}}}"
    return parsed(
        "\n".join(
            f"  llm: {{kind: {kind}, scratch: {scratch}}}" if x.startswith("  llm:") else x
            for x in text.splitlines()
        )
    )


def trained(model: Any, *rules: TuneRule) -> set[str]:
    tuned = apply_rules(model, [*rules, FROZEN], learning_rate=1e-3, precision=torch.float32)
    trainable = {
        f"{name.replace('llm.model.', 'llm.', 1)}"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trainable == {name for names in tuned.names for name in names}
    return trainable


@pytest.mark.parametrize("model_type", LLMS)
def test_an_llms_depths(model_type: str, tiny_recipe: Callable[..., str]) -> None:
    model = built(llm_recipe(tiny_recipe("causal"), model_type))
    stack = LLMS[model_type][2]
    assert block_names(model.llm.model) == [f"{stack}.{place}" for place in range(3)]
    for name, depth in depths(model.llm.model, language=True).items():
        block = (
            int(name.removeprefix(f"{stack}.").split(".")[0])
            if name.startswith(f"{stack}.")
            else None
        )
        embedding = any(word in name for word in ("embed", "wte", "wpe"))
        assert depth == (4 if embedding else 0 if block is None else 3 - block), name


def test_an_encoder_decoders_blocks_count_on(tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe("seq2seq")))
    assert block_names(model.llm.model) == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    by_name = depths(model.llm.model, language=True)
    assert by_name["shared.weight"] == 4
    assert by_name["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == 3
    assert (
        by_name["encoder.final_layer_norm.weight"]
        == by_name["decoder.block.0.layer.0.SelfAttention.q.weight"]
        == 1
    )
    assert by_name["decoder.final_layer_norm.weight"] == 0


@pytest.mark.parametrize("tower", TOWERS)
def test_a_towers_depths(tower: str, tiny_recipe: Callable[..., str]) -> None:
    text, count = TOWERS[tower]
    model = built(parsed(with_tower(tiny_recipe("causal"), text)))
    names, by_name = block_names(model.tower), depths(model.tower, language=False)
    assert len(names) == count
    for place, block in enumerate(names):
        inside = {depth for name, depth in by_name.items() if name.startswith(f"{block}.")}
        assert inside == {count - place}
    outside = {
        name: depth
        for name, depth in by_name.items()
        if not name.startswith(tuple(f"{block}." for block in names))
    }
    assert outside
    assert all(depth == count + 1 or "downsample" in name for name, depth in outside.items()), (
        outside
    )


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_the_last_blocks_train(kind: str, tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe(kind)))
    last = "llm.decoder.block.0." if kind == "seq2seq" else "llm.model.layers.1."
    every = {f"llm.{name}" for name, _ in model.llm.model.named_parameters()}
    assert trained(model, TuneRule(match="llm.*", how="last_layers", layers=1)) == {
        name for name in every if name.startswith(last)
    }
    assert "llm" in model.changed
    with pytest.raises(ModelError, match=r"wants the last 4 blocks, and matches [23]"):
        trained(model, TuneRule(match="llm.*", how="last_layers", layers=4))
    names = trained(model, TuneRule(match="tower.*", how="last_layers", layers=1))
    assert names == {
        f"tower.{name}" for name, _ in model.tower.named_parameters() if "resblocks.1." in name
    }


def test_the_last_blocks_of_the_matched_ones(tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe("seq2seq")))
    names = trained(model, TuneRule(match="llm.encoder.*", how="last_layers", layers=1))
    assert names == {
        f"llm.{name}"
        for name, _ in model.llm.model.named_parameters()
        if name.startswith("encoder.block.1.")
    }


def test_each_of_two_towers_trains_its_last_blocks(tiny_recipe: Callable[..., str]) -> None:
    one = TOWERS["open_clip"][0]
    model = built(
        parsed(with_tower(tiny_recipe("causal"), f"{{kind: pair, towers: [{one}, {one}]}}"))
    )
    names = trained(model, TuneRule(match="tower.*", how="last_layers", layers=2))
    assert {".".join(name.split(".")[2:6]) for name in names} == {
        f"{tower}.visual.transformer.resblocks" for tower in (0, 1)
    } and {name.split(".")[6] for name in names} == {"1", "2"}


def test_norms_and_biases(tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe("seq2seq")))
    norms = trained(
        model, TuneRule(match="llm.*", how="norms"), TuneRule(match="tower.*", how="norms")
    )
    assert {name for name in norms if name.startswith("llm.")} == {
        f"llm.{name}" for name, _ in model.llm.model.named_parameters() if "layer_norm" in name
    }
    assert {name.rsplit(".", 2)[-2] for name in norms if name.startswith("tower.")} == {
        "ln_pre",
        "ln_1",
        "ln_2",
    }
    biases = trained(
        model, TuneRule(match="tower.*", how="biases"), TuneRule(match="connector.*", how="biases")
    )
    everything = {name for name, _ in model.named_parameters() if not name.startswith("llm.")}
    assert biases == {
        name for name in everything if name.rsplit(".")[-1] in ("bias", "in_proj_bias")
    }
    with pytest.raises(ModelError, match=r"'llm\.\*' is how: biases, and there are none"):
        trained(model, TuneRule(match="llm.*", how="biases"))


def test_a_part_without_blocks_is_refused(tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe("causal")))
    with pytest.raises(ModelError, match="has no repeated blocks"):
        trained(model, TuneRule(match="connector.*", how="last_layers", layers=1))


DECAYED = """
tune:
  - {match: "tower.*", how: full, learning_rate: 1.0e-3, layer_decay: 0.5}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: full, layer_decay: 0.8}
train:"""


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_after_warm_up_the_optimizers_rates_are_the_formulas(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    schedule = {"kind": "constant", "warmup": 0.5}
    recipe = parsed(with_tune(tiny_recipe(kind), DECAYED), train__schedule=schedule, train__steps=4)
    model = built(recipe)
    loop = stage_loop(model, recipe, tmp_path / "run")
    seen: list[dict[int, float]] = []
    inner: Any = loop.engine.optimizer.optimizer
    inner.register_step_pre_hook(
        lambda o, a, k: seen.append({id(p): g["lr"] for g in o.param_groups for p in g["params"]})
    )
    loop.run()
    assert len(seen) == 4

    def expected(name: str) -> float:
        if name.startswith("connector."):
            return 3e-3
        if name.startswith("tower."):
            block = name.partition("resblocks.")[2]
            return 1e-3 * 0.5 ** (2 - int(block.split(".")[0]) if block else 3)
        stacks = ("encoder.block.", "decoder.block.") if kind == "seq2seq" else ("model.layers.",)
        for stack, below in zip(stacks, (0, 2), strict=False):
            if stack in name:
                return 3e-3 * 0.8 ** (
                    (3 if kind == "seq2seq" else 2)
                    - below
                    - int(name.partition(stack)[2].split(".")[0])
                )
        if "shared" in name or "embed_tokens" in name:
            return 3e-3 * 0.8 ** (4 if kind == "seq2seq" else 3)
        return 3e-3 * (0.8 if "encoder.final" in name else 1)

    for name, parameter in model.named_parameters():
        assert seen[0][id(parameter)] == pytest.approx(expected(name) / 2), name
        assert all(step[id(parameter)] == pytest.approx(expected(name)) for step in seen[1:]), name
    assert "decay=0.8" in loop.tuned.table[2].detail
