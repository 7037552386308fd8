"""The architecture as a test: imports point one way, and light commands load no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vlm_tune"
# Each layer may import itself and the layers before it.
LAYERS = [
    ["errors", "quoting"],
    ["checksums", "compat", "launching", "paths"],
    ["recipe_yaml", "resources"],
    ["config"],
    ["recipe"],
    ["recipe_changes"],
    ["runlock"],
    ["runfolder"],
    ["data"],
    ["model"],
    ["evaluation", "inspection", "planning", "prediction"],
    ["page"],
    ["report", "checking"],
    ["train"],
    ["merging"],
    ["exporting"],
    ["api"],
    ["display"],
    ["cli"],
]
RANK = {name: place for place, names in enumerate(LAYERS) for name in names}


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "vlm_tune" and len(parts) > 1 else None


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def test_every_module_has_a_layer_and_no_import_points_back() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 20
    for path in files:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in RANK, f"{path} belongs to no layer"
        for module in imported(path):
            other = layer(module)
            if other is not None:
                assert RANK[other] <= RANK[own], f"{path} imports {module}, which comes later"


def test_types_import_nothing_of_ours() -> None:
    assert not [module for module in imported(PACKAGE / "data" / "types.py") if module.startswith("vlm_tune")]


def run_without_torch(code: str) -> None:
    check = "import sys\n" + code + "\nassert 'torch' not in sys.modules, 'torch was loaded'\nassert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_import_and_recipe_reading_load_no_torch() -> None:
    run_without_torch("import vlm_tune")
    run_without_torch("from vlm_tune import load_recipe\nload_recipe('recipes/demo.yaml')")


def test_help_and_a_recipe_error_load_no_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("nme: x\n")
    for arguments in (["--help"], ["sft", str(tmp_path / "bad.yaml")], ["schema"], ["recipes"]):
        run_without_torch(
            f"sys.argv = ['vlm-tune', *{arguments!r}]\nfrom vlm_tune.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
        )
