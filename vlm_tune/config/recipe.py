"""The recipe: the typed, strict and only description of a run."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any

from pydantic import Field, PrivateAttr

from vlm_tune.config.base import Config, HomePath, Places
from vlm_tune.config.data import DataSection
from vlm_tune.config.engine import AnyEngine, AutoEngine
from vlm_tune.config.model import AnyModel, ModelSection, Scratch
from vlm_tune.config.objectives import LanguageModeling, ObjectiveField
from vlm_tune.config.train import EvaluateSection, TrainSection
from vlm_tune.config.tune import TuneRule
from vlm_tune.config.yaml_source import Located, Path


class Stage(Config):
    """One stage of training: the recipe's common sections with these changes."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    data: dict[str, Any] = Field(default={})
    tune: Annotated[list[TuneRule], Field(min_length=1)] | None = None
    objective: ObjectiveField | None = None
    train: dict[str, Any] = Field(default={})
    evaluate: dict[str, Any] = Field(default={})


class Recipe(Config):
    """A whole run: the model, its data, how it is trained, and where results are written."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    output: HomePath = Field(description="the run's folder")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: AnyModel
    data: DataSection
    tune: list[TuneRule] = Field(min_length=1)
    objective: ObjectiveField = LanguageModeling()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    engine: Annotated[AnyEngine, Field(discriminator="kind")] = AutoEngine()
    stages: list[Stage] = Field(default=[])
    _places: Places = PrivateAttr(default_factory=Places)

    def where(self, path: Path) -> str:
        """Returns `file:line:column` of a value if the recipe was read, else its dotted name."""
        return self._places.where(path)

    def located(self) -> Located:
        """Returns a copy of the values that were given, without defaults, with their places."""
        return self._places.located() or Located(self.model_dump(exclude_unset=True))

    def read_from(self, located: Located) -> Recipe:
        """Returns the recipe itself, which from now on knows the places of its values."""
        self._places = Places(located)
        return self

    @property
    def scratch(self) -> Scratch | None:
        """The LLM's description if it starts from random weights, else None."""
        return self.model.llm.scratch if isinstance(self.model, ModelSection) else None

    def resolved_stages(self) -> list[tuple[str, Recipe]]:
        """Returns each stage's name and complete recipe, in order.

        A recipe without stages has one, named `main`.
        """
        if not self.stages:
            return [("main", self)]
        common = self.model_dump(exclude={"stages"}, exclude_unset=True)
        return [
            (
                stage.name,
                Recipe.model_validate(
                    merge_parts(common, stage_changes(stage.model_dump(exclude_unset=True)))
                ),
            )
            for stage in self.stages
        ]

    @property
    def last_stage(self) -> Recipe:
        """The complete recipe of the last stage, by whose settings the trained model is used."""
        return self.resolved_stages()[-1][1]


def stage_changes(stage: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections that a stage changes in the common part; null sections are left out."""
    return {key: value for key, value in stage.items() if key != "name" and value is not None}


def merge_parts(common: Any, change: Any) -> Any:
    """Merges mappings key by key; one of another `kind`, and any other value, replaces `common`."""
    if (
        isinstance(common, dict)
        and isinstance(change, dict)
        and common.get("kind") == change.get("kind", common.get("kind"))
    ):
        merged = dict(common)
        for key, value in change.items():
            merged[key] = merge_parts(common[key], value) if key in common else deepcopy(value)
        return merged
    return deepcopy(change)
