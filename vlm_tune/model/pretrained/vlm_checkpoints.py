"""Existing vision-language models to start from: their parts as sections of a recipe.

Supported are LLaVA-1.5 in transformers' layout and in the LLaVA repository's, BLIP-2 and
InstructBLIP. A recipe's tower, connector and LLM can each name such a model; each then loads its
part of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlm_tune.config.model import (
    BaseConnector,
    LinearConnector,
    Llm,
    MlpConnector,
    ModelSection,
    PretrainedModel,
    QFormerConnector,
    TransformersTower,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.rules import check_parts
from vlm_tune.errors import ModelError
from vlm_tune.model.build_checks import check_model
from vlm_tune.model.hub import (
    check_base,
    config_source,
    is_ours,
    load_reason,
    read_json,
    unmerged,
)
from vlm_tune.model.vlm_layouts import ORIGINAL_TYPES, Vlm, find_vlm, tensor_names
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted, reason_of


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
    try:
        section = ModelSection.model_validate(read_json(folder / "config.json").get("model"))
    except ValidationError as error:
        raise ModelError(
            f"{folder}: config.json is not what was written ({error.errors()[0]['msg']})"
        ) from None
    section = moved(folder, section, AS_SAVED)
    llm = section.llm.model_copy(update=source.llm.model_dump())
    if (folder / "llm").is_dir():
        llm = Llm(kind=llm.kind, name=str(folder / "llm"), **source.llm.model_dump())
    tower = section.tower.model_copy(update=source.tower.model_dump(exclude_unset=True))
    return section.model_copy(update={"llm": llm, "tower": tower})


def model_section(recipe: Recipe) -> ModelSection:
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
            "vision-language model of that name on the Hub that is LLaVA-1.5, BLIP-2 or "
            "InstructBLIP; a run's whole model is written by `vlm-tune merge RUN --output FOLDER`"
        )
    if vlm is None:
        raise ModelError(
            f"model.pretrained: {quoted(source.pretrained)} is no vision-language model "
            "of a known kind (LLaVA-1.5 in transformers' layout or the LLaVA repository's, "
            "BLIP-2, InstructBLIP): expected its config.json"
        )
    tower, connector, kind = SECTIONS[vlm.kind](vlm)
    return ModelSection(
        tower=tower.model_copy(update=source.tower.model_dump(exclude_unset=True)),
        connector=connector,
        llm=Llm(kind=kind, name=vlm.name, **source.llm.model_dump()),
    )


VlmParts = tuple[TransformersTower, BaseConnector | QFormerConnector, Literal["causal", "seq2seq"]]
"""A model's tower and connector as sections of a recipe, and the kind of its LLM."""


# --- LLaVA ----------------------------------------------------------------------------------------


def _llava(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA-1.5 in transformers' layout; unsupported variants raise `ModelError`."""
    whole = _transformers_config(vlm)
    vision = whole.vision_config
    layer = whole.vision_feature_layer
    strategy = whole.vision_feature_select_strategy
    if not isinstance(layer, int):
        _refuse(vlm, f"features of the layers {layer} joined (vision_feature_layer)", "one layer")
    if not getattr(whole, "multimodal_projector_bias", True):
        _refuse(vlm, "a projector without biases (multimodal_projector_bias)", "one with them")
    act = whole.projector_hidden_act
    if act not in ("gelu", "linear"):
        _refuse(vlm, f"a projector with {act} (projector_hidden_act)", "gelu")
    has_class = vision.model_type == "clip_vision_model"
    if not has_class and strategy == "default":
        _refuse(
            vlm,
            "all patches but the first of a tower without a class token "
            "(vision_feature_select_strategy)",
            "full",
        )
    connector = (
        LinearConnector(kind="linear", weights=vlm.name)
        if act == "linear"
        else MlpConnector(kind="mlp", weights=vlm.name)
    )
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=layer if layer < 0 else layer - vision.num_hidden_layers - 1,
        class_token=has_class and strategy == "full",
        **_preprocessing(vlm, vision.image_size),
    )
    return tower, connector, "causal"


