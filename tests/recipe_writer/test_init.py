"""`vlm-tune init`: five unlike data sets go to a checked recipe, and some to a scored model."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

import vlm_tune
from tests.helpers.audio_samples import write_tone_rows
from tests.helpers.forked_runs import ended
from tests.helpers.own_data import KINDS, class_folders, color_images, encoded, separate_parts
from tests.helpers.row_samples import write_rows
from tests.helpers.served import image_part, serving
from tests.helpers.tiny_models import rows_of, save_llm
from vlm_tune.cli import app
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.recipe_writer import fit

run = CliRunner()


class Planned:
    """A plan that fits, for tests of what the data says."""

    needed = 10**9
    why_cached = "the tower is cheap"

    def __init__(self, recipe: object, tokens: int | None) -> None:
        self.stages = [self]

    def time(self, stage: object) -> None:
        return None


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans take no time."""
    monkeypatch.setattr(fit, "plan", Planned)


def comments(path: Path) -> str:
    """A recipe's text with its comments unwrapped."""
    return re.sub(r"\n *# ", " ", path.read_text())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without `models/`."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_becomes_a_recipe_that_check_and_plan_accept(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    done = run.invoke(app, ["init", str(path)])
    assert done.exit_code == 0, done.output
    assert "check: 0 errors, 0 warnings" in done.output
    assert "vlm-tune sft recipe.yaml" in done.output
    assert "says `vlm-tune plan`" in comments(Path("recipe.yaml"))
    checked = run.invoke(app, ["check", "recipe.yaml", "--json"])
    assert checked.exit_code == 0 and json.loads(checked.stdout)["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_is_trained_scored_and_served_with_no_edit(kind: str, tmp_path: Path) -> None:
    """By the commands that `init` leads to, on the recipe as it was written."""
    written = vlm_tune.init(KINDS[kind](tmp_path))
    for line in ("check recipe.yaml", "plan recipe.yaml", "sft recipe.yaml"):
        done = run.invoke(app, line.split())
        assert done.exit_code == 0, (line, done.output)
    folder = Path(written.recipe.output)
    scored = run.invoke(app, ["eval", str(folder), "--json"])
    assert scored.exit_code == 0, scored.output
    scores = json.loads(scored.stdout)
    assert scores["n"] >= 4
    if kind != "table_and_images":  # captions, of which no two are alike
        assert scores["accuracy"] > 0.7, scores
    text, image = "what color is it?", encoded(next(color_images(1, seed=9))[1])
    content = [{"type": "text", "text": text}, image_part(image)]
    url, pid = serving(folder, tmp_path / "log")
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": content}]
        served = client.chat.completions.create(model=folder.name, messages=messages)
    finally:
        os.kill(pid, signal.SIGTERM)
        assert ended([pid]) == [0]
    alone = VisionLanguageModel.from_pretrained(folder).chat(messages=messages)
    assert served.choices[0].message.content == alone != ""


@pytest.mark.usefixtures("planned")
def test_a_folders_recipe_says_what_it_is_about(tmp_path: Path) -> None:
    written = vlm_tune.init(class_folders(tmp_path))
    facts, recipe = written.facts, written.recipe
    assert facts is not None
    assert (facts.rows, facts.images, facts.width, facts.answers) == (40, 40, 32, "repeated")
    split = recipe.data.split
    assert split is not None and split.stratify and split.validation == split.test == 0.1
    text = comments(written.path)
    assert "40 rows of the form classify, about 40 images of 32 x 32 pixels" in text
    assert "few different answers come again and again" in text
    assert "can't be reached, so tower and" in text


@pytest.mark.usefixtures("planned")
def test_files_of_other_parts_beside_the_named_one_are_taken(tmp_path: Path) -> None:
    recipe = vlm_tune.init(separate_parts(tmp_path)).recipe
    paths = {
        part: [Path(source.path).name for source in getattr(recipe.data, part)]
        for part in ("train", "validation", "test")
    }
    assert paths == {"train": ["train.jsonl"], "validation": ["val.jsonl"], "test": ["test.jsonl"]}
    assert recipe.data.split is None
    assert recipe.name == tmp_path.name  # `train` says nothing about the data


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("absolute", [True, False])
def test_the_folder_above_images_that_rows_name_elsewhere_is_the_image_root(
    tmp_path: Path, absolute: bool
) -> None:
    (tmp_path / "rows").mkdir()
    rows = []
    for number in range(12):
        image = tmp_path / "photos" / str(number % 2) / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(image)
        name = str(image) if absolute else os.path.relpath(image, tmp_path / "rows")
        rows.append({"image": name, "question": "what?", "answer": ["red", "blue"][number % 2]})
    path = tmp_path / "rows" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    written = vlm_tune.init(path)
    (source,) = written.recipe.data.train
    assert source.image_root == str(tmp_path / "photos")
    assert written.facts is not None and written.facts.read == 12
    assert written.exit_code == 0


@pytest.mark.usefixtures("planned")
def test_images_in_a_folder_beside_the_rows_are_seen(tmp_path: Path) -> None:
    written = vlm_tune.init(KINDS["table_and_images"](tmp_path))
    (source,) = written.recipe.data.train
    assert source.image_root == str(tmp_path / "pictures")
    assert written.facts is not None and written.facts.answers == "long"
    assert written.recipe.model.tower.resize == "pad"
    assert "100% of the images are not square" in comments(written.path)


@pytest.mark.usefixtures("planned")
def test_too_few_images_are_all_trained_on_and_it_says_so(tmp_path: Path) -> None:
    rows = []
    for number, (name, image) in enumerate(color_images(1)):
        image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what color?", "answer": name})
    written = vlm_tune.init(write_rows(tmp_path / "rows.jsonl", rows))
    assert written.recipe.data.split is None and written.exit_code == 0
    assert "nothing is held out: 4 images are too few" in comments(written.path)


@pytest.mark.usefixtures("planned")
def test_images_that_all_belong_together_are_not_divided(tmp_path: Path) -> None:
    """One row shows every image, so that all rows are of one family."""
    names = []
    for number, (_, image) in enumerate(color_images(3)):
        image.save(tmp_path / f"{number}.png")
        names.append(f"{number}.png")
    rows = [{"images": [name], "question": "a shape?", "answer": "no"} for name in names]
    rows.append({"images": names, "question": "how many?", "answer": "twelve"})
    written = vlm_tune.init(write_rows(tmp_path / "rows.jsonl", rows))
    assert written.recipe.data.split is None and written.exit_code == 0
    assert "too many rows share their images" in comments(written.path)


@pytest.mark.usefixtures("planned")
def test_bad_rows_are_counted_and_set_apart(tmp_path: Path) -> None:
    path = separate_parts(tmp_path)
    with path.open("a") as file:
        file.write('{"image": "gone.png", "question": "what?", "answer": "red"}\n')
    written = vlm_tune.init(path)
    assert written.facts is not None and written.facts.bad == 1
    assert written.recipe.data.on_bad_row == "quarantine"
    assert written.report is not None and written.report.warning_counts["image_missing"] == 1


@pytest.mark.usefixtures("planned")
def test_a_model_that_the_user_names_is_tuned_by_lora(tmp_path: Path) -> None:
    path = separate_parts(tmp_path)
    rows = rows_of(vlm_tune.init(path).recipe)
    llm = save_llm(tmp_path / "llm", "causal", rows)
    written = vlm_tune.init(path, model=str(llm), tower="ViT-B-32:openai", force=True)
    model = written.recipe.model.model_dump()
    assert model["llm"]["name"] == str(llm) and model["llm"]["kind"] == "causal"
    assert (model["tower"]["name"], model["tower"]["pretrained"]) == ("ViT-B-32", "openai")
    assert written.recipe.data.template == "chatml" and written.recipe.data.group == "image"
    assert [rule.how for rule in written.recipe.tune] == ["frozen", "full", "lora"]
    assert written.report is not None and written.exit_code == 0


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planned")
def test_an_existing_recipe_is_replaced_by_force_alone(tmp_path: Path) -> None:
    path = class_folders(tmp_path)
    Path("recipe.yaml").write_text("mine")
    done = run.invoke(app, ["init", str(path)])
    assert isinstance(done.exception, RecipeError) and "--force" in str(done.exception)
    assert Path("recipe.yaml").read_text() == "mine"
    assert run.invoke(app, ["init", str(path), "--force", "--json"]).exit_code == 0


def test_what_holds_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        vlm_tune.init(tmp_path / "empty")
    with pytest.raises(DataError, match="gone: no such file or folder"):
        vlm_tune.init(tmp_path / "gone")
    for _, image in color_images(1):
        image.save(tmp_path / "loose.png")
    with pytest.raises(DataError, match="nothing that says what to learn about them"):
        vlm_tune.init(tmp_path)
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "nothing"}]
    text = write_rows(tmp_path / "text.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match="has an image or audio; tuning needs some"):
        vlm_tune.init(text)


def test_rows_of_two_forms_are_refused_as_the_reader_does(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "a field"},
        {"image": "a.png", "question": "what?", "answer": "a field"},
    ]
    with pytest.raises(DataError, match="may be caption or vqa"):
        vlm_tune.init(write_rows(tmp_path / "rows.jsonl", rows))
    assert not Path("recipe.yaml").exists()


