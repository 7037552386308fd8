"""A native model behind the server: it reads images with whole rows, and shares no prefixes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.native_models import Kind, save_native, with_native
from tests.helpers.served import CHAT, ask, image_part, served
from tests.helpers.tiny_models import built, parsed


def png(color: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


WIDE, SMALL = png("red", (64, 32)), png("blue", (32, 32))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "lfm2_vl"])
def test_several_images_are_answered_as_the_model_answers_them(
    kind: Kind, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    save_native(tmp_path / "native", kind)
    model = built(parsed(with_native(tiny_recipe("causal"), tmp_path / "native"))).eval()
    requests: list[list[bytes]] = [[], [WIDE], [SMALL], [WIDE, SMALL], [SMALL, WIDE], [WIDE, WIDE]]

    def body(images: list[bytes]) -> dict[str, Any]:
        content = [*map(image_part, images), {"type": "text", "text": "what is it?"}]
        messages = [{"role": "user", "content": content}]
        return {"model": "tiny", "messages": messages, "max_tokens": 6}

    replies = ask(served(model), *(("POST", CHAT, body(images)) for images in requests))
    assert [reply.status_code for reply in replies] == [200] * len(requests)
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [model.chat("what is it?", images, max_new_tokens=6) for images in requests]
