"""A model that hears: the tower beside transformers' own, and a model from rows to answers."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.audio_samples import hearing_recipe, tone, wav, write_tone_rows
from tests.helpers.tiny_models import (
    assert_close,
    batch_of,
    built,
    loss_and_gradients,
    parsed,
    png,
    rows_of,
    stage_loop,
)
from vlm_tune.config.connectors import LinearConnector
from vlm_tune.config.towers import AudioTower
from vlm_tune.data.types import distinct_media
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.memory_plan.plan import plan
from vlm_tune.model.audio_tower import WhisperTower
from vlm_tune.model.build_checks import check_model
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.vision.registry import architecture, build_tower, media_processor

TINY_WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 100,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def hearing(tmp_path: Path, kind: str = "causal", **changes: Any) -> Any:
    rows = write_tone_rows(tmp_path)
    return parsed(hearing_recipe(kind, rows, tmp_path / "run"), **changes)


@pytest.fixture
def whisper(tmp_path: Path) -> tuple[Path, Any]:
    """A folder of a tiny Whisper model, and the model."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**TINY_WHISPER)).eval()
    model.save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper", model


def test_a_folder_of_whisper_gives_its_encoders_states(whisper: tuple[Path, Any]) -> None:
    folder, model = whisper
    tower = build_tower(AudioTower(kind="audio", name=str(folder))).eval()
    frames = torch.randn(2, 80, 200)
    with torch.no_grad():
        expected = model.get_encoder()(frames).last_hidden_state
        assert torch.equal(tower(frames), expected)
        pooled = build_tower(AudioTower(kind="audio", name=str(folder), pool=5)).eval()
        means = expected.unflatten(1, (20, 5)).mean(2)
        assert torch.allclose(pooled(frames), means, atol=1e-6)
    assert tower.measure() == (100, 32) and pooled.measure() == (20, 32)


def test_a_shorter_window_takes_the_first_positions(whisper: tuple[Path, Any]) -> None:
    folder, model = whisper
    config = AudioTower(kind="audio", name=str(folder), seconds=1, windows=4)
    tower = build_tower(config).eval()
    assert isinstance(tower, WhisperTower)
    assert tower.measure() == (50, 32) and tower.input_shape == (80, 100)
    positions: Any = tower.model.embed_positions
    assert torch.equal(positions.weight, model.get_encoder().embed_positions.weight[:50])
    section: Any = SimpleNamespace(tower=config, connector=LinearConnector(kind="linear"))
    processor = media_processor(section, tower)
    assert processor.modality == "audio" and processor.most_frames == 4
    # Its architecture alone, as a checkpoint rebuilds it, has weights of the same shapes.
    rebuilt = build_tower(config, architecture(config))
    rebuilt.load_state_dict(tower.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 3}, "has positions for 2 seconds, not 3"),
        ({"pool": 7}, "7 does not divide the 100 tokens of 2 seconds"),
    ],
)
def test_windows_and_pools_that_do_not_fit(
    whisper: tuple[Path, Any], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_tower(AudioTower(kind="audio", name=str(whisper[0]), **changes))


def test_a_name_that_is_no_whisper(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is of type t5; a tower of kind audio is whisper's"):
        build_tower(AudioTower(kind="audio", name=str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("d_modle", 32, "a WhisperConfig has no key 'd_modle'"),
        ("encoder_layers", 0, "encoder_layers: expected integers from 1"),
        ("d_model", 33, "d_model 33 is no even multiple of 2"),
        ("max_source_positions", 20, "a second of audio needs 50"),
    ],
)
def test_a_faulty_config_is_an_error_at_its_place(
    tmp_path: Path, key: str, value: int, message: str
) -> None:
    recipe = hearing(tmp_path, **{f"model__tower__config__{key}": value})
    with pytest.raises(RecipeError, match=message):
        check_model(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__tower__name": "x"}, "give exactly one of model.tower.name"),
        ({"model__connector": {"kind": "pixel_shuffle"}}, "model.tower.pool joins adjacent"),
        ({"data__augment": {"flip": 0.5}}, "augmentation is for images"),
    ],
)
def test_settings_of_images_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        hearing(tmp_path, **changes)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_questions_about_one_clip_share_it_exactly(tmp_path: Path, kind: str) -> None:
    """Questions in one example train as rows that each hear their clip."""
    recipe = hearing(tmp_path, kind)
    model = built(recipe)
    rows = rows_of(recipe)
    examples = [example for row in rows for example in model.processor.examples(row)]
    assert [len(example.media) for example in examples] == [1, 1, 2, 2]
    assert [int(example.image_mask.sum()) for example in examples] == [5, 5, 10, 10]
    loop = stage_loop(model, hearing(tmp_path, kind, data__group="image"), tmp_path / "grouped")
    alone = loss_and_gradients(model, [batch_of(model, [example]) for example in examples])
    units = _grouped(loop)
    assert sum(batch.questions for batch in units) == 4 and len(units) == 2
    together = loss_and_gradients(model, units)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-5, atol=1e-5)
    assert_close(together[1], alone[1], relative=1e-4)


