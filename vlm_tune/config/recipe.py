"""The recipe: typed, strict, and the one description of a run."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any

from pydantic import Field, PrivateAttr

from vlm_tune.config.base import Config, HomePath, Places
from vlm_tune.config.data import DataSection
from vlm_tune.config.engine import AnyEngine, AutoEngine
from vlm_tune.config.model import AnyModel, ModelSection, Scratch
from vlm_tune.config.train import Contrastive, EvaluateSection, LanguageModeling, TrainSection
from vlm_tune.config.tune import TuneRule
from vlm_tune.config.yaml_source import Located, Path


class Stage(Config):
    """One stage of several: the recipe's common part with these parts changed."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    data: dict[str, Any] = Field(default={})
    tune: Annotated[list[TuneRule], Field(min_length=1)] | None = None
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] | None = None
    train: dict[str, Any] = Field(default={})
    evaluate: dict[str, Any] = Field(default={})


class Recipe(Config):
    """A whole run: what is trained, on what, how, and where it is written."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    output: HomePath = Field(description="the run's folder")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: AnyModel
    data: DataSection
    tune: list[TuneRule] = Field(min_length=1)
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] = (
        LanguageModeling()
    )
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    engine: Annotated[AnyEngine, Field(discriminator="kind")] = AutoEngine()
    stages: list[Stage] = Field(default=[])
    _places: Places = PrivateAttr(default_factory=Places)

    def where(self, path: Path) -> str:
        """Where a value stands: `file:line:column` of a recipe that was read, else its dotted name."""
        return self._places.where(path)

    def read_from(self, located: Located) -> Recipe:
        """The recipe, which remembers where its values stand."""
        self._places = Places(located)
        return self

    @property
    def scratch(self) -> Scratch | None:
        """How the LLM is made, where it starts from random weights."""
        return self.model.llm.scratch if isinstance(self.model, ModelSection) else None

    def resolved_stages(self) -> list[tuple[str, Recipe]]:
        """Each stage's name and complete recipe, in order; one stage named `main` where none are listed."""
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


def stage_changes(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage changes in the common part; a part that is null is not given."""
    return {key: value for key, value in stage.items() if key != "name" and value is not None}


def merge_parts(common: Any, change: Any) -> Any:
    """Mappings merge key by key; a mapping with another `kind`, and anything else, replaces."""
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
