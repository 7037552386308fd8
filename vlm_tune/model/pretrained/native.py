"""Models of transformers that are called as they are: which there are, and their own processors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_tune.config.engine import AnyEngine, shards
from vlm_tune.config.model import AnySection, NativeLlm, NativeSection
from vlm_tune.config.native import JOINED_TYPES, OWN_TEMPLATE, SHARDED_TYPES, NativeModel
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.towers import NativeTower
from vlm_tune.data.chat.own_template import Render, message, own_template, refusal
from vlm_tune.data.chat.template import ChatTemplate, load_template
from vlm_tune.errors import DataError, ModelError, Problem, RecipeError
from vlm_tune.model.families.boxes import family_boxes
from vlm_tune.model.hub import check_base, config_source, is_ours, load_reason, unmerged
from vlm_tune.model.pretrained.native_thinking import has_switch, set_thinking
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted, reason_of

PIXELS = ("min_pixels", "max_pixels")
VIDEO_PIXELS = ("video_min_pixels", "video_max_pixels")
"""Keys of the least and most pixels of an image, and of a video."""
EDGES = ("shortest_edge", "longest_edge")
"""What processors call these numbers."""


def native_section(model: NativeModel, video_frames: int | None = None) -> NativeSection:
    """The parts of a recipe's native model; only its config is read.

    A merged folder of vlm_tune holds the checkpoint in llm/. `video_frames` is the number of frames
    of a video that is saved in its processor. Raises `ModelError` for a model that transformers
    does not have as one of images and text.
    """
    folder = Path(model.pretrained)
    name = model.pretrained
    if is_folder(folder) and is_ours(folder) and not unmerged(folder) and (folder / "llm").is_dir():
        name = str(folder / "llm")
    check_base(name, "model.pretrained")
    config = native_config(name)
    return NativeSection(
        tower=NativeTower(
            **model.model_dump(include={*PIXELS, *VIDEO_PIXELS}), video_frames=video_frames
        ),
        llm=NativeLlm(name=name, **model.llm.model_dump()),
        boxes=model.boxes or family_boxes(config.model_type),
    )


def check_shards(recipe: Recipe, engine: AnyEngine) -> None:
    """Checks that the engine does not shard the weights of a native model that can't be sharded.

    Raises `RecipeError` if it does.
    """
    if not isinstance(recipe.model, NativeModel) or not shards(engine):
        return
    model_type = native_config(str(native_section(recipe.model).llm.name)).model_type
    if model_type not in SHARDED_TYPES:
        message = (
            f"the weights of a {model_type} are not sharded: ranks gather them together, and its "
            "forward pass may run other modules for other images, or has not been compared; use "
            "ddp, or deepspeed with stage 2"
        )
        raise RecipeError([Problem(recipe.where(("engine",)), message)])


def native_config(name: str) -> Any:
    """transformers' config of a native model. Raises `ModelError` as `native_section`."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(config_source(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.pretrained: can't read the config of {quoted(name)}: {load_reason(name, error)}"
        ) from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"model.pretrained: {quoted(name)} is a {config.model_type}, which transformers has no "
            "image-text-to-text model of; kind: native takes those without code of their own"
        )
    return config


def reads_branches(section: AnySection, folder: Path | None = None) -> bool:
    """Whether a model may read answers to one prompt as branches of one row.

    Some native models read one sample per row. A model that is saved whole in `folder` no longer
    needs the checkpoint that it is named by. Raises `ModelError` as `native_config`.
    """
    if not isinstance(section, NativeSection):
        return True
    name = str(section.llm.name)
    if folder is not None and (folder / "llm" / "config.json").is_file():
        name = str(folder / "llm")
    return native_config(name).model_type in JOINED_TYPES


