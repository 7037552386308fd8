"""Comparisons of one answer with its references; each follows a published rule.

This module does not import torch.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        strict=True,
    )
) | {"ten": "10"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Characters that VQA's rule removes, or replaces by a space between letters."""
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
"""Words that VQA's rule takes as equal to those without one of their apostrophes."""
MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
RELAXED = 0.05
"""ChartQA's largest relative error of a number that counts as right."""
LEAST_SIMILARITY = 0.5
"""ANLS's threshold: an answer that is less similar than that scores 0."""


def normalise(text: str) -> str:
    """The text in the form that exact match compares.

    It is NFKC, case-folded, with runs of white space as one space, and without a final full stop
    (unless it is nothing else).
    """
    joined = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return joined.removesuffix(".") or joined


def vqa_normalise(text: str) -> str:
    """The text in the form that the VQA challenge compares.

    It is lower case, with punctuation removed, number words as digits, without articles, and with
    the apostrophes of contractions. Source: https://visualqa.org/evaluation.html
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or COMMA.search(text) else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", plain).lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQAv2's soft accuracy from 0 to 1.

    The mean over all ways to leave one of the (usually ten) references out of min(1, m / 3), where
    m counts the others that equal the prediction. Both sides are normalised always; the challenge's
    own script does so only where the references differ.
    """
    references = [vqa_normalise(reference) for reference in references]
    return soft_accuracy(vqa_normalise(prediction), references)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """The share of `vqa_accuracy` for an answer and references that are normalised already."""
    equal = [reference == answer for reference in references]
    matches = sum(equal)
    return sum(min(1.0, (matches - same) / 3) for same in equal) / len(equal)


def relaxed_match(prediction: str, reference: str) -> bool:
    """ChartQA's relaxed match: numbers within 5%, other texts equal but for case.

    `50%` is 0.5. A reference of 0 is compared as a text, as ChartQA does.
    Source: Masry et al. 2022, section 5.1.
    """
    answer = prediction.strip()
    expected = reference.strip()
    number = _number(answer)
    target = _number(expected)
    if number is not None and target:
        return abs(number - target) <= RELAXED * abs(target)
    return answer.lower() == expected.lower()


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, with ST-VQA's threshold of 0.5.

    The best over the references of 1 - distance / length of the longer text, and 0 where that is
    under 0.5. Case and runs of white space do not count.
    Source: Biten et al. 2019.
    """
    return max(_similarity(_plain(prediction), _plain(reference)) for reference in references)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    similarity = 1 - levenshtein(one, other) / longest
    return similarity if similarity >= LEAST_SIMILARITY else 0.0


def levenshtein(one: str, other: str) -> int:
    """The least number of characters to insert, delete or replace that turns one into the other.

    A column of the table is two integers with a bit for each row: whether the distance grows or
    shrinks there. Source: Myers 1999, in the form of Hyyrö 2003.
    """
    if not one:
        return len(other)
    places: dict[str, int] = {}
    for place, letter in enumerate(one):
        places[letter] = places.get(letter, 0) | 1 << place
    whole = (1 << len(one)) - 1
    last = 1 << (len(one) - 1)
    grows = whole
    shrinks = 0
    distance = len(one)
    for letter in other:
        equal = places.get(letter, 0)
        vertical = equal | shrinks
        horizontal = (((equal & grows) + grows) ^ grows) | equal
        right_grows = shrinks | (whole & ~(horizontal | grows))
        right_shrinks = grows & horizontal
        distance += bool(right_grows & last) - bool(right_shrinks & last)
        right_grows = right_grows << 1 | 1
        right_shrinks = right_shrinks << 1
        grows = whole & (right_shrinks | ~(vertical | right_grows))
        shrinks = whole & right_grows & vertical
    return distance
