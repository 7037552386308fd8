"""The trials of a sweep as optuna has them: values are proposed, scores and states are stored.

The journal in the sweep's folder holds all that a sweep needs to continue.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlm_tune.errors import ModelError, Problem, RecipeError
from vlm_tune.paths import shown_path
from vlm_tune.quoting import reason_of
from vlm_tune.sweeping.space import Scalar, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "journal.jsonl"
"""The file of optuna's storage in the folder of a sweep."""
NAME = "sweep"
"""The name of the only study in it."""
Direction = Literal["minimize", "maximize"]


def check_installed() -> None:
    """Raises `ModelError` where optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ModelError("a sweep needs optuna: pip install 'vlm_tune[sweep]'") from None


class TrialStudy:
    """The trials of a sweep, of which one runs at a time.

    Args:
        folder: the sweep's folder, whose lock the caller holds.
        space: what is searched.
        seed: the recipe's. It decides the values of a trial, with the trial's number and the
            scores of those before it: a sweep that was interrupted continues as it would have.
        lower_is_better: whether the lowest score is the best.
        prune: whether a trial is stopped if its score is worse than the median of complete ones.

    Raises:
        RecipeError: the journal can't be read.
    """

    def __init__(
        self, folder: Path, space: Space, seed: int, *, lower_is_better: bool, prune: bool
    ) -> None:
        from optuna.pruners import MedianPruner, NopPruner

        self.space = space
        self.seed = seed
        self.direction: Direction = "minimize" if lower_is_better else "maximize"
        pruner = MedianPruner() if prune else NopPruner()
        self._storage, self._study = _stored_study(folder / JOURNAL, self.direction, pruner)

    def trials(self) -> list[FrozenTrial]:
        """The trials that have begun, by number from 0."""
        from optuna.trial import TrialState

        return [each for each in self._study.get_trials() if each.state != TrialState.WAITING]

    def next_trial(self) -> Trial | None:
        """The trial to run: the one that was interrupted, else a new one.

        None where all combinations of a finite search space have been tried.
        """
        from optuna.trial import TrialState

        trials = self._study.get_trials()
        states = [each.state for each in trials]
        if TrialState.RUNNING in states:
            trial = self._interrupted(states.index(TrialState.RUNNING))
        else:
            if TrialState.WAITING not in states:
                values = self._proposal(trials)
                if values is None:
                    return None
                # Written before the trial begins, so that one that is killed has them.
                self._study.enqueue_trial(values)
            trial = self._study.ask()
        for key, dimension in self.space.items():
            dimension.suggest(trial, key)
        return trial

    def _interrupted(self, number: int) -> Trial:
        """The trial of that number, which began in another process."""
        from optuna.trial import Trial

        study_id = self._storage.get_study_id_from_name(NAME)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return Trial(self._study, trial_id)

    def _proposal(self, trials: list[FrozenTrial]) -> dict[str, Scalar] | None:
        """Values that no trial has had, by TPE over the trials so far; None if there are none."""
        import optuna

        size = math.prod(dimension.size for dimension in self.space.values())
        tried = [trial.params for trial in trials]
        if len(tried) >= size:
            return None
        number = len(trials)
        sampler = optuna.samplers.TPESampler(seed=_seed(self.seed, number))
        draft = optuna.create_study(sampler=sampler, direction=self.direction)
        draft.add_trials(trials)
        values = draft.ask({key: each.distribution() for key, each in self.space.items()}).params
        generator = np.random.default_rng([self.seed, number])
        while values in tried:  # which only happens where values are few
            values = {key: each.draw(generator) for key, each in self.space.items()}
        return values

    def report(self, trial: Trial, score: float, evaluation: int) -> None:
        """Stores the score of a trial's n-th evaluation, unless that was done before a resume."""
        if evaluation not in self.trials()[trial.number].intermediate_values:
            trial.report(score, evaluation)

    def finish(self, trial: Trial, state: str, score: float | None, facts: dict[str, Any]) -> None:
        """Stores the end of a trial, as complete, pruned or failed, and facts about it by name."""
        from optuna.trial import TrialState

        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        states = {
            "complete": TrialState.COMPLETE,
            "pruned": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }
        # Of a pruned trial optuna takes the last score itself.
        self._study.tell(trial, score if state == "complete" else None, state=states[state])


def _seed(seed: int, number: int) -> int:
    """The seed of a trial's values."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _stored_study(
    path: Path, direction: Direction, pruner: BasePruner
) -> tuple[JournalStorage, Study]:
    """The study in a journal, which is new where there is none. Raises `RecipeError`."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        _mend(path)
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction=direction,
            pruner=pruner,
            load_if_exists=True,
        )
        study.get_trials()
    # A journal that was edited may make optuna raise anything.
    except Exception as error:
        message = f"the sweep's journal can't be read ({reason_of(error)}); start another sweep"
        raise RecipeError([Problem(shown_path(path), message)]) from error
    return storage, study


def _mend(path: Path) -> None:
    """Removes what a process that was killed as it wrote to the journal left.

    These are a line without an end, after which nothing could be added, and optuna's own lock.
    """
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            path.write_bytes(content[:whole])
