"""docs/your-own-data.md: its commands and code run, in their order, in a folder like a user's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.own_data import color_images
from vlm_tune.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "your-own-data.md"


@pytest.mark.slow
def test_the_tutorial_runs_from_a_folder_of_images_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (name, image) in enumerate(color_images(5)):
        Path("colors", name).mkdir(parents=True, exist_ok=True)
        image.save(Path("colors", name, f"{number}.png"))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks].count("bash") == 3
    for language, block in blocks:
        if language == "bash":
            for line in block.splitlines():
                name, *arguments = shlex.split(line)
                assert name == "vlm-tune"
                done = CliRunner().invoke(app, arguments)
                assert done.exit_code == 0, (line, done.output)
        elif language == "yaml":
            assert block in Path("recipe.yaml").read_text()
        else:
            exec(compile(block, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip() in ("blue", "green", "red", "yellow")
    assert Path("runs/colors/report.html").is_file()
