"""Records the exact outputs of tiny runs, and compares those of two commits.

Run: python dev/characterise.py [--against COMMIT]

Ten tiny recipes (a decoder and a T5 with LoRA, in full, in nf4 and packed; two stages; two
processes) are checked, planned, trained, evaluated, merged, exported and chatted with from the
command line, with each value of VLM_TUNE_KERNELS. The record of a run is every printed JSON, the
trace of losses and samples, and the sha256 of every file of tensors.

Bits differ between kinds of machines and releases of libraries, so records of different machines
are not compared: `--against` (by default HEAD) first records that commit on this machine, once, in
the cache folder, and then the working tree. The exit code is 1 if anything differs. `--record FILE`
only writes the working tree's record.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODES = ("auto", "reference", "emulate")
COLORS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 200),
    "yellow": (220, 210, 40),
}
WIDTH = 64
"""Width of every layer; the kernels need a multiple of 32."""

LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LORA = {"match": "llm.*", "how": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
FULL = {"match": "llm.*", "how": "full"}

NOISE = re.compile(
    r"second|_s$|per_s|^ms_|time|memory|_mb$|_gb|free|bytes|stall|wait|tflop|^rate$|^left$|mfu|date"
    r"|fingerprint|^loading$|^needed$"
)
"""Keys of printed JSON whose values depend on time, the machine or paths."""


# --- the recipes --------------------------------------------------------------------------------


def recipe(
    kind: str, rule: dict[str, Any], *, base: str | None = None, **data: Any
) -> dict[str, Any]:
    """A recipe of a tiny CLIP tower and a tiny decoder ("causal") or T5 ("seq2seq").

    The language model starts from scratch, or from the folder `base`.
    """
    model_type, config = (
        ("llama", LLAMA | {"max_position_embeddings": 512}) if kind == "causal" else ("t5", T5)
    )
    scratch = {"model_type": model_type, "vocab_size": 416, "config": config}
    llm = {"name": base, "quantize": "nf4"} if base else {"scratch": scratch}
    return {
        "name": "golden",
        "output": "run",
        "seed": 3,
        "model": {
            "tower": {"kind": "transformers", "name": "clip", "image_size": 32},
            "connector": {"kind": "mlp"},
            "llm": {"kind": kind, **llm},
        },
        "data": {
            "template": "chatml" if kind == "causal" else "flan",
            "max_length": 256,
            "workers": 0,
            "train": [{"kind": "file", "path": "rows.jsonl"}],
            "validation": [{"kind": "file", "path": "rows.jsonl", "limit": 6}],
            "group": "image",
            **data,
        },
        "tune": [
            {"match": "tower.*", "how": "frozen"},
            {"match": "connector.*", "how": "full"},
            rule,
        ],
        "train": {
            "steps": 24,
            "batch_size": 2,
            "learning_rate": 0.01,
            "precision": "bf16",
            "log_every": 4,
        },
        "evaluate": {"max_new_tokens": 6, "samples": 2, "every": 12},
    }


def recipes() -> dict[str, dict[str, Any]]:
    """All recipes by name. The quantised ones are trained over the merged LoRA runs."""
    by_name: dict[str, dict[str, Any]] = {}
    for kind, name in (("causal", "decoder"), ("seq2seq", "t5")):
        by_name[f"{name}-lora"] = recipe(kind, LORA)
        by_name[f"{name}-full"] = recipe(kind, FULL)
        by_name[f"{name}-nf4"] = recipe(kind, LORA, base=f"../{name}-lora/merged/llm")
        by_name[f"{name}-packed"] = recipe(kind, LORA, packing=True, row_length=256)
    by_name["stages"] = recipe("causal", LORA) | {
        "stages": [
            {
                "name": "align",
                "tune": [{"match": "connector.*", "how": "full"}, {"match": "*", "how": "frozen"}],
            },
            {"name": "instruct", "train": {"steps": 12}},
        ]
    }
    by_name["two-processes"] = recipe("causal", LORA)
    return by_name


def commands(name: str) -> list[list[str]]:
    """The commands that are run for a recipe, in order."""
    ranks = ["--processes", "2"] if name == "two-processes" else []
    lines = [
        ["check", "recipe.yaml"],
        ["plan", "recipe.yaml"],
        ["sft", "recipe.yaml", *ranks],
        ["show", "recipe.yaml", "-n", "2", "--ids"],
    ]
    lines += [["eval", "run", "--split", "validation", "--answers", "answers.jsonl"]]
    lines += [
        [
            "chat",
            "run",
            "--image",
            "red.png",
            "--prompt",
            "what color is it?",
            "--max-new-tokens",
            "6",
        ]
    ]
    if "full" not in name:
        lines += [["merge", "run", "--output", "merged", "--tolerance", "10"]]
    if "nf4" in name:
        lines += [["export", "run", "--format", "adapter", "--output", "adapter"]]
    if name.startswith("decoder"):
        lines += [["export", "run", "--output", "llava", "--dtype", "fp32"]]
    if name in ("decoder-lora", "t5-full"):
        lines += [["verify-run", "run"]]
    return [[*line, "--json"] for line in lines]


def write_material(folder: Path) -> None:
    """Writes images, rows about them, and a tower of random weights."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    rows = []
    for place, (name, color) in enumerate(COLORS.items()):
        image = Image.new("RGB", (32, 32), color)
        image.putpixel((place, 3 * place), (255, 255, 255))
        image.save(folder / f"{name}.png")
        for question, answer in (
            ("what color is it?", name),
            ("is it red?", "yes" if name == "red" else "no"),
            ("name the shape", "square"),
        ):
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            rows.append({"id": f"{name}-{answer}", "messages": turns, "images": [f"{name}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder / "clip")
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(
        folder / "clip"
    )


# --- recording ----------------------------------------------------------------------------------


def record_run(name: str, folder: Path) -> dict[str, Any]:
    """Runs a recipe's commands in `folder`, in this process, and returns their record."""
    from vlm_tune.cli import main

    write_material(folder)
    (folder / "recipe.yaml").write_text(json.dumps(recipes()[name], indent=1))
    printed: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for line in commands(name):
            output = io.StringIO()
            errors = io.StringIO()
            sys.argv = ["vlm-tune", *line]
            code: Any = 0
            with capture(output, errors):
                try:
                    main()
                except SystemExit as ended:
                    code = ended.code or 0
            last = output.getvalue().strip().splitlines()[-1:] or ["null"]
            key = " ".join(line)
            printed[key] = {
                "exit code": code,
                "printed": without_noise(json.loads(last[0]), folder),
            }
            if code:
                printed[key]["errors"] = errors.getvalue()[-2000:].replace(str(folder), "")
    return {"printed": printed, "trace": trace(folder), "files": digests(folder)}


@contextlib.contextmanager
def capture(output: io.StringIO, errors: io.StringIO) -> Iterator[None]:
    """Captures what Python prints, and what child processes write to the file descriptor."""
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            output.write(file.read())


def without_noise(value: Any, folder: Path) -> Any:
    """A JSON value without times, sizes of this machine's memory, and paths."""
    if isinstance(value, dict):
        return {
            key: without_noise(each, folder) for key, each in value.items() if not NOISE.search(key)
        }
    if isinstance(value, list):
        return [without_noise(each, folder) for each in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def trace(folder: Path) -> list[Any]:
    """The run's log and its stages' traces.

    They hold each step's loss, gradient norm and samples, and each evaluation's scores.
    """
    paths = sorted(folder.glob("run/**/*.jsonl"))
    return [
        [path.name, without_noise(json.loads(line), folder)]
        for path in paths
        for line in path.read_text().splitlines()
    ]


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every tensor file and tokenizer of a run, a merge or an export."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".jinja") or path.name == "tokenizer.json"
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }


def record(tree: Path, modes: list[str], names: list[str]) -> dict[str, Any]:
    """The record of a checkout by mode and recipe. Each run is its own process on one thread."""
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        cache.mkdir(mode=0o700)
        # Compiled parts are shared: their names have a hash of what they were compiled from.
        compiled = Path(tempfile.gettempdir()) / f"vlm_tune-golden-{os.getuid()}"
        compiled.mkdir(mode=0o700, exist_ok=True)
        (cache / "kernels").symlink_to(compiled)
        for mode in modes:
            for name in names:
                print(f"{mode}: {name}", file=sys.stderr, flush=True)
                folder = Path(scratch) / mode / name
                folder.mkdir(parents=True)
                out = Path(scratch) / "out.json"
                variables = {
                    "VLM_TUNE_KERNELS": mode,
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": str(tree),
                }
                variables["VLM_TUNE_CACHE"] = str(cache)
                command = [sys.executable, __file__, "--one", name, str(folder), str(out)]
                done = subprocess.run(
                    command,
                    env=os.environ | variables,
                    cwd=tree,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}")
                records[f"{mode}/{name}"] = json.loads(out.read_text())
    return records


def record_commit(commit: str, modes: list[str], names: list[str]) -> dict[str, Any]:
    """The record of a commit on this machine, from the cache folder if it is there."""
    sha = subprocess.run(
        ["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    key = hashlib.sha256(
        json.dumps([sha, Path(__file__).read_text(), modes, names]).encode()
    ).hexdigest()[:16]
    path = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "vlm_tune"
        / "golden"
        / f"{key}.json"
    )
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            subprocess.run(
                ["git", "worktree", "add", "--quiet", "--detach", str(tree), sha],
                cwd=ROOT,
                check=True,
            )
            try:
                records = record(tree, modes, names)
            finally:
                subprocess.run(
                    ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1))
    return json.loads(path.read_text())


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yields each place where two records differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in after or key not in before:
                yield f"{place}/{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif before != after:
        yield f"{place}: {json.dumps(before)[:200]} -> {json.dumps(after)[:200]}"


def main() -> int:
    """Records and compares; returns 1 if something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against", default="HEAD", help="the commit to compare the working tree with"
    )
    parser.add_argument(
        "--record",
        type=Path,
        help="write the working tree's record to this file, and compare nothing",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--names", nargs="+", choices=list(recipes()), default=list(recipes()))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # A quantised run is trained over its merged LoRA run, so that one runs too, and first.
    bases = {name.replace("-nf4", "-lora") for name in options.names if name.endswith("-nf4")}
    options.names = [name for name in recipes() if name in bases or name in options.names]
    if options.one:
        name, folder, out = options.one
        Path(out).write_text(json.dumps(record_run(name, Path(folder))))
        return 0
    if options.record:
        options.record.write_text(json.dumps(record(ROOT, options.modes, options.names), indent=1))
        return 0
    before = record_commit(options.against, options.modes, options.names)
    changes = list(differences(before, record(ROOT, options.modes, options.names)))
    print("\n".join(changes) or f"{len(before)} runs are the same")
    return int(bool(changes))


if __name__ == "__main__":
    sys.exit(main())