def test_arguments_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="with --from"):
        vlm_tune.init()
    with pytest.raises(RecipeError, match="with --from"):
        vlm_tune.init(tmp_path, configuration=tmp_path / "lora.yaml")
    path = class_folders(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        vlm_tune.init(path, model="./gone")
    with pytest.raises(RecipeError, match="has a vision tower"):
        vlm_tune.init(path, model="llava-hf/llava-1.5-7b-hf", tower="ViT-B-32:openai")


@pytest.mark.usefixtures("planned")
def test_rows_with_audio_get_a_model_that_hears(tmp_path: Path) -> None:
    """The longest clip lasts 1.5 seconds, so windows of two seconds hold it."""
    written = vlm_tune.init(write_tone_rows(tmp_path))
    tower = written.recipe.model.tower
    assert tower.kind == "audio" and (tower.seconds, tower.windows, tower.pool) == (2, 1, 5)
    facts = written.facts
    assert facts is not None and (facts.images, facts.seconds) == (2, 1.5)
    text = comments(written.path)
    assert "about 2 audio clips of up to 1.5 seconds, 2.0 questions about each" in text
    assert "nothing is held out: 2 clips are too few" in text
    assert "image" not in text.replace("group: image", "").partition("evaluate:")[0]
    assert written.exit_code == 0 and written.report is not None
    assert written.report.parts[0].sources[0].clips == 2


@pytest.mark.usefixtures("planned")
def test_rows_with_images_and_rows_with_audio_have_no_one_tower(tmp_path: Path) -> None:
    clips = write_tone_rows(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    with clips.open("a") as file:
        file.write(json.dumps({"image": "photo.png", "question": "what?", "answer": "red"}))
    with pytest.raises(DataError, match="one tower sees or hears"):
        vlm_tune.init(clips)
