"""The command `embed`: embeddings of images and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_tune.cli.options import (
    MOST_TOKENS,
    AcceptBaseOption,
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    bases_by_part,
    check_dtype,
    print_json,
    print_text,
    quiet_libraries,
    unreadable,
    use_device,
)
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import check_writable, replacing, shown_path, writing

ZIP = b"PK"
"""How a file of NumPy arrays begins."""


def embed(
    model: ModelArgument,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGES]...", help="files of images")
    ] = None,
    *,
    texts: Annotated[Path | None, typer.Option(help="a file with a text on each line")] = None,
    output: Annotated[Path, typer.Option(help="the .npz file to write")],
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="images per batch")] = 32,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL's embeddings of images and of a file's lines; dot products compare them."""
    check_dtype(dtype)
    if not images and texts is None:
        raise typer.BadParameter("name image files, or a file with --texts", param_hint="IMAGES")
    lines = None if texts is None else _lines(texts)
    check_writable(output, "the file of vectors", mark=ZIP)
    use_device(device)
    quiet_libraries()
    import numpy as np

    from vlm_tune.generation.chat import VisionLanguageModel
    from vlm_tune.generation.embedding import listed_images

    if images:  # a missing one is an error before the model is loaded
        listed_images(images)
    vlm = VisionLanguageModel.from_pretrained(
        model, dtype=dtype, base=bases_by_part(base), accept_other_base=accept_other_base
    )
    arrays = {}
    if images:
        arrays["images"] = vlm.embed_images(images, batch_size=batch_size)
        arrays["image_files"] = np.array([str(image) for image in images])
    if lines is not None:
        arrays["texts"] = vlm.embed_texts(lines)
        arrays["text_lines"] = np.array(lines)
    with (
        writing(output, "the file of vectors"),
        replacing(output) as written,
        written.open("wb") as file,
    ):
        np.savez(file, **arrays)
    counts = {"images": len(images or ()), "texts": len(lines or ())}
    width = next(iter(arrays.values())).shape[1]
    if as_json:
        print_json({"output": str(output), **counts, "width": width})
    else:
        print_text(
            f"vectors of {counts['images']:,} images and {counts['texts']:,} texts, "
            f"of width {width:,}: {output}"
        )


def _lines(path: Path) -> list[str]:
    """The lines of a file of texts.

    Raises `RecipeError` if it can't be read, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise unreadable("--texts", path, error) from None
    if not lines:
        raise RecipeError([Problem("--texts", f"{shown_path(path)} has no line")])
    return lines
