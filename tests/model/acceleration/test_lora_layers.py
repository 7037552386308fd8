"""The fused LoRA layers compute what PEFT's compute and save what PEFT's save.

They step aside where they would not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraModel
from torch import nn

from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_same_bits,
    batch_of,
    built,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    tensors_of,
    tuned_by,
    wake_adapters,
    with_tune,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.exporting.merge import check_merge, merge
from vlm_tune.exporting.verify import observe
from vlm_tune.kernels import devices
from vlm_tune.model.acceleration import lora_layers
from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections
from vlm_tune.model.lora import parts


def ready(recipe: Recipe, *, merged: bool = False) -> Any:
    """The recipe's model in training mode, with adapters that change it."""
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    if merged:
        assert merge_projections(model) > 0
    return model.train()


@pytest.fixture(params=["operator", "traceable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets a test run twice: by the operator, and by tensor code as on a GPU."""
    if request.param == "traceable":
        traceable(monkeypatch)
    return request.param


def traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is tensor code from here on, as on a device without a kernel of our own."""

    def refused(*arguments: Any) -> Any:
        raise AssertionError("the operator ran")

    monkeypatch.setattr(devices, "by_operator", lambda device: False)
    monkeypatch.setattr(lora_layers, "lora_linear", refused)


def plain_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer takes PEFT's own path from here on."""
    monkeypatch.setattr(LoraLinear, "forward", Linear.forward)


def step(model: Any, recipe: Recipe) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of all training rows."""
    return loss_and_gradients(
        model,
        [
            batch_of(
                model,
                [example for row in rows_of(recipe) for example in model.processor.examples(row)],
            )
        ],
    )


def assert_near(
    actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Asserts the same names, and the largest relative error (by norm) of all."""
    assert actual.keys() == wanted.keys()
    errors = {
        name: float((actual[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12))
        for name in wanted
    }
    assert max(errors.values()) <= tolerance, max(errors.items(), key=lambda item: item[1])


# --- one layer ---------------------------------------------------------------------------------


class Reader(nn.Module):
    """Three layers that read the same input."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], *, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(inputs, width, bias=bias) for width in outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x).sin(), self.v(x)], -1)


def reader(
    inputs: int, outputs: tuple[int, ...], *, bias: bool = False, custom: bool = True, **config: Any
) -> Reader:
    torch.manual_seed(1)
    model = Reader(inputs, outputs, bias=bias)
    chosen = LoraConfig(target_modules=["q", "k", "v"], init_lora_weights=False, **config)
    if custom:
        chosen._register_custom_module({nn.Linear: LoraLinear})
    LoraModel(model, {"default": chosen}, "default")
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x (where it wants one) and of what trains.

    The loss is the sum of the output's squares.
    """
    model.zero_grad(set_to_none=True)
    if x.requires_grad:
        x = x.detach().clone().requires_grad_()
    output = model(x)
    output.to(torch.promote_types(output.dtype, torch.float32)).square().sum().backward()
    tensors = {
        "output": output.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }
    return tensors | ({"x": x.grad} if x.grad is not None else {})


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 20),
    outputs=st.tuples(*[st.integers(1, 20)] * 3),
    rank=st.integers(1, 9),
    ranks=st.dictionaries(st.sampled_from("qkv"), st.integers(1, 9)),
    bias=st.booleans(),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    needs=st.booleans(),
    operator=st.booleans(),
)
def test_layers_and_merged_projections_equal_peft(
    inputs: int,
    outputs: tuple[int, ...],
    rank: int,
    ranks: dict[str, int],
    bias: bool,
    shape: list[int],
    needs: bool,
    operator: bool,
) -> None:
    # In double precision, for a gradient of few numbers may be what two large ones leave of each
    # other.
    options: dict[str, Any] = {"bias": bias, "r": rank, "lora_alpha": 5, "rank_pattern": ranks}
    x = (
        torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(2))
        .double()
        .requires_grad_(needs)
    )
    wanted = gradients(reader(inputs, outputs, custom=False, **options).double(), x)
    assert ("x" in wanted) == needs
    single, merged = (
        reader(inputs, outputs, **options).double(),
        reader(inputs, outputs, **options).double(),
    )
    with pytest.MonkeyPatch.context() as patch:
        if not operator:
            traceable(patch)
        assert merge_projections(merged) == 1
        assert_near(gradients(single, x), wanted, 1e-6)
        assert_near(gradients(merged, x), wanted, 1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("merged", [False, True])
def test_in_half_precision_no_further_from_exact_than_peft(merged: bool) -> None:
    """Frozen weights in bf16, factors in fp32, computed under autocast.

    Both are compared with the same in fp32.
    """
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    models = [
        reader(48, (48, 16, 16), r=4, lora_alpha=8, custom=custom)
        for custom in (False, True, False)
    ]
    for model in models:
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    peft, ours, exact = models
    if merged:
        merge_projections(ours)
    wanted = gradients(exact.float(), x.float().detach().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, fused = gradients(peft, x), gradients(ours, x)
    assert {name: value.dtype for name, value in fused.items()} == {
        name: value.dtype for name, value in theirs.items()
    }
    for name, value in wanted.items():
        error, allowed = (
            float((fused[name].float() - value).norm()),
            float((theirs[name].float() - value).norm()),
        )
        assert error <= 1.5 * allowed, name
        assert allowed <= 0.05 * float(value.norm())


@pytest.mark.parametrize("config", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_lora_takes_pefts_path(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> Any:
        raise AssertionError("the fused pass ran")

    model, plain = (
        reader(8, (8, 8, 8), bias=True, custom=custom, r=2, **config) for custom in (True, False)
    )
    monkeypatch.setattr(lora_layers, "_project", refused)
    assert merge_projections(model.train()) == 0
    x = torch.randn(5, 8)
    torch.manual_seed(3)
    ours = gradients(model, x)
    torch.manual_seed(3)
    assert_near(ours, gradients(plain, x), 1e-6)


def test_trained_weights_and_switched_off_or_merged_adapters_take_pefts_path() -> None:
    x = torch.randn(5, 8)
    model, plain = reader(8, (8, 8, 8), r=2), reader(8, (8, 8, 8), r=2, custom=False)
    assert merge_projections(model) == 1
    for each in (model, plain):
        each.k.base_layer.weight.requires_grad_()  # type: ignore[union-attr]
    assert_near(gradients(model, x), gradients(plain, x), 1e-6)
    model.k.base_layer.weight.requires_grad_(False)  # type: ignore[union-attr]
    adapted = model(x).detach()
    layers: list[Any] = [model.q, model.k, model.v]
    for layer in layers:
        layer.enable_adapters(False)
    base = torch.cat(
        [
            layer.base_layer(x) if layer is not model.k else layer.base_layer(x).sin()
            for layer in layers
        ],
        -1,
    )
    assert largest(model(x).detach(), base.detach()) <= 1e-6
    for layer in layers:
        layer.enable_adapters(True)
    model.q.merge()  # type: ignore[operator]
    assert largest(model(x).detach(), adapted) <= 1e-5
    model.q.unmerge()  # type: ignore[operator]
    assert largest(model(x).detach(), adapted) <= 1e-5


@torch.no_grad()
def test_merged_projections_follow_their_weights() -> None:
    """Weights that are loaded into stay merged.

    A model that is cast or moved goes on with the weights it then has.
    """
    x = torch.randn(5, 8)
    model, other = reader(8, (8, 4, 4), r=2), reader(8, (8, 4, 4), r=2)
    merge_projections(model)
    nn.init.normal_(other.k.base_layer.weight)  # type: ignore[union-attr]
    model.load_state_dict(other.state_dict())
    assert largest(model(x), other(x)) <= 1e-5
    assert model.q.group.matrix is not None  # type: ignore[union-attr]
    model.double().float()
    nn.init.normal_(other.k.base_layer.weight)  # type: ignore[union-attr]
    model.load_state_dict(other.state_dict())
    assert largest(model(x), other(x)) <= 1e-5
    assert model.q.group.matrix is None  # type: ignore[union-attr]


@pytest.mark.usefixtures("path")
@torch.no_grad()
def test_group_members_called_with_other_inputs_are_given_their_own() -> None:
    model = reader(8, (8, 8, 8), r=2)
    x, y = torch.randn(5, 8), torch.randn(3, 8)
    wanted = [model.q(x), model.k(y), model.v(x), model.q(y)]
    merge_projections(model)
    outputs = [model.q(x), model.k(y), model.v(x), model.q(y)]
    assert all(largest(one, other) <= 1e-6 for one, other in zip(outputs, wanted, strict=True))


def test_tensor_code_saves_x_once_and_its_product_with_a(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides weights, and the B of all layers in the type of x."""
    traceable(monkeypatch)
    model = reader(32, (32, 16, 16), r=2)
    merge_projections(model)
    x = torch.randn(40, 32).bfloat16().requires_grad_()
    for layer in (model.q, model.k, model.v):
        weight: Any = layer.base_layer.weight
        weight.data = weight.data.bfloat16()
    merge_projections(model)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        for layer in (model.q, model.k, model.v):
            layer(x)
    assert {each.data_ptr() for each in saved if len(each) == 40 and each.shape[1] == 32} == {
        x.data_ptr()
    }
    weights = model.q.group.matrix  # type: ignore[union-attr]
    stored = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in saved}
    for known in (x, weights):
        stored.pop(known.untyped_storage().data_ptr())
    ranks = 6
    assert sum(stored.values()) == 2 * ranks * (40 + 32 + 64)


@pytest.mark.usefixtures("path")
def test_the_compiled_pass_is_the_same() -> None:
    """Traced as one graph and run without a compiler.

    What is traced differs from the eager pass where projections are merged.
    """
    x = torch.randn(3, 5, 8).requires_grad_()
    for merged in (False, True):
        model = reader(8, (8, 4, 4), bias=True, r=2)
        wanted = gradients(model, x)
        if merged:
            merge_projections(model)
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        traced = {
            name.removeprefix("_orig_mod."): value for name, value in gradients(compiled, x).items()
        }
        assert_near(traced, wanted, 1e-5)


# --- whole models ------------------------------------------------------------------------------


TUNES = {
    "all": LORA_TUNE,
    "some": LORA_TUNE.replace("all-linear", "[q, v, wi_1]"),
    "frozen connector": LORA_TUNE.replace("how: full", "how: frozen"),
}


def tune(name: str, kind: str) -> str:
    return (
        TUNES[name]
        if kind == "seq2seq"
        else TUNES[name].replace("[q, v, wi_1]", "[q_proj, v_proj, up_proj]")
    )


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    ("tuned", "operator"), [*((tuned, True) for tuned in TUNES), ("all", False)]
)
def test_loss_and_gradients_equal_plain_peft(
    kind: str,
    tuned: str,
    operator: bool,
    tiny_recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = parsed(with_tune(tiny_recipe(kind), tune(tuned, kind)))
    if not operator:
        traceable(monkeypatch)
    single, merged = ready(recipe), ready(recipe, merged=True)
    steps = [step(model, recipe) for model in (single, merged)]
    merged.llm.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    steps.append(step(merged, recipe))
    assert not any(
        layer.group and layer.group.pending.value
        for layer in merged.modules()
        if isinstance(layer, LoraLinear)
    )
    plain_peft(monkeypatch)
    loss, wanted = step(ready(recipe), recipe)
    assert any("lora_B" in name for name in wanted)
    for ours, gradients_ in steps:
        assert float((ours - loss).abs() / loss) <= 1e-6
        assert_near(gradients_, wanted, 1e-5)


def test_the_query_of_cross_attention_is_not_merged_with_keys_and_values(
    tiny_recipe: Callable[..., str],
) -> None:
    model = ready(parsed(with_tune(tiny_recipe("seq2seq"), LORA_TUNE)), merged=True)
    attention: Any = parts(model)["llm"].get_submodule("decoder.block.0.layer.1.EncDecAttention")
    assert attention.q.group is None
    assert attention.k.group is attention.v.group is not None
    attention = parts(model)["llm"].get_submodule("decoder.block.0.layer.0.SelfAttention")
    assert attention.q.group is attention.k.group is attention.v.group is not None


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_what_is_saved_is_the_same_with_merged_projections(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(with_tune(tiny_recipe(kind), LORA_TUNE))
    plain, merged = ready(recipe), ready(recipe, merged=True)
    plain.save_pretrained(tmp_path / "plain")
    merged.save_pretrained(tmp_path / "merged")
    assert_same_bits(tmp_path / "plain", tmp_path / "merged")
    assert any(name.startswith("llm/") for name in tensors_of(tmp_path / "merged"))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_answers_and_merging_are_plain_pefts(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(with_tune(tiny_recipe(kind), LORA_TUNE))
    model = ready(recipe, merged=True)
    logits, text = observe(model, rows_of(recipe))
    model.save_pretrained(tmp_path / "saved")
    check_merge(merge(tmp_path / "saved", tmp_path / "fused", dtype="fp32"))
    plain_peft(monkeypatch)
    wanted, same = observe(ready(recipe), rows_of(recipe))
    assert largest(logits, wanted) <= 1e-5
    assert text == same
    check_merge(merge(tmp_path / "saved", tmp_path / "peft", dtype="fp32"))
    assert_same_bits(tmp_path / "fused", tmp_path / "peft")