def _grouped(loop: Any) -> list[Any]:
    """A batch of each unit of a loop's feed."""
    feed = loop.data.feed
    return [
        batch_of(loop.model, feed.prepared.unit(number)) for number in range(len(feed.prepared))
    ]


def test_a_trained_model_is_saved_loaded_and_asked(tmp_path: Path) -> None:
    recipe = hearing(tmp_path)
    model = built(recipe)
    stage_loop(model, recipe, tmp_path / "run").run()
    media = distinct_media(rows_of(recipe))
    features = tower_features(model, media)
    for window in (window for item in media for window in model.processor.images.expand(item)):
        frames = model.processor.images(window)[None]
        with torch.no_grad():
            assert torch.allclose(features(window), model.tower(frames)[0], atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = hearing(tmp_path, model={"pretrained": str(tmp_path / "saved")})
    assert built(again).processor.images == model.processor.images
    with pytest.raises(ModelError, match=r"model.tower.grid: .*saved' hears audio"):
        built(
            hearing(tmp_path, model={"pretrained": str(tmp_path / "saved"), "tower": {"grid": 2}})
        )
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "saved", dtype="fp32", device="cpu")
    clip = tmp_path / "high.wav"
    data = clip.read_bytes()
    code = base64.b64encode(data).decode()
    part = {"type": "input_audio", "input_audio": {"data": code, "format": "wav"}}
    answers = [
        loaded.chat("is it high?", audios=clip),
        loaded.chat("is it high?", audios=[data]),
        loaded.chat("<audio>is it high?", audios=f"data:audio/wav;base64,{code}"),
        loaded.chat([{"role": "user", "content": [part, {"type": "text", "text": "is it high?"}]}]),
        loaded.start_chat().ask("is it high?", audios=clip).text,
        model.eval().chat("is it high?", audios=clip),
    ]
    assert len(set(answers)) == 1


def test_its_parameters_are_planned_from_configs_alone(tmp_path: Path) -> None:
    recipe = hearing(tmp_path)
    (stage,) = plan(recipe).stages
    model = built(recipe)
    parts = (model.tower, model.connector, model.llm.model)
    assert [part.total for part in stage.parts] == [
        sum(parameter.numel() for parameter in part.parameters()) for part in parts
    ]
    assert not stage.cached and stage.memory.trained > 0


def test_the_wrong_medium_and_a_long_clip_are_refused(tmp_path: Path) -> None:
    model = built(hearing(tmp_path))
    with pytest.raises(DataError, match=r"images, and the model's tower takes audio"):
        model.chat("what is it?", images=png().read())
    with pytest.raises(
        DataError, match=r"lasts 2.. seconds or more, and the model takes at most 2 x 1"
    ):
        model.chat("what is it?", audios=wav(tone(seconds=2.5)))
    with pytest.raises(DataError, match=r"request 1: audio 1: not audio"):
        model.chat("what is it?", audios=b"none")
    with pytest.raises(DataError, match="audio must be a path, a data URL, bytes or a file object"):
        model.chat("what is it?", audios=5)
