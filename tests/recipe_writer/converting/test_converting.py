"""`vlm-tune init --from`: configurations of four frameworks become recipes, key by key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vlm_tune
from tests.helpers.tiny_recipes import write_color_rows
from vlm_tune.cli import app
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import RecipeError, VlmTuneError
from vlm_tune.recipe_writer.written import Written

LLAMA_FACTORY = """
model_name_or_path: llava-hf/llava-1.5-7b-hf
image_max_pixels: 262144
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
freeze_multi_modal_projector: false
dataset: shapes, colors
dataset_dir: {folder}/data
template: llava
cutoff_len: 1024
max_samples: 200
val_size: 0.1
preprocessing_num_workers: 16
output_dir: saves/llava-lora
logging_steps: 5
save_steps: 250
plot_loss: true
report_to: none
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
mask_history: true
"""
DATASET_INFO = {
    "shapes": {
        "file_name": "shapes.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "colors": {"file_name": "colors.json", "columns": {"prompt": "q", "response": "a"}},
}

SWIFT = """#!/bin/bash
# One GPU.
RATE=2e-4
MAX_PIXELS=1003520 CUDA_VISIBLE_DEVICES=0 \\
swift sft \\
    --model Qwen/Qwen2.5-VL-7B-Instruct \\
    --model_type qwen2_5_vl \\
    --tuner_type lora \\
    --dataset rows.jsonl#500 some/set:part \\
    --val_dataset held_out.jsonl \\
    --torch_dtype bfloat16 \\
    --max_steps 400 --warmup_steps 20 \\
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 \\
    --learning_rate $RATE --aligner_lr 2e-5 \\
    --freeze_aligner false --target_modules all-linear \\
    --quant_method bnb --quant_bits 4 \\
    --attn_impl sdpa --truncation_strategy delete --max_length 4096 \\
    --new_special_tokens "<loc>" "<end>" \\
    --output_dir output/vl --deepspeed zero3 --neftune_noise_alpha 5
