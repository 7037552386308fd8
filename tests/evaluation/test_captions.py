"""Overlap scores equal those of the libraries that define them."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_tune.evaluation import captions

PREDICTIONS = [
    "a red square on a table",
    "two dogs run in a park",
    "a man on a horse",
    "the the the the",
    "",
]
REFERENCES = [
    ["a red square lies on the table", "the table has a red square"],
    ["two dogs are running in the park", "dogs play in a park"],
    ["a man rides a brown horse on a beach", "a man on a horse"],
    ["a blue cup near the window", "the cup is blue"],
    ["an empty answer", "nothing at all"],
]
# CiderScorer of pycocoevalcap 1.2 on these texts.
CIDER = [3.60665225126773, 2.852022529472938, 6.025971471280654, 0.10255163526888866, 0.0]


def columns(references: list[list[str]]) -> list[list[str]]:
    """References as sacrebleu takes them: one list for each place of a reference."""
    return [list(texts) for texts in zip(*references, strict=True)]


def test_summed_counts_give_sacrebleus_scores() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu = captions.bleu_score(captions.bleu_statistics(PREDICTIONS, REFERENCES).sum(0))
    chrf = captions.chrf(captions.chrf_counts(PREDICTIONS, REFERENCES).sum(0))
    expected = columns(REFERENCES)
    assert bleu == pytest.approx(BLEU().corpus_score(PREDICTIONS, expected).score, abs=1e-6)
    assert chrf == pytest.approx(CHRF().corpus_score(PREDICTIONS, expected).score, abs=1e-6)
    assert bleu > 10 and chrf > 10


def test_rouge_l_is_the_best_over_references() -> None:
    scores = captions.rouge_l(PREDICTIONS, REFERENCES)
    # Twice the longest common subsequence over both lengths, by hand: 5 words of 6 and 7, 4 of 6
    # and 5, 5 of 5 and 5, 1 of 4 and 4.
    assert scores.tolist() == pytest.approx([10 / 13, 8 / 11, 1.0, 2 / 8, 0.0])


def test_cider_is_that_of_its_reference_implementation() -> None:
    scores = captions.cider(
        [text.split() for text in PREDICTIONS],
        [[text.split() for text in texts] for texts in REFERENCES],
    )
    np.testing.assert_allclose(scores, CIDER, atol=1e-6)


def test_cider_takes_words_without_punctuation() -> None:
    assert captions.tokens_of("A man's hat, on-top.") == ["a", "man's", "hat", "on", "top"]
