"""Log-probabilities of a reference model, which come with the rows of preferences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vlm_tune.data.prepare.dataset import Group


@dataclass(frozen=True)
class StoredReferences:
    """Log-probabilities of answers under a reference model, of units by number.

    `logprobs` float32 holds those of all examples in order, `starts` where a unit's begin.
    """

    logprobs: np.ndarray
    starts: np.ndarray

    def attached(self, number: int, unit: Group) -> Group:
        """A unit's examples with their log-probabilities."""
        start = int(self.starts[number])
        examples: Group = []
        for example in unit:
            end = start + example.answer_numbers
            examples.append(replace(example, reference=self.logprobs[start:end]))
            start = end
        return examples
