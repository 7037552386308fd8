"""Towers of audio: log-mel frames in, features of spans of time out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.config.towers import AudioTower
from vlm_tune.data.audio.log_mel import HOP, RATE, AudioProcessor
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import check_base, config_source, load_reason
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.weights import check_folder, check_loading
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted

STRIDE = 2
"""Log-mel frames of a token: the second convolution halves their number."""
TOKENS_A_SECOND = RATE // HOP // STRIDE
ENCODER_ALONE = {"decoder_layers": 0}
"""Keys of a config whose model has no decoder to load."""


class WhisperTower(MediaTower):
    """The encoder of a Whisper model; features are its last hidden states, normalised.

    Adjacent tokens are averaged as configured. Source: arXiv:2212.04356.
    """

    input_dtype = torch.float32

    def __init__(self, config: AudioTower, rebuild: dict[str, Any] | None) -> None:
        from transformers import WhisperConfig, WhisperModel

        super().__init__(is_pretrained=config.name is not None)
        self.rebuild = rebuild or audio_config(config)
        whisper = WhisperConfig(**self.rebuild["audio_config"])
        known = whisper.max_source_positions // TOKENS_A_SECOND
        seconds = config.seconds or known
        if seconds > known:
            raise ModelError(
                f"model.tower.seconds: the tower has positions for {known} seconds, not {seconds}"
            )
        if rebuild is None and config.name is not None:
            encoder = _pretrained_encoder(config.name, whisper)
        else:
            encoder = WhisperModel(whisper).encoder
        tokens = seconds * TOKENS_A_SECOND
        if tokens % config.pool:
            raise ModelError(
                f"model.tower.pool: {config.pool} does not divide the {tokens} tokens of "
                f"{seconds} seconds"
            )
        _shorten(encoder, tokens)
        self.model = encoder
        self.pool = config.pool
        self.seconds = seconds
        self.input_shape = (whisper.num_mel_bins, seconds * RATE // HOP)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] of log-mel frames float[B, bins, frames]."""
        dtype = next(self.parameters()).dtype
        states = self.model(frames.to(dtype)).last_hidden_state
        return states.unflatten(1, (-1, self.pool)).mean(2) if self.pool > 1 else states


def _shorten(encoder: Any, tokens: int) -> None:
    """Leaves an encoder the first `tokens` of its positions."""
    positions = encoder.embed_positions
    if tokens == positions.num_embeddings:
        return
    shorter = nn.Embedding(tokens, positions.embedding_dim, device="meta")
    shorter.weight = nn.Parameter(positions.weight.detach()[:tokens].clone(), requires_grad=False)
    encoder.embed_positions = shorter
    encoder.max_source_positions = encoder.config.max_source_positions = tokens


def audio_processor(config: AudioTower, tower: WhisperTower) -> AudioProcessor:
    """The preprocessing of a tower's clips."""
    return AudioProcessor(tower.seconds, tower.input_shape[0], config.windows)


def audio_config(config: AudioTower) -> dict[str, Any]:
    """The description from which the tower is made without its weights.

    Raises `ModelError` for a name that has no Whisper model.
    """
    from transformers import AutoConfig

    if config.name is None:
        return {"audio_config": {**(config.config or {}), **ENCODER_ALONE}}
    check_base(config.name, "model.tower.name")
    try:
        whole: Any = AutoConfig.from_pretrained(config_source(config.name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.tower.name: can't load the tower {quoted(config.name)}: "
            f"{load_reason(config.name, error)}"
        ) from None
    described = whole.to_dict()
    if described["model_type"] != "whisper":
        raise ModelError(
            f"the tower {quoted(config.name)} is of type {described['model_type']}; "
            "a tower of kind audio is whisper's encoder"
        )
    return {"audio_config": described | ENCODER_ALONE}


def _pretrained_encoder(name: str, whisper: Any) -> Any:
    """The encoder of a Whisper model by hub name or folder, with its weights.

    Raises `ModelError` if a weight is missing or has another shape.
    """
    from transformers import WhisperModel

    if is_folder(name):
        check_folder(Path(name))
    try:
        factory: Any = WhisperModel
        model, info = factory.from_pretrained(
            name,
            config=whisper,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}"
        ) from None
    # A whole model holds more than the encoder, but no weight of that may be missing.
    check_loading(
        info | {"unexpected_keys": ()}, f"the weights in {quoted(name)} do not fit the tower"
    )
    return model.encoder
