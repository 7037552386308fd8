"""Tiny models and runs that the tests of model, training, evaluation and merging share."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from vlm_tune.config.data import DataSection, FileSource
from vlm_tune.config.grpo import Grpo
from vlm_tune.config.load import parse_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import task_rule
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.batching.loader import PreparedFeed
from vlm_tune.data.batching.prompts import PromptFeed
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.job import distinct_tasks
from vlm_tune.data.prepare.run import conversations, prepare
from vlm_tune.data.types import Conversation, Example, Media
from vlm_tune.errors import Interrupted
from vlm_tune.events import Evaluation, Event, StageReport, TrainSteps
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.lora import is_trained_adapter
from vlm_tune.model.optimizer_groups import Tuned, tune_similarity
from vlm_tune.model.pretrained.tokenizer import train_tokenizer
from vlm_tune.model.tuning import apply_rules
from vlm_tune.precision import DTYPES
from vlm_tune.train.accelerator import MIXED
from vlm_tune.train.checkpoint import Progress
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.stage_data import StageData
from vlm_tune.train.trainer import StageLoop

# The first backward pass of a process decides whether autograd starts threads for devices. After
# a fake CUDA tensor, as a plan makes them, it does, and then no fork of the process can run a
# backward pass, as commands in tests do.
torch.ones(1, requires_grad=True).sum().backward()

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
LORA_TUNE = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, lora_alpha: 8, target_modules: all-linear}
train:"""
"""Replaces `train:` of a tiny recipe together with what `with_tune` cuts."""


def with_tune(recipe: str, tune: str = LORA_TUNE) -> str:
    """A tiny recipe's text with other tuning rules; `tune` ends in `train:`."""
    head, _, rest = recipe.partition("\ntune:")
    return head + tune + rest.partition("\ntrain:")[2]


def parsed(text: str, **changes: Any) -> Recipe:
    """A recipe from text, with `a__b=value` set as `a.b`."""
    from vlm_tune.config.yaml_source import apply_override, read_yaml_text

    if not changes:
        return parse_recipe(text)
    from vlm_tune.config.load import check_recipe

    located = read_yaml_text(text, "recipe")
    for name, value in changes.items():
        apply_override(located, f"{name.replace('__', '.')}={json.dumps(value)}")
    return check_recipe(located)


def rows_of(recipe: Recipe) -> list[Conversation]:
    """The recipe's training conversations."""
    return list(conversations(recipe.data, recipe.data.train, recipe.seed))


def prepare_rows(path: Path, rows: Sequence[Any], processor: Processor, **options: Any) -> Prepared:
    """Rows (conversations, or dicts written unchanged) as a JSONL file of messages, prepared."""
    written = []
    for number, row in enumerate(rows):
        if isinstance(row, Conversation):
            turns = [
                {"role": m.role, "content": [_part(part, path.parent) for part in m.parts]}
                for m in row.messages
            ]
            row = {"id": row.id or str(number), "messages": turns, "category": row.category}
        written.append(json.dumps(row) + "\n")
    path.write_text("".join(written))
    data = DataSection(
        train=[FileSource(kind="file", path=str(path), form="messages")],
        template=processor.template.name,
        **options,
    )
    limited = data.model_copy(
        update={"max_length": options.get("max_length", processor.spec.max_length)}
    )
    return prepare(limited, limited.train, processor, seed=0)


def _part(part: str | Media, folder: Path) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    name = f"{hashlib.sha256(part.read()).hexdigest()[:12]}.png"
    (folder / name).write_bytes(part.read())
    return {"type": "image", "image": name}


def examples_of(prepared: Prepared) -> list[Example]:
    """Every example of prepared rows, in order."""
    return [prepared.store[number] for number in range(len(prepared.store))]


def units_of(prepared: Prepared) -> list[list[Example]]:
    """Every unit of prepared rows, in order."""
    return [prepared.unit(number) for number in range(len(prepared))]


def png(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 32)) -> Media:
    """A plain image by its bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return Media(buffer.getvalue())


def built(recipe: Recipe) -> VisionLanguageModel:
    """The recipe's model before training."""
    return build(recipe, rows_of(recipe), model_class=VisionLanguageModel)


def tuned_by(model: VisionLanguageModel, recipe: Recipe) -> Tuned:
    """The model with the recipe's tuning rules applied, and its objective's learned scale."""
    rate = recipe.train.learning_rate
    tuned = apply_rules(
        model,
        recipe.tune,
        learning_rate=rate,
        precision=DTYPES[recipe.train.precision],
        tasks=distinct_tasks(recipe.data.train),
    )
    tune_similarity(model, recipe.objective, tuned, rate)
    return tuned