"""

TRL = """
model_name_or_path: llava-hf/llava-1.5-7b-hf
dataset_name: some/llava-mix
use_peft: true
lora_r: 64
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
load_in_4bit: true
learning_rate: 1.4e-5
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
max_length: 2048
output_dir: sft-llava
push_to_hub: true
warmup_steps: 20
optim: adafactor
remove_unused_columns: false
dataset_kwargs: {skip_prepare_dataset: true}
"""

LLAVA = """#!/bin/bash
VICUNA=lmsys/vicuna-7b-v1.5
deepspeed --master_port 29501 llava/train/train_mem.py \\
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \\
    --deepspeed ./scripts/zero3.json \\
    --model_name_or_path $VICUNA --version v1 \\
    --data_path ./mix.json --image_folder ./images \\
    --vision_tower openai/clip-vit-large-patch14-336 \\
    --pretrain_mm_mlp_adapter ./projector.bin \\
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 \\
    --mm_use_im_start_end False --mm_use_im_patch_token False \\
    --image_aspect_ratio pad --group_by_modality_length True --bf16 True \\
    --output_dir ./checkpoints/lora --num_train_epochs 1 \\
    --per_device_train_batch_size 16 --evaluation_strategy "no" \\
    --learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 \\
    --lr_scheduler_type "cosine" --tf32 True --model_max_length 2048 \\
    --gradient_checkpointing True --lazy_preprocess True --report_to wandb
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder of its own."""
    monkeypatch.chdir(tmp_path)


def converted(name: str, text: str, **options: Any) -> Written:
    Path(name).write_text(text)
    return vlm_tune.init(configuration=name, **options)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("accelerate launch examples/scripts/dpo_vlm.py", "dpo"),
        ("python trl/scripts/kto.py", "kto"),
        ("trl grpo", "grpo"),
        ("trl dpo", "dpo"),
        ("trl sft", "language_modeling"),
        ("python sft_vlm.py", "language_modeling"),
    ],
)
def test_the_trainer_of_a_script_is_that_of_the_recipe_and_of_the_next_command(
    command: str, kind: str
) -> None:
    flags = "--model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name a/b --use_peft"
    written = converted("train.sh", f"{command} {flags}\n")
    assert written.recipe.objective.kind == kind
    trains = {"language_modeling": "sft"}.get(kind, kind)
    assert f"vlm-tune {trains} {written.path}" in written.commands


def test_a_configuration_without_a_model_says_so() -> None:
    text = Path(converted("a.yaml", "dataset_name: a/b\nuse_peft: true\n").path).read_text()
    assert "the configuration has no model_name_or_path: name the model" in text
    assert "from model_name_or_path" not in text


def test_a_hub_named_before_a_data_set_is_no_part_of_its_name() -> None:
    text = "swift sft --model x/y --dataset 'hf::hiyouga/geometry3k:train' MS::a/b\n"
    first, second = converted("a.sh", text).recipe.data.train
    assert (first.name, first.config) == ("hiyouga/geometry3k", "train")
    assert second.name == "a/b"


def reasons(written: Written) -> dict[str, str]:
    return {each.key: each.reason for each in written.unmatched}


def rules(recipe: Recipe) -> list[dict[str, Any]]:
    return [rule.model_dump(exclude_none=True) for rule in recipe.tune]


# --- the four frameworks --------------------------------------------------------------------------


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    written = converted("lora.yaml", LLAMA_FACTORY.format(folder=tmp_path))
    recipe = written.recipe
    assert written.framework == "LLaMA-Factory"
    assert recipe.model.model_dump()["pretrained"] == "llava-hf/llava-1.5-7b-hf"
    data = recipe.data
    sources = [source.model_dump(exclude_unset=True) for source in data.train]
    folder = str(tmp_path / "data")
    assert sources == [
        {
            "kind": "file",
            "path": f"{folder}/shapes.json",
            "columns": {"messages": "turns"},
            "limit": 200,
        },
        {
            "kind": "file",
            "path": f"{folder}/colors.json",
            "columns": {"instruction": "q", "output": "a"},
            "limit": 200,
        },
    ]
    assert data.template == "vicuna" and data.max_length == 1024
    assert data.split is not None and data.split.validation == 0.1
    lora = {"how": "lora", "r": 16, "lora_alpha": 32}
    assert rules(recipe) == [
        {"match": "tower.*", "how": "frozen"},
        {"match": "connector.*", **lora, "target_modules": "all-linear"},
        {"match": "llm.*", **lora, "target_modules": ["q_proj", "v_proj"]},
    ]
    train = recipe.train
    assert (train.epochs, train.batch_size, train.gradient_accumulation) == (3.0, 2, 8)
    assert (train.learning_rate, train.schedule.warmup) == (1e-4, 0.1)
    assert train.gradient_checkpointing and recipe.seed == 42
    assert set(reasons(written)) == {"image_max_pixels", "mask_history"}
    assert written.unchecked == "its data is not on this machine"


def test_llama_factorys_freeze_trains_the_last_layers() -> None:
    text = LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: freeze")
    text = text.format(folder=".") + "freeze_trainable_layers: 3\n"
    recipe = converted("freeze.yaml", text).recipe
    assert rules(recipe)[2] == {"match": "llm.*", "how": "last_layers", "layers": 3}


def test_ms_swift() -> None:
    written = converted("train.sh", SWIFT)
    recipe = written.recipe
    assert written.framework == "ms-swift"
    model = recipe.model.model_dump(exclude_unset=True)
    assert model == {
        "kind": "native",
        "pretrained": "Qwen/Qwen2.5-VL-7B-Instruct",
        "max_pixels": 1003520,
        "llm": {"quantize": "nf4"},
    }
    assert recipe.data.template == "own"
    assert [source.model_dump(exclude_unset=True) for source in recipe.data.train] == [
        {"kind": "file", "path": "rows.jsonl", "limit": 500},
        {"kind": "dataset", "name": "some/set", "config": "part"},
    ]
    assert recipe.data.validation[0].model_dump()["path"] == "held_out.jsonl"
    assert recipe.data.overlong == "drop" and recipe.data.max_length == 4096
    train = recipe.train
    assert (train.steps, train.schedule.warmup, train.learning_rate) == (400, 0.05, 2e-4)
    assert (train.weight_decay, train.betas) == (0.1, [0.9, 0.95])
    connector = recipe.tune[1]
    assert (connector.how, connector.learning_rate) == ("lora", 2e-5)
    assert (connector.r, connector.lora_alpha) == (8, 32)
    assert recipe.engine.model_dump()["stage"] == 3
    missing = reasons(written)
    assert set(missing) == {"neftune_noise_alpha", "new_special_tokens"}
    assert "keeps its vocabulary" in missing["new_special_tokens"]
    assert "its config is not on this machine" in written.path.read_text()
    assert "ms-swift's default of weight_decay" in written.path.read_text()


def test_ms_swifts_args_json_lists_what_was_set_and_no_defaults() -> None:
    values = {
        "model": "llava-hf/llava-1.5-7b-hf",
        "train_type": "lora",
        "dataset": ["rows.jsonl"],
        "split_dataset_ratio": 0.05,
        "lora_rank": 8,
        "target_modules": ["all-linear"],
        "adam_epsilon": 1e-08,
        "loss_scale": "default",
        "sequence_parallel_size": 1,
        "lisa_step_interval": 20,
        "vera_rank": 256,
        "adapters": [],
        "freeze_parameters_ratio": 0.0,
        "swift_version": "3.8",
        "target_regex": None,
        "max_pixels": 602112,
        "remove_unused_columns": True,
        "dataloader_pin_memory": True,
        "warmup_ratio": 0.0,
        "attn_impl": "flash_attn",
        "something_new": 3,
    }
    written = converted("args.json", json.dumps(values))
    assert set(reasons(written)) == {"max_pixels", "something_new"}
    assert "no key of a recipe is known" in reasons(written)["something_new"]
    assert written.recipe.data.split is not None
    assert written.recipe.data.split.validation == 0.05


def test_gemma_3s_connector_trains_in_full_where_others_do_by_lora() -> None:
    """It is one matrix in no linear layer."""
    text = SWIFT.replace("Qwen/Qwen2.5-VL-7B-Instruct", "google/gemma-3-4b-it")
    text = text.replace("qwen2_5_vl", "gemma3_vision").replace("MAX_PIXELS=1003520 ", "")
    written = converted("train.sh", text)
    assert [rule.how for rule in written.recipe.tune] == ["frozen", "full", "lora"]
    assert written.recipe.tune[1].learning_rate == 2e-5
    assert "it is one matrix in no linear layer, so not by LoRA" in written.path.read_text()


def test_trl() -> None:
    written = converted("sft.yaml", TRL)
    recipe = written.recipe
    assert written.framework == "TRL"
    assert recipe.model.llm.quantize == "nf4"
    assert recipe.data.train[0].model_dump()["name"] == "some/llava-mix"
    assert recipe.tune[2].model_dump(exclude_none=True) == {
        "match": "llm.*",
        "how": "lora",
        "r": 64,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    assert recipe.train.learning_rate == 1.4e-5
    assert recipe.train.epochs == 3.0 and recipe.train.gradient_checkpointing
    assert set(reasons(written)) == {"optim", "push_to_hub", "warmup_steps"}


def test_trl_tunes_the_tower_too_where_it_takes_all_linear_layers() -> None:
    text = TRL.replace("[q_proj, v_proj]", "all-linear")
    assert [rule.how for rule in converted("sft.yaml", text).recipe.tune] == [
        "lora",
        "lora",
        "lora",
    ]
    full = TRL.replace("use_peft: true", "").replace("load_in_4bit: true", "")
    full = "\n".join(line for line in full.splitlines() if not line.startswith("lora"))
    recipe = converted("full.yaml", full, force=True).recipe
    assert [rule.how for rule in recipe.tune] == ["full"] * 3


def test_llava() -> None:
    written = converted("finetune_lora.sh", LLAVA)
    recipe = written.recipe
    assert written.framework == "LLaVA"
    model = recipe.model.model_dump()
    assert model["tower"]["name"] == "openai/clip-vit-large-patch14-336"
    assert (model["tower"]["layer"], model["tower"]["resize"]) == (-2, "pad")
    assert model["connector"]["kind"] == "mlp" and model["connector"]["depth"] == 2
    assert model["llm"]["name"] == "lmsys/vicuna-7b-v1.5"
    assert recipe.data.train[0].model_dump()["image_root"] == "./images"
    assert [rule.how for rule in recipe.tune] == ["frozen", "full", "lora"]
    assert recipe.tune[1].learning_rate == 2e-5
    assert recipe.train.trackers == ["wandb"]
    assert recipe.engine.model_dump()["stage"] == 3
    assert set(reasons(written)) == {"pretrain_mm_mlp_adapter"}


def test_a_projector_alone_is_trained_where_llava_does() -> None:
    text = LLAVA.replace("--lora_enable True", "--tune_mm_mlp_adapter True")
    recipe = converted("pretrain.sh", text).recipe
    assert [rule.how for rule in recipe.tune] == ["frozen", "full", "frozen"]


# --- the data and the model -----------------------------------------------------------------------


def test_data_that_is_here_is_checked(tmp_path: Path) -> None:
    rows = write_color_rows(tmp_path)
    text = TRL.replace("some/llava-mix", str(rows))
    done = converted("sft.yaml", text)
    assert done.report is None and "no tokenizer" in str(done.unchecked)


def test_another_model_may_be_taken_and_the_rest_stays() -> None:
    text = SWIFT.replace("--quant_method bnb --quant_bits 4", "")
    written = converted("train.sh", text, model="google/flan-t5-xl", tower="ViT-L-14:openai")
    model = written.recipe.model.model_dump()
    assert model["llm"] | {"kind": "seq2seq", "name": "google/flan-t5-xl"} == model["llm"]
    assert model["tower"]["pretrained"] == "openai"
    assert written.recipe.data.template == "flan" and written.recipe.train.steps == 400
    assert "model" not in reasons(written)


def test_the_command_prints_what_has_no_counterpart() -> None:
    Path("sft.yaml").write_text(TRL)
    done = CliRunner().invoke(app, ["init", "--from", "sft.yaml"])
    assert done.exit_code == 0
    assert 'optim: "adafactor": AdamW is the only optimizer here' in done.output
    assert "check: not possible here: its data is not on this machine" in done.output
    done = CliRunner().invoke(app, ["init", "--from", "sft.yaml", "--force", "--json"])
    keys = [each["key"] for each in json.loads(done.stdout)["unmatched"]]
    assert keys == ["optim", "push_to_hub", "warmup_steps"]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "learning: 1\n", "is of none of the frameworks"),
        ("a.yaml", "lora_r: 4\nlora_target: all\n", "may be a configuration of"),
        ("a.yaml", "model: {}\ndata: {}\ntrain: {}\n", "is a recipe already"),
        ("a.yaml", "- 1\n", "holds a list"),
        ("a.yaml", "lora_r: 4\nlearning_rate: fast\n", "learning_rate: expected a number"),
        (
            "a.yaml",
            f"lora_r: 4\nlearning_rate: 1{'0' * 400}\n",
            "learning_rate: expected a number",
        ),
        ("a.yaml", "lora_r: 4\nbf16: perhaps\n", "bf16: expected true or false"),
        ("a.json", "[1]", "expected a mapping"),
        ("a.json", "{", "not JSON"),
        ("a.sh", "#!/bin/sh\necho hello\n", "no command with flags"),
        ("dpo_vlm.py", "import trl\n", "is a program, which is not run: --from takes"),
        (
            "a.yaml",
            "base_model: google/gemma-4-E2B-it\nadapter: lora\nlora_r: 16\nsequence_len: 2048\n",
            "is of axolotl, which is not read",
        ),
        (
            "a.sh",
            "swift sft --model x/y --task_type embedding\n",
            "task_type: 'embedding': a recipe",
        ),
        (
            "a.sh",
            "accelerate launch online_dpo_vlm.py --model_name_or_path x/y --use_peft\n",
            "trainer: 'online_dpo': the trainers of TRL that become a recipe are sft, dpo, kto",
        ),
        ("a.sh", "python 'train.py --x 1\n", "not a shell script"),
    ],
)
def test_what_is_no_configuration_is_an_error_with_its_place(
    name: str, text: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        converted(name, text)
    assert error.value.problems[0].where.startswith(name)
    assert not Path("recipe.yaml").exists()


@pytest.mark.parametrize("value", [-7, "x y", "a\0b", ["a", 3], {"k": {"k": "auto"}}, True, [[]]])
def test_odd_values_are_converted_or_refused_by_name(value: Any) -> None:
    """Keys whose values have an inner form."""
    odd = ("columns", "dataset", "datasets", "deepspeed", "interleave_probs", "target_modules")
    common = {"learning_rate": 1e-4, "output_dir": "out"}
    for frame in (
        {"finetuning_type": "lora", "mix_strategy": "interleave_under", "dataset": "a"},
        {"tuner_type": "lora", "split_dataset_ratio": 0.1},
        {"use_peft": True, "dataset_name": "a"},
        {"vision_tower": "a", "data_path": "rows.json"},
    ):
        for key in (*odd, *common, *frame):
            text = json.dumps({**common, **frame, key: value})
            try:
                converted("odd.json", text, force=True)
            except VlmTuneError as error:
                assert len(str(error)) > 10


def test_deepspeeds_own_configuration_is_read() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    Path("zero.json").write_text(json.dumps({"zero_optimization": zero}))
    engine = converted("train.sh", LLAVA.replace("./scripts/zero3.json", "zero.json")).recipe.engine
    assert engine.model_dump() | {"stage": 3, "offload": ["optimizer"]} == engine.model_dump()
    Path("zero.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    text = LLAVA.replace("./scripts/zero3.json", "zero.json")
    written = converted("train.sh", text, force=True)
    assert "says the ZeRO stage" in reasons(written)["deepspeed"]


def test_a_missing_configuration_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no such file"):
        vlm_tune.init(configuration="gone.yaml")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"file_name": "a.json", "tags": "role"}, "tags: expected an object, got 'role'"),
        ({"file_name": "a.json", "columns": ["q"]}, "columns: expected an object"),
        ({"file_name": "a.json", "columns": {"prompt": ["q"]}}, "prompt: expected a text"),
        ({"file_name": ["a.json"]}, "file_name: expected a text"),
        ({"hf_hub_url": "a/b", "split": {"a": 1}}, "split: expected a text"),
    ],
)
def test_a_description_of_a_data_set_of_other_kinds_is_refused(
    about: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    described = json.dumps({"shapes": about, "colors": {"file_name": "colors.json"}})
    (tmp_path / "data" / "dataset_info.json").write_text(described)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        converted("lora.yaml", LLAMA_FACTORY.format(folder=tmp_path))
    assert "dataset_info.json: shapes" in str(error.value)


def test_both_switches_of_bf16_are_read() -> None:
    text = LLAMA_FACTORY.format(folder="nowhere") + "pure_bf16: true\n"
    assert "pure_bf16" not in reasons(converted("lora.yaml", text, force=True))
