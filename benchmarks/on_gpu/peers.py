"""The peers' training steps on the same rows and weights: TRL, and transformers' Seq2SeqTrainer.

They run in the environment of this process; their model classes and collators are those of
`benchmarks/peers`, which the comparison on a CPU runs in environments of their own.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.on_gpu.material import EACH, RANK, material, shape
from benchmarks.on_gpu.measuring import (
    TRIAL_STEPS,
    TRIAL_WARM,
    Steps,
    best_batch,
    device_type,
    memory_gb,
    or_out_of_memory,
    steps_of,
)
from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.work import Useful
from benchmarks.ours import Amount
from benchmarks.peers import SCRIPTS, probe

ASSISTANT_MASKS = (5, 18)
"""transformers from which TRL takes `assistant_only_loss` for rows with images."""

STARTS = {"turns": 2, "rows": 8}
MOST = {"turns": 128, "rows": 512}

WORKERS = 8
"""Loader processes of a tuned peer, so that it does not wait for images."""


def peer_script(name: str) -> Any:
    """A module of `benchmarks/peers`; they import one another as scripts do."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


class Counting(transformers.TrainerCallback):
    """Marks the clock after each step, and keeps the labels and masks that a model was given.

    They are counted after the steps: that takes no time of theirs.
    """

    def __init__(self, *, seq2seq: bool, questions_a_row: int | None = None) -> None:
        """Counts questions by their answers, or as given where later questions are supervised."""
        self.seq2seq = seq2seq
        self.questions_a_row = questions_a_row
        self.steps = Steps(0)
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def restart(self, batch: int) -> None:
        """Forgets what was measured."""
        self.steps = Steps(batch)
        self.inputs = []

    def note(self, inputs: dict[str, Any]) -> None:
        """Keeps what counts of a batch."""
        self.inputs.append((inputs["labels"], inputs["attention_mask"]))

    def on_train_begin(self, *unused: Any, **named: Any) -> None:
        self.steps.begin()

    def on_step_end(self, *unused: Any, **named: Any) -> None:
        self.steps.clock.mark()

    def count(self) -> None:
        """Counts the batches: one a step, with an image in each row."""
        self.steps.end()
        for labels, mask in self.inputs:
            counts = probe.counts(labels.tolist(), mask.tolist(), self.seq2seq)
            names = Amount.__dataclass_fields__
            self.steps.amounts.append(Amount(**{name: counts[name] for name in names}))
            a_row = self.questions_a_row
            self.steps.questions.append(
                counts["questions"] if a_row is None else len(labels) * a_row
            )
            self.steps.padded.append(counts["padded"])
            self.steps.images.append(len(labels))


def counted_by(counting: Counting, trainer: type[Any]) -> type[Any]:
    """A trainer's class, whose batches are noted."""

    class Counted(trainer):
        """The trainer as it is."""

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            counting.note(inputs)
            return super().compute_loss(model, inputs, *rest, **named)

    return Counted


@dataclass
class Peer:
    """A trainer whose model is loaded once and trained with several batches."""

    trainer: Any
    counting: Counting
    useful: Useful

    def measure(self, batch: int | None, counted: tuple[int, int]) -> dict[str, Any]:
        """The figures of some steps, of which the first don't count; None is the default batch."""
        trainer = self.trainer
        trainer.args.max_steps = sum(counted)
        trainer.args.per_device_train_batch_size = batch or trainer.args.train_batch_size
        trainer._train_batch_size = trainer.args.train_batch_size  # read by `train`
        trainer.optimizer = trainer.lr_scheduler = None
        self.counting.restart(trainer.args.train_batch_size)
        try:
            trainer.train()
        finally:
            # Without the autocast that the next call would wrap once more.
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        self.counting.count()
        return self.counting.steps.figures(self.useful, counted[0])


def trl(report: Report) -> None:
    """SFTTrainer: with its defaults, or the best batch of tuned settings.

    Options: `form` is `rows` (a question) or `turns` (an image with its questions as turns);
    `tuned` takes bf16 weights, no checkpointing, Liger's kernels and loader processes; `compiled`
    is TrainingArguments' `torch_compile` instead of Liger.
    """
    options = report.options
    form, tuned = options["form"], options["tuned"]
    name = f"{options['shape']} trl {form}{' tuned' * (tuned and form == 'rows')}"
    name = f"{options['shape']} peft compiled" if options.get("compiled") else name
    settings = language_settings(report) if tuned else {}
    with tempfile.TemporaryDirectory() as output:
        try:
            _best(report, name, _trl_peer(report, output, settings), form, searches=tuned)
        except Exception as error:
            if not settings.get("use_liger_kernel"):
                raise
            report.note(f"TRL does not run with Liger's kernels here ({error}): without them")
            _best(report, name, _trl_peer(report, output, {}), form, searches=tuned)


def _best(report: Report, name: str, peer: Peer, form: str, *, searches: bool) -> None:
    """Measures the best batch, or with `searches` off the peer's default one."""
    if not searches:
        report.row(name, **peer.measure(None, steps_of(report)))
        return

    def trial(batch: int) -> Any:
        return or_out_of_memory(lambda: peer.measure(batch, (TRIAL_WARM, TRIAL_STEPS)))

    most = STARTS[form] if report.tiny else MOST[form]
    batch, trials = best_batch(trial, STARTS[form], most, memory_gb())
    report.row(name, **peer.measure(batch, steps_of(report)), trials=trials)


