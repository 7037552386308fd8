"""`init --from` of shell scripts: quotes, comments, variables, arithmetic, launchers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_tune.errors import RecipeError
from vlm_tune.recipe_writer.converting.reading import read_configuration

SCRIPT = """
#!/bin/bash
SYSTEM="Think first.
# Then say \\"done\\" for \\$5:
#### 42"
nproc=4
SETS='a.jsonl b.jsonl#50'
python prepare.py --everything now   # no training
pip install trl -U

NPROC_PER_NODE=$nproc \\
swift rlhf \\
    --rlhf_type grpo --model some/model \\
    --external_plugins plugin/gsm8k.py \\
    --dataset $SETS --system "$SYSTEM" \\
    --columns '{"answer": "$x"}' \\
    --gradient_accumulation_steps $(expr 16 / $nproc) \\
    --save_steps $((nproc * (2 + 3))) --eval_steps "$(( 7 % 4 ))" \\
    --warmup_steps $(unknown thing) --run_name ${NAME:-first} | tee log.txt
"""


def test_a_script_is_read_as_the_shell_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    path.write_text(SCRIPT.lstrip())
    assert read_configuration(path) == {
        "rlhf_type": "grpo",
        "model": "some/model",
        "external_plugins": "plugin/gsm8k.py",
        "dataset": ["a.jsonl", "b.jsonl#50"],
        "system": 'Think first.\n# Then say "done" for $5:\n#### 42',
        "columns": '{"answer": "$x"}',
        "gradient_accumulation_steps": "4",
        "save_steps": "20",
        "eval_steps": "3",
        "warmup_steps": "$(unknown thing)",
        "run_name": "first",
    }


def test_the_flags_of_a_launcher_are_not_those_of_its_script(tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    path.write_text("accelerate launch --num_processes 2 sft.py --learning_rate 1e-4\n")
    assert read_configuration(path) == {"learning_rate": "1e-4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swift sft examples/sft.yaml", "it names examples/sft.yaml: give that file"),
        ("echo 'never closed\n--a b", "No closing quotation"),
    ],
)
def test_scripts_without_a_training_command(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_configuration(tmp_path / "train.sh")
