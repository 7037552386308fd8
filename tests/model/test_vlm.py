"""The mode of a model that several threads evaluate at once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.evaluation.evaluate import score
from vlm_tune.model.language.decoding import Decoding


def test_a_model_trains_again_when_the_last_evaluation_of_it_ends(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).train()
    model.llm.model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {False, True}
    with model.evaluating():
        with model.evaluating():
            assert not any(module.training for module in model.modules())
        assert not any(module.training for module in model.modules())
        twin = copy.deepcopy(model)
    assert [module.training for module in model.modules()] == modes
    with twin.train().evaluating():
        assert not twin.training
    assert twin.training

    def stop(done: int, of: int) -> None:
        assert not model.training
        raise InterruptedError

    with contextlib.ExitStack() as chat:
        # A chat begins while the model is scored, and ends after it.
        score(
            model,
            rows_of(recipe)[:2],
            decoding=Decoding(2),
            progress=lambda done, of: chat.enter_context(model.evaluating()),
        )
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes

    with pytest.raises(InterruptedError):
        score(model, rows_of(recipe)[:2], decoding=Decoding(2), progress=stop)
    assert [module.training for module in model.modules()] == modes
