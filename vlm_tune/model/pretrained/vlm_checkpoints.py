"""Existing vision-language models to start from: their parts as sections of a recipe.

Supported are the families of `vlm_tune.model.families`. A recipe's tower, connector and LLM can
each name such a model; each then loads its part of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm_tune.config.data import DataSection, RowsSource
from vlm_tune.config.model import AnySection, Llm, ModelSection, PretrainedModel
from vlm_tune.config.native import NativeModel
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.rules import check_parts
from vlm_tune.config.towers import AudioTower
from vlm_tune.config.yaml_source import value_at
from vlm_tune.errors import ModelError
from vlm_tune.model.build_checks import check_model
from vlm_tune.model.families.boxes import family_boxes
from vlm_tune.model.families.registry import family_names, find_vlm
from vlm_tune.model.hub import check_base, is_ours, read_json, unmerged
from vlm_tune.model.pretrained.native import check_shards, native_section
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted


def own_folder(recipe: Recipe) -> Path | None:
    """The vlm_tune model folder that `model.pretrained` names; None if it names none."""
    folder = Path(recipe.model.pretrained) if isinstance(recipe.model, PretrainedModel) else None
    return folder if folder is not None and is_folder(folder) and is_ours(folder) else None


def own_rebuild(recipe: Recipe) -> dict[str, Any] | None:
    """The tower's architecture in the vlm_tune model folder that `model.pretrained` names."""
    folder = own_folder(recipe)
    return read_json(folder / "config.json").get("tower_rebuild") if folder else None


def _own_section(folder: Path, source: PretrainedModel) -> ModelSection:
    """The parts of a vlm_tune model folder as a recipe's section, with the overrides in `source`.

    The LLM's name is the folder's subfolder llm/, if it has one. Raises `ModelError` for a folder
    with parts that are not merged, and for a config.json that was changed.
    """
    from vlm_tune.model.base_places import AS_SAVED, moved

    if unmerged(folder):
        beside = ", ".join(unmerged(folder))
        raise ModelError(
            f"model.pretrained: {quoted(str(folder))} has parts that are not merged ({beside}); "
            f"run `vlm-tune merge {folder} --output merged` and name merged"
        )
    written = read_json(folder / "config.json").get("model")
    if isinstance(written, dict) and value_at(written, "tower", "kind") == "native":
        raise ModelError(
            f"model.pretrained: {quoted(str(folder))} is a native model: write "
            f"model: {{kind: native, pretrained: {folder}}}"
        )
    try:
        section = ModelSection.model_validate(written)
    except ValidationError as error:
        raise ModelError(
            f"{folder}: config.json is not what was written ({error.errors()[0]['msg']})"
        ) from None
    section = moved(folder, section, AS_SAVED)
    llm = section.llm.model_copy(update=source.llm.model_dump())
    if (folder / "llm").is_dir():
        llm = Llm(
            kind=llm.kind,
            name=str(folder / "llm"),
            bidirectional=llm.bidirectional,
            **source.llm.model_dump(),
        )
    overrides = _overrides(source)
    if overrides and isinstance(section.tower, AudioTower):
        raise ModelError(
            f"model.tower.{min(overrides)}: {quoted(str(folder))} hears audio, and the options of "
            "a tower beside model.pretrained are those of images"
        )
    tower = section.tower.model_copy(update=overrides)
    boxes = section.boxes if source.boxes is None else source.boxes
    return section.model_copy(update={"llm": llm, "tower": tower, "boxes": boxes})


def _overrides(source: PretrainedModel) -> dict[str, Any]:
    """The tower's options that the recipe has in place of the model's."""
    return {name: getattr(source.tower, name) for name in source.tower.model_fields_set}


def _video_frames(data: DataSection) -> int | None:
    """The number of frames of a video, if the sources of training rows set one and agree."""
    rows = [source for source in data.train if isinstance(source, RowsSource)]
    counts = {row.video_frames for row in rows if "video_frames" in row.model_fields_set}
    return counts.pop() if len(counts) == 1 else None


def model_section(recipe: Recipe) -> AnySection:
    """The recipe's tower, connector and LLM, or those of the model that `model.pretrained` names.

    Of that model only configs are read.

    Raises:
        ModelError: the model is not supported; the message says what was expected.
        RecipeError: the rest of the recipe does not fit the model's parts, or parts with random
            weights can't be built from the recipe's numbers.
    """
    if isinstance(recipe.model, ModelSection):
        check_model(recipe)
        return recipe.model
    if isinstance(recipe.model, NativeModel):
        check_shards(recipe, recipe.engine)
        return native_section(recipe.model, _video_frames(recipe.last_stage.data))
    section = _section(recipe.model)
    check_parts(recipe, section)
    return section


def _section(source: PretrainedModel) -> ModelSection:
    """The parts of the model that `model.pretrained` names, with the overrides in `source`."""
    folder = Path(source.pretrained)
    if is_folder(folder) and is_ours(folder):
        return _own_section(folder, source)
    check_base(source.pretrained, "model.pretrained")
    vlm = find_vlm(source.pretrained)
    if vlm is None and not folder.exists():
        raise ModelError(
            f"model.pretrained: {quoted(source.pretrained)}: there is no such folder, and no "
            f"vision-language model of that name on the Hub of a known kind ({family_names()}); "
            "a run's whole model is written by `vlm-tune merge RUN --output FOLDER`"
        )
    if vlm is None:
        raise ModelError(
            f"model.pretrained: {quoted(source.pretrained)} is no vision-language model "
            f"of a known kind ({family_names()}): expected its config.json"
        )
    tower, connector, kind = vlm.family.parts(vlm)
    return ModelSection(
        tower=tower.model_copy(update=_overrides(source)),
        connector=connector,
        llm=Llm(
            kind=kind,
            name=vlm.name,
            bidirectional=vlm.family.bidirectional,
            **source.llm.model_dump(),
        ),
        boxes=source.boxes or family_boxes(str(vlm.config.get("model_type"))),
    )
