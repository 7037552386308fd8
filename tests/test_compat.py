"""Private names of other libraries, on whichever of their versions is installed.

Each test calls the library: it fails where the library has renamed what `vlm_tune.compat` uses.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.helpers.forked_runs import ended, start
from tests.helpers.gemma_samples import save_paligemma
from vlm_tune.compat import (
    HARMLESS,
    RECOMPILED,
    all_true_on_meta,
    attention_name,
    beams_keep_images,
    cache_name,
    checkpoint_function,
    checkpointed_forward,
    chrf_score,
    chrf_statistics,
    dataset_fingerprint,
    default_compile_cache,
    default_store,
    deterministic_compiling,
    eager_attention,
    flex_attention,
    forget_checkpoint_names,
    forget_members,
    fp32_layers,
    has_hooks,
    is_attention_projection,
    is_kv_cache,
    is_stateful,
    keep_gradients_of_packed_layers,
    module_state,
    onednn_linear,
    recompute_operator_inputs,
    register_attention,
    sdpa_attention,
    set_attention,
    set_lora_layer,
    shards_bytes,
    share_compiled_code,
    submodules,
    supports_attention_functions,
    supports_flex,
    supports_static_cache,
    without_harmless_warnings,
    worker_processes,
)
from vlm_tune.compat_engines import (
    allow_precision,
    build_no_shared_memory_op,
    flat_zero_shards,
    is_zero3_parameter,
    launched_without_others,
    link_zero_state,
    remove_autocast,
    zero3_shard_size,
)
from vlm_tune.kernels.lora import lora_linear


def calls(library: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the library's version to whatever a test raises."""

    def noting(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def noted(*arguments: Any, **named: Any) -> None:
            try:
                test(*arguments, **named)
            except Exception as error:
                error.add_note(f"with {library} {version(library)}")
                raise

        return noted

    return noting


def forked(act: Callable[[], Any], folder: Path) -> None:
    """Calls `act` in a fork: a process group and accelerate's state are for a whole process."""
    assert ended(start(act, folder / "said")) == [0], (folder / "said.0").read_text()


def tiny_llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def test_warnings_are_left_out_within_a_call_alone() -> None:
    logger = logging.getLogger(HARMLESS[0])
    before = logger.level
    with without_harmless_warnings():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
    assert logger.level == before


# --- Python ---------------------------------------------------------------------------------------


def test_an_archive_keeps_no_header_of_what_was_read() -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for number in range(20):
            archive.addfile(tarfile.TarInfo(f"{number}.txt"))
    written.seek(0)
    names = []
    before = headers()
    with tarfile.open(fileobj=written) as archive:
        while (member := archive.next()) is not None:
            forget_members(archive)
            names.append(member.name)
        assert headers() - before <= 2  # the first and the last
    assert names == [f"{number}.txt" for number in range(20)]


def headers() -> int:
    # By type: `isinstance` would follow a weak proxy, whose object may be gone.
    return sum(issubclass(type(each), tarfile.TarInfo) for each in gc.get_objects())


# --- torch ----------------------------------------------------------------------------------------


@calls("torch")
def test_parameters_of_bytes_are_sharded_or_refused(tmp_path: Path) -> None:
    def shard() -> None:
        join_alone()
        layer: Any = nn.Linear(2, 2)
        layer.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if not shards_bytes():
            with pytest.raises(RuntimeError):
                fully_shard(layer, mp_policy=policy)
            return
        fully_shard(layer, mp_policy=policy)
        layer.unshard()
        assert layer.codes.dtype == torch.uint8 and layer.weight.dtype == torch.bfloat16

    forked(shard, tmp_path)


@calls("torch")
def test_the_workers_of_a_loader_are_its_child_processes() -> None:
    loader: Any = torch.utils.data.DataLoader([0, 1, 2, 3], num_workers=2)  # type: ignore[arg-type]
    batches = iter(loader)
    workers = worker_processes(batches)
    assert len(set(workers)) == 2
    assert {*workers} <= {child.pid for child in multiprocessing.active_children()}
    assert [int(batch) for batch in batches] == [0, 1, 2, 3]


@calls("torch")
def test_the_default_groups_store_is_that_of_its_making(tmp_path: Path) -> None:
    def act() -> None:
        with pytest.raises(ValueError, match="not been initialized"):
            default_store()
        join_alone()
        default_store().clone().set("key", "value")
        assert default_store().get("key") == b"value"

    forked(act, tmp_path)


def join_alone() -> None:
    """Makes a process group of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


@calls("torch")
def test_the_output_of_torchs_attention_is_told_from_a_linear_layer() -> None:
    assert is_attention_projection(nn.MultiheadAttention(8, 2).out_proj)
    assert not is_attention_projection(nn.Linear(8, 8))


@calls("torch")
def test_a_compiled_backward_pass_makes_the_input_of_an_operator_anew() -> None:
    down, up = torch.randn(4, 32, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    weight = torch.randn(16, 32)

    def normed_and_projected(x: torch.Tensor) -> torch.Tensor:
        rows = x * x.pow(2).mean(-1, keepdim=True).rsqrt()
        return lora_linear(rows, [weight], "", 0, False, None, [down], [up], [1.0])[0]

    def saved() -> list[torch.Size]:
        torch.compiler.reset()
        out = torch.compile(normed_and_projected, backend="aot_eager_decomp_partition")(
            torch.randn(64, 32, requires_grad=True)
        )
        assert out.grad_fn is not None
        return [tensor.shape for tensor in out.grad_fn.saved_tensors]  # type: ignore[attr-defined]

    whole = torch.Size((64, 32))
    assert saved().count(whole) == 2  # what the norm is given, and what it gives
    with recompute_operator_inputs():
        assert saved().count(whole) == 1
    assert saved().count(whole) == 2


# --- transformers ---------------------------------------------------------------------------------


@calls("transformers")
@calls("torch")
def test_a_compiler_that_takes_no_choice_by_timing_is_so_within_a_call_alone() -> None:
    from torch._inductor import config

    before = config.deterministic
    with deterministic_compiling():
        assert config.deterministic
    assert config.deterministic == before


def test_the_cache_is_given_and_returned_by_its_name() -> None:
    model = tiny_llama().eval()
    assert cache_name() in inspect.signature(model.forward).parameters
    ids, cache = torch.arange(6)[None], DynamicCache()
    first = model(input_ids=ids[:, :4], use_cache=True, **{cache_name(): cache})
    second = model(input_ids=ids[:, 4:], use_cache=True, **{cache_name(): first[cache_name()]})
    assert first[cache_name()] is cache and cache.get_seq_length() == 6
    assert torch.allclose(second.logits, model(input_ids=ids).logits[:, 4:], atol=1e-5)


@calls("transformers")
def test_a_t5_keeps_its_wo_in_fp32() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert fp32_layers(T5ForConditionalGeneration(config)) == {"wo"}
    assert fp32_layers(tiny_llama()) == set()


@calls("transformers")
def test_a_model_is_saved_under_its_own_names_once_the_checkpoints_are_forgotten(
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    names = set(model.state_dict())
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(
        {f"language.{name}": each for name, each in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    loaded: Any = LlamaForCausalLM.from_pretrained(
        tmp_path / "theirs", key_mapping={r"^language\.": ""}
    )
    loaded.save_pretrained(tmp_path / "before")
    forget_checkpoint_names(loaded)
    loaded.save_pretrained(tmp_path / "after")
    assert set(load_file(tmp_path / "before" / "model.safetensors")) == {
        f"language.{name}" for name in names
    }
    assert set(load_file(tmp_path / "after" / "model.safetensors")) == names


@calls("transformers")
def test_a_model_loaded_with_an_adapter_has_a_peft_config(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not hasattr(base, "peft_config")
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    assert hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), "peft_config")


# --- PEFT -----------------------------------------------------------------------------------------


@calls("peft")
def test_peft_wraps_a_layer_in_the_type_that_was_set() -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear, LoraModel

    class OtherLinear(Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["1"])
    set_lora_layer(config, nn.Linear, OtherLinear)
    LoraModel(model, config, "default")
    assert [type(layer) for layer in model] == [nn.Linear, OtherLinear]


# --- accelerate -----------------------------------------------------------------------------------


@calls("accelerate")
def test_a_later_accelerator_may_have_another_precision(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def act() -> None:
        allow_precision("bf16")
        assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
        with pytest.raises(ValueError, match="already been initialized"):
            Accelerator(cpu=True, mixed_precision="no")
        allow_precision("no")
        assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"

    forked(act, tmp_path)


@calls("accelerate")
def test_accelerates_autocast_is_removed_from_a_model(tmp_path: Path) -> None:
    def act() -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare_model(nn.Linear(4, 4))
        rows = torch.ones(2, 4) / 3
        narrow = model(rows)
        remove_autocast(model)
        assert "forward" not in vars(model)
        assert not torch.equal(model(rows), narrow)
        remove_autocast(model)  # nothing is left to remove

    forked(act, tmp_path)


@calls("accelerate")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_launch_that_starts_one_process_of_several_is_recognised(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    options = f"--cpu --num_machines 1 --num_processes {processes} --mixed_precision no"
    arguments = launch_command_parser().parse_args([*options.split(), "train.py"])
    # What `accelerate launch` takes for granted where it is given neither option nor config.
    arguments.dynamo_backend, arguments.num_cpu_threads_per_process = "no", 1
    assert not launched_without_others()
    for name, text in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, text)
    assert launched_without_others() == (processes == 2)


# --- DeepSpeed ------------------------------------------------------------------------------------


@calls("deepspeed")
def test_deepspeed_compiles_no_shared_memory_operator(tmp_path: Path) -> None:
    def act() -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.comm.torch import build_shm_op

        name = get_accelerator().create_op_builder("ShareMemCommBuilder").NAME
        deepspeed.ops.__compatible_ops__[name] = True
        build_no_shared_memory_op()
        assert build_shm_op() is None

    forked(act, tmp_path)


def zero_engine(stage: int) -> Any:
    """DeepSpeed's engine around a layer of 5 x 3 weights, in a process group of one process."""
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"
    build_no_shared_memory_op()
    join_alone()
    model = nn.Linear(3, 5, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


@calls("deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_inner_optimizers_state_is_that_of_the_flat_shards(stage: int, tmp_path: Path) -> None:
    def act() -> None:
        engine = zero_engine(stage)
        engine.backward(engine(torch.ones(1, 3)).sum())
        engine.step()
        (shard,) = flat_zero_shards(engine.optimizer, stage)
        assert shard.numel() >= 15 and shard.dtype == torch.float32
        assert list(engine.optimizer.optimizer.state) == [shard]

    forked(act, tmp_path)


@calls("deepspeed")
def test_a_linked_parameter_has_its_state_before_the_first_step(tmp_path: Path) -> None:
    def act() -> None:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

        engine = zero_engine(1)
        for shard in flat_zero_shards(engine.optimizer, 1):
            engine.optimizer.optimizer.state[shard] = {"exp_avg": torch.zeros_like(shard)}
        link_zero_state(engine.optimizer)
        (parameter,) = engine.module.parameters()
        safe_set_full_optimizer_state(parameter, torch.full((5, 3), 2.0), "exp_avg")
        assert safe_get_full_optimizer_state(parameter, "exp_avg").eq(2).all()

    forked(act, tmp_path)


@calls("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_parameter_is_a_shard_in_stage_3_alone(stage: int, tmp_path: Path) -> None:
    def act() -> None:
        (parameter,) = zero_engine(stage).module.parameters()
        assert is_zero3_parameter(parameter) == (stage == 3)
        assert not is_zero3_parameter(torch.zeros(3))

    forked(act, tmp_path)


@calls("deepspeed")
def test_a_shard_of_a_single_process_has_all_values(tmp_path: Path) -> None:
    def act() -> None:
        (parameter,) = zero_engine(3).module.parameters()
        assert zero3_shard_size(parameter) >= 15

    forked(act, tmp_path)


# --- datasets -------------------------------------------------------------------------------------


@calls("datasets")
def test_a_data_set_has_a_fingerprint_that_follows_its_rows(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"question": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "saved"))
    saved, again = (datasets.load_from_disk(str(tmp_path / "saved")) for _ in range(2))
    assert dataset_fingerprint(saved) == dataset_fingerprint(again)
    assert dataset_fingerprint(saved.select([0])) != dataset_fingerprint(saved)


# --- bitsandbytes ---------------------------------------------------------------------------------


@calls("bitsandbytes")
def test_a_packed_layer_keeps_its_gradient_on_every_cpu() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(8, 8)
    assert "support_avx512bf16_for_cpu" in vars(layer)
    layer.support_avx512bf16_for_cpu = True
    keep_gradients_of_packed_layers(nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


@calls("transformers")
def test_a_model_that_has_no_flex_attention_is_known() -> None:
    from transformers import AutoModel, BloomConfig, T5Config

    sizes: dict[str, Any] = {"vocab_size": 9, "num_layers": 1, "num_heads": 1}
    known: list[bool] = []
    for config in (T5Config(**sizes, d_model=16, d_ff=8), BloomConfig(vocab_size=9, n_layer=1)):
        known.append(supports_flex(AutoModel.from_config(config)))
        refusal = contextlib.nullcontext() if known[-1] else pytest.raises(ValueError)
        with refusal:
            AutoModel.from_config(config, attn_implementation="flex_attention")
    assert known == [True, False]


@pytest.mark.parametrize("of", ["eager", "sdpa"])
def test_a_registered_attention_is_called_with_the_masks_of_another(of: str) -> None:
    model = tiny_llama()
    assert supports_attention_functions(model)
    ids = torch.arange(8).view(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    set_attention(model.config, of)
    wanted = model(input_ids=ids, attention_mask=mask).logits
    calls: list[Any] = []

    def attend(module: Any, *given: Any, **more: Any) -> Any:
        calls.append(given[3])
        function = eager_attention(module) if of == "eager" else sdpa_attention
        return function(module, *given, **more)

    register_attention("tests_attention", attend, masks_of=of)
    set_attention(model.config, "tests_attention")
    assert attention_name(model) == "tests_attention"
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, wanted)
    assert len(calls) == 2 and calls[0].dtype == (torch.bool if of == "sdpa" else torch.float32)


def test_flex_attention_runs_as_plain_code_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention as library

    assert library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is False
    monkeypatch.setattr(torch, "compile", None)  # it would call it
    query = torch.randn(1, 2, 8, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.allclose(flex_attention(query, query, query), wanted, atol=1e-5)
    assert library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is False
    with torch._dynamo.config.patch(recompile_limit=RECOMPILED):  # there is such a setting
        assert torch._dynamo.config.recompile_limit == RECOMPILED


def test_recurrent_models_are_known() -> None:
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert is_stateful(recurrent) and not is_stateful(tiny_llama())
    assert supports_static_cache(tiny_llama()) and not supports_static_cache(recurrent)


def test_code_for_one_address_is_used_at_others() -> None:
    graphs = CompileCounter()
    doubled = torch.compile(lambda x: x * 2, backend=graphs)
    for _ in range(3):
        tensor = torch.ones(3)
        torch._dynamo.mark_static_address(tensor)
        share_compiled_code(tensor)
        doubled(tensor)
    assert graphs.frame_count == 1


def test_hooks_children_and_the_cache_of_compiled_code() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    assert not has_hooks(layer) and submodules(layer) == {"0": layer[0]}
    layer.register_forward_hook(lambda *_: None)
    assert has_hooks(layer) and not has_hooks(layer[0])
    assert "torchinductor" in default_compile_cache()


def test_the_forward_pass_that_a_block_checkpoints_is_known() -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=4
    )
    model = LlamaForCausalLM(config)
    block = model.model.layers[0]
    checkpointed = checkpointed_forward(block)
    assert checkpointed is None or checkpointed is not type(block).forward
    assert checkpointed_forward(nn.Linear(2, 2)) is None
    assert checkpoint_function(block.train()) is None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    function = checkpoint_function(block)
    assert function is not None
    x = torch.ones(2, requires_grad=True)
    calls: list[int] = []

    def square(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * x

    function(square, x).sum().backward()
    assert len(calls) == 2
    assert checkpoint_function(block.eval()) is None


def test_a_cache_of_transformers_is_known() -> None:
    assert is_kv_cache(DynamicCache()) and not is_kv_cache(None)
    assert not is_kv_cache(torch.zeros(1))


def test_whatever_changes_a_lora_layer_changes_its_state() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

    def ready() -> Any:
        model: Any = Model().requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"]), model)
        return model.layer

    def moved(layer: Any) -> None:
        layer.lora_B["default"].weight = nn.Parameter(torch.ones(4, 2))

    changes: list[Callable[[Any], Any]] = [
        lambda layer: layer.eval(),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.merge(),
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.base_layer.weight.requires_grad_(),
        lambda layer: layer.base_layer.bias.add_(1),
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(4, 4))),
        moved,
    ]
    for number, change in enumerate(changes):
        layer = ready()
        before = module_state(layer)
        assert module_state(layer) == before
        with torch.no_grad():
            layer.lora_A["default"].weight.add_(1)
            assert module_state(layer) == before
            change(layer)
        assert module_state(layer) != before, number


def test_chrf_statistics_add_up_to_sacrebleus_score() -> None:
    from sacrebleu.metrics.chrf import CHRF

    predictions = ["a red square", "two dogs", ""]
    references = [["the red square"], ["two cats", "dogs"], ["nothing"]]
    counts = chrf_statistics(predictions, references)
    whole = [sum(column) for column in zip(*counts, strict=True)]
    filled = [
        [texts[place] if place < len(texts) else "" for texts in references] for place in (0, 1)
    ]
    assert len(counts) == 3 and chrf_score([float(count) for count in whole]) > 10
    assert (
        chrf_score([float(count) for count in counts[0]])
        == CHRF().sentence_score(predictions[0], references[0]).score
    )
    assert CHRF().corpus_score(predictions, filled).score == chrf_score(whole)  # type: ignore[arg-type]


def test_onednn_multiplies_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((2, 9, 24), (40, 24), (40,))
    )
    for given in ((rows, weight), (rows, weight, bias)):
        expected = torch.nn.functional.linear(*given)
        torch.testing.assert_close(onednn_linear(*given), expected)


@pytest.mark.slow
def test_python_prints_no_warning_of_a_package_that_nobody_needs() -> None:
    code = "import vlm_tune, bitsandbytes; from transformers import T5Config; print('end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "end\n"
    assert "gemm_4bit_forward" not in done.stderr


def test_meta_tensors_are_indexed_by_masks_of_unknown_values() -> None:
    rows = torch.zeros(3, 4, device="meta")
    mask = torch.ones(3, dtype=torch.bool, device="meta")
    with all_true_on_meta(mask):
        assert rows[mask].shape == (3, 4)
    with pytest.raises(NotImplementedError):
        rows[mask]


def test_a_paligemma_caps_its_logits_in_each_release(tmp_path: Path) -> None:
    theirs = save_paligemma(tmp_path, "gemma2").eval()
    cap = theirs.config.text_config.final_logit_softcapping
    theirs.lm_head.weight.data *= 1000
    ids = torch.arange(5, 11)[None]
    logits = theirs(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    assert 0.9 * cap < logits.abs().max() <= cap


def test_beams_keep_images_only_where_a_models_code_sees_to_it() -> None:
    from transformers import Qwen2VLForConditionalGeneration

    assert beams_keep_images(
        Qwen2VLForConditionalGeneration.__new__(Qwen2VLForConditionalGeneration)
    )
    assert not beams_keep_images(LlamaForCausalLM.__new__(LlamaForCausalLM))
