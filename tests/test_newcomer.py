"""README.md from top to bottom, as a newcomer types it, in a fresh clone: `make newcomer`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LLAMA_FACTORY = """\
model_name_or_path: llava-hf/llava-1.5-7b-hf
stage: sft
finetuning_type: lora
dataset: mine
dataset_dir: .
template: llava
output_dir: saves/mine
"""

SERVED = """\
{command} & server=$!
for _ in $(seq 600); do
  kill -0 $server
  if python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:8000/health")' 2>/dev/null
  then break; fi
  sleep 0.2
done
python -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:8000/").status)'
kill -TERM $server
wait $server
"""
"""A server answers, and ends by a signal; the page opens."""


def script(readme: str) -> str:
    """README's blocks of commands and of Python as one script of bash.

    `make test` is left out: it is what runs this suite.
    """
    lines = ["set -e", "unset VIRTUAL_ENV"]
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", readme, re.M | re.S):
        if language == "python":
            lines += ["echo '::: python'", f"python - <<'END'\n{block}END"]
            continue
        for line in block.splitlines():
            command = shlex.join(shlex.split(line, comments=True))
            if not command or command == "make test":
                continue
            lines.append(f"echo ::: $SECONDS s: {shlex.quote(command)}")
            served = command.startswith("vlm-tune serve")
            lines.append(SERVED.format(command=command) if served else line)
    return "\n".join([*lines, "echo ::: $SECONDS s: end", ""])


def own_files(folder: Path) -> None:
    """What README calls the reader's: rows with images, and a configuration of LLaMA-Factory."""
    import easy_vqa

    images = easy_vqa.get_train_image_paths()
    rows = []
    (folder / "birds").mkdir()
    for text, answer, number in list(zip(*easy_vqa.get_train_questions(), strict=True))[:300]:
        name = f"{number}.png"
        shutil.copy(images[number], folder / name)
        rows.append({"image": name, "question": text, "answer": answer})
    for name in {row["image"] for row in rows[:20]}:
        shutil.copy(folder / name, folder / "birds" / f"{Path(name).stem}.jpg")
    shutil.copy(easy_vqa.get_test_image_paths()[1], folder / "shape.png")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    (folder / "rows.jsonl").write_text("".join(text.splitlines(keepends=True)[:20]))
    (folder / "lora_sft.yaml").write_text(LLAMA_FACTORY)
    columns = {"prompt": "question", "response": "answer", "images": "image"}
    info = {"mine": {"file_name": "train.jsonl", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.newcomer
def test_the_readme_runs_from_top_to_bottom_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "vlm_tune"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    own_files(clone)
    readme = (clone / "README.md").read_text(encoding="utf-8")
    places = os.environ["PATH"].split(os.pathsep)
    path = [place for place in places if not (Path(place) / "vlm-tune").exists()]
    environment = os.environ | {"PATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    lines = []
    with subprocess.Popen(
        ["bash", "-c", script(readme)],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        for line in shell.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    assert shell.returncode == 0, "".join(lines[-40:])
    assert not any("Traceback" in line for line in lines)
    scores = json.loads((clone / "runs/demo/result.json").read_text())
    assert scores["accuracy"] > 0.99
    for page in ("runs/demo/report.html", "recipe.yaml", "answers.jsonl", "vectors.npz"):
        assert (clone / page).is_file(), page