def language_settings(report: Report) -> dict[str, Any]:
    """Arguments of SFTConfig that make it faster here."""
    if report.options.get("compiled"):
        return {} if report.tiny else {"torch_compile": True}
    try:
        importlib.import_module("liger_kernel")
    except ImportError:
        report.note("liger-kernel is not installed: the peer runs without its kernels")
        return {}
    return {"use_liger_kernel": device_type() == "cuda"}


def trl_rows(home: Path, form: str, report: Report) -> Any:
    """The rows as TRL takes them.

    Of turns all answers are supervised. With a transformers whose masks TRL does not take, they are
    a prompt and one completion, whose later questions are supervised too: about 30 tokens an image.
    """
    from datasets import Dataset, Image, Sequence

    rows: Any = probe.read_rows(
        {"material": str(home), "rows": "single" if form == "rows" else "multi"}
    )
    if form == "rows" or not assistant_masks():
        first = [row["messages"][:1] for row in rows]
        rest = [row["messages"][1:] for row in rows]
        rows = [
            {"prompt": prompt, "completion": completion, "images": row["images"]}
            for prompt, completion, row in zip(first, rest, rows, strict=True)
        ]
        if form == "turns":
            report.note(
                f"transformers {transformers.__version__} has no masks that TRL takes: "
                "later questions of a turn are supervised too"
            )
    return Dataset.from_list(rows).cast_column("images", Sequence(Image()))


def assistant_masks() -> bool:
    """Whether TRL takes `assistant_only_loss` for rows with images."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return version >= ASSISTANT_MASKS


def _trl_peer(report: Report, output: str, settings: dict[str, Any]) -> Peer:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    options = report.options
    kind = shape(options["shape"], tiny=report.tiny)
    home = material(report.folder, options["shape"], tiny=report.tiny)
    spans_later_questions = options["form"] == "turns" and not assistant_masks()
    counting = Counting(seq2seq=False, questions_a_row=EACH if spans_later_questions else None)
    overrides: dict[str, Any] = {}
    if options["tuned"]:
        overrides = {
            **settings,
            "model_init_kwargs": {"dtype": "bfloat16"},
            "gradient_checkpointing": False,
            "dataloader_num_workers": WORKERS if device_type() == "cuda" else 0,
        }
    trainer = counted_by(counting, SFTTrainer)(
        model=str(home / "llava"),
        args=SFTConfig(
            assistant_only_loss=options["form"] == "turns" and assistant_masks(),
            max_length=None,
            **common_arguments(output),
            **overrides,
        ),
        train_dataset=trl_rows(home, options["form"], report),
        peft_config=LoraConfig(
            r=RANK,
            lora_alpha=32,
            target_modules=peer_script("train_trl").TARGETS,
            modules_to_save=["multi_modal_projector"],
        ),
        callbacks=[counting],
    )
    text, vision = kind.configs()
    # transformers runs all blocks of the tower; those that LLaVA does not use are no useful work.
    return Peer(trainer, counting, Useful.of(text, vision, blocks=kind.blocks, rank=RANK))


def common_arguments(output: str) -> dict[str, Any]:
    """Arguments of every trainer: nothing is saved, logged or shown."""
    return {
        "output_dir": output,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device_type() == "cpu",
        "disable_tqdm": True,
    }


def seq2seq(report: Report) -> None:
    """Seq2SeqTrainer on a T5 behind a CLIP tower: bf16, no checkpointing, the best batch."""
    with tempfile.TemporaryDirectory() as output:
        _best(report, "t5-xl seq2seq", _seq2seq_peer(report, output), "rows", searches=True)


def _seq2seq_peer(report: Report, output: str) -> Peer:
    from peft import LoraConfig, get_peft_model

    script = peer_script("train_seq2seq")
    kind = shape("t5-xl", tiny=report.tiny)
    home = material(report.folder, "t5-xl", tiny=report.tiny)
    counting = Counting(seq2seq=True)
    tower = transformers.CLIPVisionModel.from_pretrained(home / "tower", dtype=torch.bfloat16)
    language: Any = transformers.T5ForConditionalGeneration.from_pretrained(
        home / "t5", dtype=torch.bfloat16
    )
    adapters = LoraConfig(
        r=RANK, lora_alpha=32, target_modules=script.TARGETS, task_type="SEQ_2_SEQ_LM"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "t5")
    images = transformers.CLIPImageProcessor.from_pretrained(home / "llava")
    rows: Any = probe.read_rows({"material": str(home), "rows": "single"})
    trainer = counted_by(counting, transformers.Seq2SeqTrainer)(
        model=script.Reader(tower, get_peft_model(language, adapters)),
        args=transformers.Seq2SeqTrainingArguments(
            remove_unused_columns=False,
            bf16=True,
            dataloader_num_workers=WORKERS if device_type() == "cuda" else 0,
            **common_arguments(output),
        ),
        train_dataset=rows,
        data_collator=script.collator(tokenizer, images, kind.image_tokens),
        callbacks=[counting],
    )
    text, vision = kind.configs()
    useful = Useful.of(text, vision, blocks=kind.blocks, rank=RANK, seq2seq=True)
    return Peer(trainer, counting, useful)
