"""The architecture as a test: imports point one way, and light commands load no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_import_contracts_hold() -> None:
    """The contracts of pyproject.toml.

    What they leave out is listed there, and an entry that no import needs is an error.
    """
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--no-logo",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_no_import_is_relative() -> None:
    for path in (ROOT / "vlm_tune").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), path


def run_without_torch(code: str) -> None:
    check = (
        "import sys\n"
        + code
        + "\nassert 'torch' not in sys.modules, 'torch was loaded'\nassert 'transformers' "
        "not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_import_and_recipe_reading_load_no_torch() -> None:
    run_without_torch("import vlm_tune")
    run_without_torch("from vlm_tune import load_recipe\nload_recipe('recipes/demo.yaml')")


def test_help_and_a_recipe_error_load_no_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("nme: x\n")
    for arguments in (["--help"], ["sft", str(tmp_path / "bad.yaml")], ["schema"], ["recipes"]):
        run_without_torch(
            f"sys.argv = ['vlm-tune', *{arguments!r}]\nfrom vlm_tune.cli import "
            "main\ntry:\n    main()\nexcept SystemExit:\n    pass"
        )