def native_types() -> set[str]:
    """The model types of which transformers has an image-text-to-text model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def takes_pixel_bounds(model_type: str) -> bool:
    """Whether the image processor of a model type takes bounds of pixels, as far as is known."""
    from transformers import CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING

    if model_type not in CONFIG_MAPPING:
        return False
    processors: Any = IMAGE_PROCESSOR_MAPPING
    config = CONFIG_MAPPING[model_type]
    return config in processors and any(map(_has_pixel_bounds, processors[config].values()))


def _has_pixel_bounds(images: Any) -> bool:
    """Whether a class of image processors takes the least and most pixels of an image."""
    return "min_pixels" in getattr(images.valid_kwargs, "__annotations__", {})


def load_native_processor(
    section: NativeSection, folder: Path | None, enable_thinking: bool | None = None
) -> Any:
    """transformers' own processor of a native model, from a saved folder or by its name.

    Its chat template has the mode of reasoning of `enable_thinking`, see `set_thinking`; that of a
    saved folder has one already, and None leaves it.

    Raises `ModelError` if it can't be loaded, or has none of the pixel limits that the recipe sets,
    or no such mode.
    """
    from transformers import AutoProcessor

    source = str(folder or section.llm.name)
    try:
        processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise ModelError(
            f"model.pretrained: no processor in {quoted(source)}: {load_reason(source, error)}"
        ) from None
    if isinstance(getattr(processor, "chat_template", None), dict):
        # Of several templates transformers runs that of this name.
        processor.chat_template = processor.chat_template.get("default")
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise ModelError(
            f"model.pretrained: {quoted(source)} needs the processor of a chat model, with its "
            "preprocessor_config.json and chat_template.jinja"
        )
    _set_limits(processor, section.tower)
    if folder is None or enable_thinking is not None:
        set_thinking(processor, renderer, enable_thinking)
    return processor


def _set_limits(processor: Any, tower: NativeTower) -> None:
    """Sets the pixels of images and videos, and the frames of videos, that the recipe sets."""
    images = processor.image_processor
    _bound_pixels(images, tower, PIXELS, _has_pixel_bounds(type(images)))
    videos: Any = getattr(processor, "video_processor", None)
    size = getattr(videos, "size", None)
    has_bounds = all(getattr(size, edge, None) is not None for edge in EDGES)
    _bound_pixels(videos, tower, VIDEO_PIXELS, has_bounds)
    if tower.video_frames is not None and getattr(videos, "do_sample_frames", None) is not None:
        # Processors take a number of frames or a rate.
        videos.num_frames = tower.video_frames
        videos.fps = None
    # A later release of transformers has another default than the one that the model trains with.
    if getattr(videos, "cap_pixels_per_frame", False) is None:
        videos.cap_pixels_per_frame = False


def _bound_pixels(part: Any, tower: NativeTower, keys: tuple[str, str], has_bounds: bool) -> None:
    """Sets the least and most pixels of images or videos, as processors of Qwen-VL take them.

    Args:
        part: the processor of images or of videos.
        tower: the recipe's values.
        keys: the recipe's keys of the least and the most pixels.
        has_bounds: whether the processor has such bounds.
    """
    values = [getattr(tower, key) for key in keys]
    given = {edge: pixels for edge, pixels in zip(EDGES, values, strict=True) if pixels is not None}
    if not given:
        return
    if not has_bounds:
        kind = f"a {type(part).__name__}" if part is not None else "the checkpoint's processor"
        raise ModelError(f"model.{', '.join(keys)}: {kind} has no pixel limits; leave them out")
    size = {edge: part.size[edge] for edge in EDGES} | given
    if size["shortest_edge"] > size["longest_edge"]:
        raise ModelError(
            f"model.{', '.join(keys)}: at least {size['shortest_edge']} and at most "
            f"{size['longest_edge']} pixels, the checkpoint's own where the recipe has none"
        )
    part.size = type(part.size)(**size)


def renderer(processor: Any, **switches: bool) -> Render:
    """Runs a processor's chat template. Its function raises `DataError` where that refuses.

    `switches` are given to the template by their names.
    """
    from jinja2 import TemplateError

    def render(messages: list[dict[str, Any]], opened: bool) -> str:
        try:
            return processor.apply_chat_template(
                messages, add_generation_prompt=opened, tokenize=False, **switches
            )
        # A template is a program: its filters and loops may fail in any way.
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise refusal(reason_of(error)) from None

    return render


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *map(str, tokenizer.all_special_tokens)]))


def template_of(
    processor: Any, stop_ids: Sequence[int] = (), enable_thinking: bool | None = None
) -> ChatTemplate:
    """A processor's own chat template, in both modes of reasoning if it has the switch for them.

    Raises `DataError` if it can't be taken apart.

    Args:
        processor: transformers' processor of the whole model.
        stop_ids: the ids at which the model's generation stops.
        enable_thinking: the mode that was set; None for answers without reasoning.
    """
    tokenizer = processor.tokenizer
    lead = "".join(tokenizer.convert_ids_to_tokens(lead_ids(processor, renderer(processor))))
    stops = tokenizer.convert_ids_to_tokens(list(stop_ids))
    parts = (special_tokens(tokenizer), stops, lead)
    if not has_switch(processor):
        return own_template(renderer(processor), *parts)
    other = not enable_thinking
    template = own_template(renderer(processor), *parts, reasons=not other)
    switched = None
    with suppress(DataError):
        switched = own_template(
            renderer(processor, enable_thinking=other), *parts, reasons=other
        ).model_copy(update={"enable_thinking": other})
    return template.model_copy(update={"enable_thinking": enable_thinking, "switched": switched})


def lead_ids(processor: Any, render: Render) -> list[int]:
    """The ids that a processor puts before a conversation, beside what its template writes."""
    text = render([message("user", "a")], False)
    ids = processor(text=[text], add_special_tokens=False)["input_ids"][0]
    written = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)[: len(ids) - len(written)]


def recipe_template(recipe: Recipe, section: AnySection) -> ChatTemplate:
    """The recipe's chat format; the checkpoint's own where a native model's recipe wants that."""
    if isinstance(section, NativeSection) and recipe.data.template == OWN_TEMPLATE:
        mode = recipe.data.enable_thinking
        processor = load_native_processor(section, None, mode)
        return template_of(processor, stop_ids(str(section.llm.name)), mode)
    return load_template(recipe.data.template).with_thinking(recipe.data.enable_thinking)


def stop_ids(name: str) -> list[int]:
    """The ids at which a model's generation stops, by its generation config and its config."""
    from transformers import GenerationConfig

    config = native_config(name)
    configs = [config.get_text_config(), config]
    with suppress(OSError):
        configs.append(GenerationConfig.from_pretrained(config_source(name)))
    ids = [getattr(each, "eos_token_id", None) for each in configs]
    lists = [each if isinstance(each, list) else [each] for each in ids]
    return list(dict.fromkeys(token for each in lists for token in each if token is not None))
