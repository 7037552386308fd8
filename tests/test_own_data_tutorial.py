"""docs/your-own-data.md: its commands and code run, in their order, in a folder like a user's."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.own_data import color_images
from tests.helpers.served import serving
from vlm_tune.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "your-own-data.md"


@pytest.mark.slow
def test_the_tutorial_runs_from_a_folder_of_images_to_a_served_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (name, image) in enumerate(color_images(50)):
        Path("colors", name).mkdir(parents=True, exist_ok=True)
        image.save(Path("colors", name, f"{number}.png"))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks].count("bash") == 4
    url = "http://127.0.0.1:8000"
    servers: list[int] = []
    try:
        for language, block in blocks:
            if language == "bash":
                for line in block.splitlines():
                    name, *arguments = shlex.split(line)
                    assert name == "vlm-tune"
                    if arguments[0] == "serve":
                        url, pid = serving(Path(arguments[1]), tmp_path / "served")
                        servers.append(pid)
                        continue
                    done = CliRunner().invoke(app, arguments)
                    assert done.exit_code == 0, (line, done.output)
            elif language == "yaml":
                assert block in Path("recipe.yaml").read_text()
            else:
                code = block.replace("http://127.0.0.1:8000", url)
                exec(compile(code, str(PAGE), "exec"), {})
    finally:
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert servers
    chatted, served = capsys.readouterr().out.split()
    assert {chatted, served} <= {"blue", "green", "red", "yellow"}
    assert Path("runs/colors/report.html").is_file()
