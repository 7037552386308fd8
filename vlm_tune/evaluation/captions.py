"""Overlap of longer texts: BLEU, chrF, ROUGE-L and CIDEr.

BLEU and chrF are sacrebleu's and ROUGE-L is rouge-score's. CIDEr's reference implementation needs
Java for its tokenizer alone; here it takes tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_tune.compat import chrf_score, chrf_statistics

ORDERS = 4
"""The longest n-grams of CIDEr."""
SIGMA = 6.0
"""The width of CIDEr's penalty for a difference in length, in tokens."""
Ngram = tuple[str, ...]
TOKEN = re.compile(r"\w+(?:'\w+)?")


def bleu_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The counts that BLEU is computed from: float64[rows, 10].

    Length, reference length, matches of 1- to 4-grams and their numbers.
    """
    from sacrebleu.metrics.bleu import BLEU

    # Of a sentence's score only its counts are used, which do not depend on the setting.
    bleu = BLEU(effective_order=True)
    scores = (bleu.sentence_score(*pair) for pair in zip(predictions, references, strict=True))
    rows = [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores]
    return np.array(rows, dtype=np.float64)


def bleu_score(totals: np.ndarray) -> float:
    """sacrebleu's corpus BLEU (13a tokens, exponential smoothing), 0 to 100, of summed counts."""
    from sacrebleu.metrics.bleu import BLEU

    length, reference_length, *counts = totals.tolist()
    return BLEU.compute_bleu(
        counts[:4], counts[4:], int(length), int(reference_length), smooth_method="exp"
    ).score


def chrf_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The counts that chrF is computed from: float64[rows, 18]."""
    return np.array(chrf_statistics(predictions, references), dtype=np.float64)


def chrf(totals: np.ndarray) -> float:
    """sacrebleu's corpus chrF2, 0 to 100, of summed counts."""
    return chrf_score(totals.tolist())


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """rouge-score's ROUGE-L F-measure without stemming, best over references: float64[rows]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = (
        scorer.score_multi(list(targets), prediction)["rougeL"].fmeasure
        for prediction, targets in zip(predictions, references, strict=True)
    )
    return np.array(list(scores), dtype=np.float64)


# --- CIDEr ----------------------------------------------------------------------------------------


def tokens_of(text: str) -> list[str]:
    """Lower-case words without punctuation, as CIDEr takes them."""
    return TOKEN.findall(text.lower())


def cider(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> np.ndarray:
    """CIDEr-D of each row, 0 to 10, as the CiderScorer of pycocoevalcap computes it: float64[rows].

    Inverse document frequencies are those of all rows' references, so the score of a row depends on
    the others. Source: Vedantam et al. 2015.

    Args:
        predictions: the tokens of each answer.
        references: the tokens of each of a row's references.
    """
    targets = [[_ngrams(text) for text in texts] for texts in references]
    frequencies = Counter(
        ngram for texts in targets for ngram in {ngram for text in texts for ngram in text}
    )
    rarest = math.log(len(targets)) if targets else 0.0

    def rarity(ngram: Ngram) -> float:
        return rarest - math.log(max(1, frequencies[ngram]))

    scores = []
    for words, texts in zip(predictions, targets, strict=True):
        answer = _Weighted.of(_ngrams(words), rarity)
        similarities = [answer.similarity(_Weighted.of(text, rarity)) for text in texts]
        scores.append(10 * sum(similarities) / max(len(similarities), 1))
    return np.array(scores, dtype=np.float64)


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, ORDERS + 1)
        for start in range(len(words) - order + 1)
    )


@dataclass(frozen=True)
class _Weighted:
    """A text as CIDEr compares it.

    Attributes:
        weights: tf-idf weights of its n-grams, by n from 1.
        length: its number of 2-grams, by which the reference implementation counts length.
    """

    weights: list[dict[Ngram, float]]
    length: int

    @classmethod
    def of(cls, counts: Counter[Ngram], rarity: Callable[[Ngram], float]) -> _Weighted:
        weights: list[dict[Ngram, float]] = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * rarity(ngram)
        return cls(weights, sum(count for ngram, count in counts.items() if len(ngram) == 2))

    def similarity(self, target: _Weighted) -> float:
        """Clipped cosine similarity, mean over n, less a penalty for another length."""
        penalty = math.exp(-((self.length - target.length) ** 2) / (2 * SIGMA**2))
        cosines = []
        for weights, wanted in zip(self.weights, target.weights, strict=True):
            product = sum(
                min(weight, wanted.get(ngram, 0.0)) * wanted.get(ngram, 0.0)
                for ngram, weight in weights.items()
            )
            norms = math.hypot(*weights.values()) * math.hypot(*wanted.values())
            cosines.append(product / norms if norms else product)
        return penalty * sum(cosines) / ORDERS