def _llava_original(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA-1.5 in the LLaVA repository's layout, as `_llava`."""
    config = vlm.config
    projector = str(config.get("mm_projector_type", "linear"))
    shape = config.get("image_aspect_ratio") or "square"
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", projector)
    connector: Any = None
    if projector == "linear":
        connector = LinearConnector(kind="linear", weights=vlm.name)
    elif mlp and int(mlp[1]) > 1:
        connector = MlpConnector(kind="mlp", depth=int(mlp[1]), weights=vlm.name)
    else:
        _refuse(vlm, f"a projector of type {projector} (mm_projector_type)", "linear or mlp2x_gelu")
    if shape not in ("square", "pad"):
        _refuse(vlm, f"images of image_aspect_ratio {shape}", "LLaVA-1.5's square or pad")
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        _refuse(
            vlm,
            "tokens around an image (mm_use_im_start_end, mm_use_im_patch_token)",
            "none, as in LLaVA-1.5",
        )
    tower = TransformersTower(
        kind="transformers",
        name=str(config["mm_vision_tower"]),
        weights=vlm.name
        if any(re.match(vlm.layout.tower, key) for key in tensor_names(vlm))
        else None,
        layer=int(config.get("mm_vision_select_layer", -2)),
        class_token=config.get("mm_vision_select_feature", "patch") == "cls_patch",
        resize="pad" if shape == "pad" else "crop",
    )
    return tower, connector, "causal"


# --- BLIP-2 and InstructBLIP ----------------------------------------------------------------------


def _blip(vlm: Vlm) -> VlmParts:
    """The parts of a BLIP-2 or InstructBLIP; unsupported variants raise `ModelError`."""
    whole = _transformers_config(vlm)
    former = whole.qformer_config
    text = vlm.kind == "instructblip"
    expected = {
        "hidden_act": "gelu",
        "intermediate_size": 4 * former.hidden_size,
        "layer_norm_eps": 1e-12,
    }
    expected |= {"use_qformer_text_input": False} if vlm.kind == "blip-2" else {}
    for key, value in expected.items():
        if getattr(former, key, value) != value:
            _refuse(vlm, f"a Q-Former whose {key} is {getattr(former, key)}", str(value))
    if not whole.text_config.is_encoder_decoder:
        _refuse(
            vlm,
            f"a decoder ({whole.text_config.model_type}) as its language model",
            "Flan-T5 or another encoder-decoder",
        )
    text_options = (
        {
            "tokenizer": vlm.name,
            "vocab_size": former.vocab_size,
            "max_text": former.max_position_embeddings,
        }
        if text
        else {}
    )
    connector = QFormerConnector(
        kind="qformer",
        queries=whole.num_query_tokens,
        width=former.hidden_size,
        depth=former.num_hidden_layers,
        heads=former.num_attention_heads,
        every=former.cross_attention_frequency,
        text=text,
        weights=vlm.name,
        **text_options,
    )
    # transformers' tower includes the norm after the last block; the features of all tokens are
    # used.
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=-1,
        final_norm=True,
        class_token=True,
        **_preprocessing(vlm, whole.vision_config.image_size),
    )
    return tower, connector, "seq2seq"


SECTIONS = {
    "llava": _llava,
    "llava_original": _llava_original,
    "blip-2": _blip,
    "instructblip": _blip,
}
"""The functions that describe a model's parts, by kind."""


# --- shared by all kinds --------------------------------------------------------------------------


def _refuse(vlm: Vlm, feature: str, expected: str) -> None:
    """Raises `ModelError` for a model with a feature that is not supported."""
    raise ModelError(
        f"model.pretrained: {quoted(vlm.name)} has {feature}, which can't be taken over; "
        f"expected {expected}"
    )


def _transformers_config(vlm: Vlm) -> Any:
    """transformers' config of the whole model. Raises `ModelError` if it can't be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(config_source(vlm.name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.pretrained: can't read the config of {quoted(vlm.name)}: "
            f"{load_reason(vlm.name, error)}"
        ) from None


def _preprocessing(vlm: Vlm, side: int) -> dict[str, Any]:
    """The tower's options that reproduce the checkpoint's own image processor.

    These are `resize`, how an image is made square, and `image_size` if it is not `side`, the
    tower's. Raises `ModelError` for an image processor that is missing or not supported.
    """
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            config_source(vlm.name), backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.pretrained: {quoted(vlm.name)} needs its preprocessor_config.json: "
            f"{reason_of(error)}"
        ) from None
    if processor.resample != 3 or not (
        processor.do_resize and processor.do_rescale and processor.do_normalize
    ):
        _refuse(
            vlm,
            "an image processor that does not resize, rescale and normalise, or not bicubically",
            "resample: 3",
        )
    if abs(processor.rescale_factor * 255 - 1) > 1e-6:
        _refuse(vlm, f"pixels scaled by {processor.rescale_factor}", "1/255")
    size = processor.size
    crop = processor.crop_size
    if getattr(processor, "do_pad", None):
        how = "pad"
        sides = {size.height, size.width} - {None} or {size.shortest_edge}
    elif getattr(processor, "do_center_crop", None):
        how = "crop" if size.shortest_edge else "squash"
        sides = {crop.height, crop.width, size.shortest_edge or size.height}
    else:
        how = "squash"
        sides = {size.height, size.width}
    if len(sides) != 1 or None in sides:
        _refuse(
            vlm,
            f"an image processor with size {dict(size)} and crop_size {dict(crop or {})}",
            "one square size",
        )
    input_size = sides.pop()
    return {"resize": how} | ({} if input_size == side else {"image_size": input_size})


def language_config(vlm: Vlm) -> Any:
    """transformers' config of the language model inside a vision-language model."""
    if vlm.kind != "llava_original":
        return _transformers_config(vlm).text_config
    from transformers import AutoConfig

    kind = ORIGINAL_TYPES[vlm.config["model_type"]]
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    return AutoConfig.for_model(
        kind, **{key: value for key, value in vlm.config.items() if key in known}
    )


def language_names(vlm: Vlm, config: Any) -> dict[str, str]:
    """The names of the LLM's tensors in its own class, by patterns of their names in the files."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    base = mapping[type(config)].base_model_prefix if type(config) in mapping else ""
    return {
        old.replace("{base}", base): new.replace("{base}", base)
        for old, new in vlm.layout.language.items()
    }
