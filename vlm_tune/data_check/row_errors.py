"""Kinds of faults of rows, each with its meaning.

Errors, counts and `vlm-tune check` use these names.
"""

from __future__ import annotations

BAD_ROWS = {
    "not_json": "a line, element or member that is not a JSON object",
    "not_csv": "a record that is not CSV, or has another width than the header",
    "damaged": "a part of a file or shard that can't be read",
    "unsafe": "a member of a shard that is a link, a pickle, or points outside it",
    "missing_field": "a field that the format needs is missing, empty, NaN or infinite",
    "field": "a field has an unusable value",
    "unused_field": "a meaningful field, such as choices or weight, that the format does not read",
    "ambiguous": "a value with two possible meanings",
    "unsupported": "tools, a URL, or an unsupported video format",
    "role": "a missing or unknown role",
    "turns": "turns that don't alternate, or no answer to the last question",
    "text": "text with half a character (a surrogate without its pair)",
    "empty_question": "a question without text and media",
    "empty_answer": "an answer without a visible character",
    "equal_answers": "a chosen answer that equals the rejected one",
    "image_count": "the numbers of images and of positions for them differ, or an image is missing",
    "box": "a box or point that is invalid, empty, or outside its image, or a number that differs "
    "from the marks",
    "image_missing": "no such image, video or audio file",
    "image_outside": "an image, video or audio path outside the image root",
    "image_unreadable": "an image that is truncated, empty, too large, or of another format",
    "video_unreadable": "a video that can't be decoded, or ends early",
    "audio_unreadable": "audio that is truncated, empty, over an hour long, or of another format",
    "audio_long": "audio that is longer than the windows of the model's tower",
    "modality": "audio for an image model, or images for an audio model",
    "shots": "too few other rows for worked examples",
    "template": "turns that the chat template can't represent",
    "unsupervised": "every label is masked: the row would train nothing",
    "overlong": "more tokens than data.max_length",
    "row": "anything else",
}
"""Rows that can't be used.

`overlong` also counts rows that are dropped, split or trimmed as the recipe says.
"""

LEFT_OUT = {
    "small_image": "a side under clean.min_side",
    "short_text": "fewer characters than clean.min_chars",
    "long_text": "more characters than clean.max_chars",
    "language": "none of clean.languages",
    "duplicate": "the text and media of an earlier row",
}
"""Rows that the recipe's cleaning rules leave out."""

FOUND = {
    "source": "a source that can't be opened or read to its end",
    "form": "rows of a format that the stage's objective does not train on",
    "too_many_bad": "more bad rows than data.max_bad_rows",
    "no_rows": "no row is left to train on",
    "split": "a part held out of train that is empty, or far from its share",
    "bound": "rows over train.batch_tokens or data.row_length, which are alone in their batch",
    "judgements": "liked and disliked answers that the weights of kto do not balance, or only one "
    "kind of them",
    "unfit": "rows that the language model can't read: longer than its positions, or joined",
    "few_rows": "fewer rows than one global batch, or than processes",
    "leak_row": "a row of validation or test that is also trained on",
    "leak_image": "an image or clip of validation or test that is also trained on, byte for byte",
    "leak_look": "an image of validation or test that looks like a training image",
    "image_tiny": "an image with a side under 16 pixels",
    "image_huge": "an image of over 25 megapixels",
    "image_narrow": "an image with sides of over 8 to 1",
    "image_plain": "an image of one color",
    "control_text": "a text that spells a control token or media mark; it stays plain text",
}
"""Further findings of `vlm-tune check`."""

KINDS = BAD_ROWS | LEFT_OUT | FOUND