def wake_adapters(model: VisionLanguageModel, scale: float = 0.3) -> None:
    """Gives every LoRA B a value that is not zero, so that the adapter changes the model."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if is_trained_adapter(name) and "lora_B" in name:
            parameter.data = (
                torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale
            )


def batch_of(model: VisionLanguageModel, examples: Sequence[Example]) -> Batch:
    """A batch with pixels."""
    return collate(examples, model.processor.spec, fetch=model.processor.images.inputs)


def loss_and_gradients(
    model: VisionLanguageModel, batches: Sequence[Batch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of batches and the gradients of what trains, by name."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        loss: Any = model(batch)
        loss.sum.backward()
        total += loss.sum.detach()
    return total, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same_outputs(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Asserts that two models that should be the same give the same, relative to the largest value.

    Kernels round otherwise where tensors lie at other addresses, so the same weights loaded twice
    need not give the same bits.
    """
    assert one.shape == other.shape and one.dtype == other.dtype
    scale = max(float(other.abs().max()), 1e-3)
    assert largest(one, other) <= tolerance * scale


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((one.float() - other.float()).abs().max())


def assert_close(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], relative: float = 1e-5
) -> None:
    """Asserts that two sets of tensors have the same names and agree.

    Differences are relative to each tensor's largest value.
    """
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        scale = max(float(value.abs().max()), float(other[name].abs().max()), 1e-3)
        assert largest(value, other[name]) <= relative * scale, name


def stage_loop(
    model: VisionLanguageModel,
    recipe: Recipe,
    folder: Path,
    *,
    cached: bool = False,
    report: StageReport | None = None,
) -> StageLoop:
    """A loop over the recipe's one stage, with its tuning rules applied, and no validation."""
    train = prepare(recipe.data, recipe.data.train, model.processor, seed=recipe.seed)
    tuned = tuned_by(model, recipe)
    features = tower_features(model, train.media) if cached else None
    by_task = task_rule(recipe.tune) is not None
    plan = Plan(train, recipe.data, Sizes.of(recipe.train), recipe.seed, by_task=by_task)
    fetch = features or PixelCache(model.processor.images)
    spec = model.processor.spec
    feed = PreparedFeed(train, plan, spec, fetch, cached=cached, augment=recipe.data.augment)
    if isinstance(recipe.objective, Grpo):
        feed = PromptFeed(train, plan, spec, fetch, cached=cached, processor=model.processor)
    AcceleratorState._reset_state()
    return StageLoop(
        model,
        recipe,
        tuned,
        StageData(feed, [], None),
        Engine(Accelerator(mixed_precision=MIXED[recipe.train.precision])),
        folder=folder,
        progress=Progress(),
        report=report or (lambda event: None),
        recipe_text="",
        stop=lambda: False,
    )


def one_step(
    recipe: Recipe,
    folder: Path,
    *,
    cached: bool = False,
    prepare_model: Callable[[Any], None] | None = None,
) -> Any:
    """The logged loss of one optimizer step through the loop, and its gradients."""
    model = built(recipe)
    events: list[Event] = []
    loop = stage_loop(model, recipe, folder, cached=cached, report=events.append)
    if prepare_model:
        prepare_model(model)
    gradients: dict[str, torch.Tensor] = {}

    def note(optimizer: Any, arguments: Any, named: Any) -> None:
        gradients.update(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )

    inner: Any = loop.engine.optimizer.optimizer
    inner.register_step_pre_hook(note)
    loop.run()
    return next(event.loss for event in events if isinstance(event, TrainSteps)), gradients


def interrupted(
    run: Callable[..., Any],
    *,
    stage: int,
    step: int,
    at: type[TrainSteps | Evaluation] = TrainSteps,
) -> list[Event]:
    """Calls `run(show=...)`, which must end as `Interrupted` when SIGINT comes at a step's event.

    Returns the events until then.
    """
    events: list[Event] = []

    def show(event: Event) -> None:
        events.append(event)
        if isinstance(event, at) and (event.stage, event.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)

    try:
        run(show=show)
    except Interrupted as error:
        assert error.exit_code == 130
        return events
    raise AssertionError("the run went on after SIGINT")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by file and name."""
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= {
            f"{path.relative_to(folder)}|{name}": value for name, value in load_file(path).items()
        }
    return tensors


def assert_same_bits(one: Path, other: Path) -> None:
    """Asserts that two folders hold the same tensors, bit for bit."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert first
    different = [
        name
        for name, value in first.items()
        if value.dtype != second[name].dtype or not torch.equal(value, second[name])
    ]
    assert different == [], different


