"""Golden ids and masks of one fixed conversation for every chat format.

REGENERATE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.chat_samples import CHAT, IMAGE, LAYOUTS, fitting, processor, turns
from vlm_tune.data.types import Conversation

FOLDER = Path(__file__).parent.parent.parent / "golden" / "chat"
ROW = Conversation(
    "golden",
    turns("Is it red?", "no", "What <|im_end|></s> then?", "blue, 蓝", system="Look.", image=True),
)


def golden(name: str) -> dict[str, Any]:
    """Ids (of bytes: the tokenizer has no merges) and labels, by layout."""
    examples: dict[str, Any] = {}
    row = replace(ROW, messages=fitting(name, ROW.messages))
    for layout in [layout for other, layout in LAYOUTS if other == name]:
        chat_processor = processor(name, "bytes", layout)
        examples[layout] = [
            {
                "text": chat_processor.tokenizer.decode(
                    example.input_ids[~example.image_mask].tolist()
                ),
                "ids": example.input_ids.tolist(),
                "image": [int(place) for place in example.image_mask.nonzero()[0]],
                "labels": example.labels.tolist(),
            }
            for example in chat_processor.examples(row)
        ]
    return examples


@pytest.mark.parametrize("name", CHAT)
def test_ids_and_masks_are_those_of_the_golden_file(name: str) -> None:
    path = FOLDER / f"{name}.json"
    examples = golden(name)
    if os.environ.get("REGENERATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(examples, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
        )
    assert examples == json.loads(path.read_text(encoding="utf-8"))


def test_every_golden_file_is_of_a_shipped_format() -> None:
    assert (
        sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.json"))
        == CHAT
    )
    assert IMAGE in ROW.media
