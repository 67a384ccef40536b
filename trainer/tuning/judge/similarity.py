"""How alike requests are: the cosine of their TF-IDF vectors over words and pairs of words."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from itertools import pairwise
from typing import Final

_WORD: Final = re.compile(r"\w+")
# Terms of a larger share of the texts say little of what a text is about, and would cost most of the time.
_COMMON: Final = 0.2
_FEW_TEXTS: Final = 50


def words_of(text: str) -> list[str]:
    """The words, whatever their case and what stands between them."""
    return _WORD.findall(text.casefold())


def overlap(first: Set[str], second: Set[str]) -> float:
    """The share of the two texts' words that both have, from 0 to 1."""
    return len(first & second) / max(1, len(first | second))


class SimilarTexts:
    """Texts that can be ranked by their similarity to one of them. Weights are (1 + log tf) · log(n / df)."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_terms(text)) for text in texts]
        spread = Counter(term for count in counts for term in count)
        most = max(_FEW_TEXTS, _COMMON * len(texts))
        self._vectors: list[dict[str, float]] = []
        self._postings: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, count in enumerate(counts):
            # A term that only one text has makes none of them alike, but does make its text unlike the others.
            weights = {term: (1 + math.log(tf)) * math.log(len(texts) / spread[term]) for term, tf in count.items()}
            size = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
            vector = {term: weight / size for term, weight in weights.items() if weight and 1 < spread[term] <= most}
            self._vectors.append(vector)
            for term, weight in vector.items():
                self._postings[term].append((index, weight))

    def nearest(self, index: int) -> list[tuple[int, float]]:
        """All texts that share a word with text `index`, the most similar first: their indices and cosines."""
        cosines: defaultdict[int, float] = defaultdict(float)
        for term, weight in self._vectors[index].items():
            for other, its_weight in self._postings[term]:
                cosines[other] += weight * its_weight
        cosines.pop(index, None)
        return sorted(cosines.items(), key=lambda found: (-found[1], found[0]))


def _terms(text: str) -> list[str]:
    words = words_of(text)
    return [*words, *(f"{first} {second}" for first, second in pairwise(words))]