def cli(*arguments: str, cwd: Path | None = None, code: int = 0, seconds: int = 400) -> str:
    """The standard output of `vlm-tune`; asserts its exit code.

    It runs in a fork of the test's process, which has imported already what a new one would spend
    seconds on.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        pid = os.fork()
        if pid == 0:
            _command_line(arguments, cwd, output.fileno(), errors.fileno())
        deadline, status = time.monotonic() + seconds, None
        while status is None and time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                status = None
                time.sleep(0.02)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        output.seek(0)
        errors.seek(0)
        out, err = output.read(), errors.read()
    assert status is not None, f"hangs; it printed {out[-2000:]}{err[-4000:]}"
    assert os.waitstatus_to_exitcode(status) == code, out[-2000:] + err[-4000:]
    return out


def _command_line(arguments: Sequence[str], cwd: Path | None, output: int, errors: int) -> None:
    """Runs `vlm-tune` in this process, a fork, with its output to these descriptors; ends it."""
    status: Any = 1
    try:
        for descriptor, place in ((output, 1), (errors, 2)):
            os.dup2(descriptor, place)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        if cwd is not None:
            os.chdir(cwd)
        AcceleratorState._reset_state(reset_partial_state=True)
        sys.argv = ["vlm-tune", *arguments]
        from vlm_tune.cli import main

        main()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    code: int = 0,
    seconds: int = 400,
    **environment: str,
) -> str:
    """A command's standard output; asserts its exit code, and that it ends."""
    everything = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=cwd,
        env=everything,
        start_new_session=True,
    )
    try:
        out, stderr = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, stderr = child.communicate()
        raise AssertionError(f"hangs; it said {out[-2000:]}{stderr[-4000:]}") from None
    assert child.returncode == code, out[-2000:] + stderr[-4000:]
    return out


def save_llm(
    folder: Path, kind: str, conversations: Sequence[Conversation], *, seed: int = 0, **config: Any
) -> Path:
    """A tiny Llama or T5 with its tokenizer in transformers' layout, for `model.llm.name`."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    tokenizer = train_tokenizer(
        conversations, 400, load_template("flan" if kind == "seq2seq" else "chatml")
    )
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
    }
    torch.manual_seed(seed)
    if kind == "seq2seq":
        model: Any = T5ForConditionalGeneration(
            T5Config(**{**T5, **ids, "decoder_start_token_id": tokenizer.pad_token_id, **config})
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(**{**LLAMA, **ids, "bos_token_id": tokenizer.bos_token_id, **config})
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_llm(recipe: str, folder: Path, kind: str, extra: str = "") -> str:
    """A tiny recipe's text whose language model is a saved one."""
    lines = [
        f"  llm: {{kind: {kind}, name: {folder}{extra}}}" if line.startswith("  llm:") else line
        for line in recipe.splitlines()
    ]
    return "\n".join(lines) + "\n"


def with_tower(recipe: str, tower: str) -> str:
    """A tiny recipe's text with another tower."""
    return (
        "\n".join(
            f"  tower: {tower}" if line.startswith("  tower:") else line
            for line in recipe.splitlines()
        )
        + "\n"
    )


def free_port() -> int:
    """A TCP port that nobody listens on (torchrun takes a given port as it is: 0 would hang)."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def unshifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, L] as transformers takes them.

    The token that a position predicts stands at the next one, so [B, L + 1].
    """
    return torch.nn.functional.pad(labels, (1, 0), value=-100)


def run_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The output of the Python in a folder's card, run as it is shown beside an image.

    It must be formatted as ruff formats.
    """
    (shown,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    script = folder.parent / "card.py"
    script.write_text(shown)
    # However long the path of this test's folder is.
    run(
        [
            sys.executable,
            "-m",
            "ruff",
            "format",
            "--isolated",
            "--line-length",
            "320",
            "--check",
            str(script),
        ]
    )
    run([sys.executable, "-m", "ruff", "check", "--isolated", str(script)])
    monkeypatch.chdir(folder.parent)
    (folder.parent / "image.png").write_bytes(png().read())
    capsys.readouterr()
    runpy.run_path(str(script))
    return capsys.readouterr().out
