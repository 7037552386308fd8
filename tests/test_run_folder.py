"""The folder of a run, and what lies in it."""

from __future__ import annotations

from pathlib import Path

from vlm_tune.run_folder import finished_stages, recipe_above


def test_a_checkpoint_behind_a_link_belongs_to_the_run_that_links_to_it(tmp_path: Path) -> None:
    stages = tmp_path / "scratch" / "stages"
    checkpoint = stages / "0-main" / "checkpoints" / "step-0000009"
    checkpoint.mkdir(parents=True)
    assert recipe_above(checkpoint) is None
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (run / "stages").symlink_to(stages)
    linked = run / "stages" / checkpoint.relative_to(stages)
    assert recipe_above(linked) == run / "recipe.yaml"
    (tmp_path / "shortcut").symlink_to(linked)
    assert recipe_above(tmp_path / "shortcut") is None
    (tmp_path / "scratch" / "recipe.yaml").touch()
    assert recipe_above(tmp_path / "shortcut") == tmp_path / "scratch" / "recipe.yaml"


def test_finished_stages_are_in_their_order(tmp_path: Path) -> None:
    names = ["1-a", "2-b", "10-c"]
    for name in (*reversed(names), "notes"):
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True)
        (folder / "done.json").touch()
    assert [each.parent.name for each in finished_stages(tmp_path / "model")] == names
    assert finished_stages(tmp_path / "merged") == []
