"""What answers look like as a policy drifts: diversity, likeness to each other, refusals, by rule.

distinct-n (arXiv 1510.03055): different n-grams over all n-grams. Self-similarity: the mean cosine of two answers as
counts of word pairs; of one prompt where it has several answers, else of different prompts.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

MOST_PAIRS = 20_000  # that self-similarity looks at
REFUSALS = re.compile(
    r"\b(?:i(?:'m| am) sorry,? but|i (?:can ?not|can't|won't)|i(?:'m| am) (?:not able|unable) to|"
    r"i must (?:decline|refuse)|as an ai\b|i do(?:n't| not) feel comfortable|it(?:'s| is) not appropriate)",
    re.IGNORECASE,
)
OPENING = 200  # characters of an answer in which a refusal stands


def is_refusal(answer: str) -> bool:
    return REFUSALS.search(answer.replace("’", "'")[:OPENING]) is not None


def distinct(answers: Sequence[str], n: int) -> float:
    """NaN where no answer has n words."""
    grams = [gram for answer in answers for gram in _grams(answer, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_similarity(answers: Sequence[Sequence[str]]) -> float:  # (P, N)
    """0 to 1; NaN where there are no two answers."""
    if any(len(own) > 1 for own in answers):
        pairs = [pair for own in answers for pair in combinations([_counts(answer) for answer in own], 2)]
    else:
        pairs = list(combinations([_counts(answer) for own in answers for answer in own], 2))
    step = max(1, len(pairs) // MOST_PAIRS)
    found = [_cosine(*pair) for pair in pairs[::step]]
    return sum(found) / len(found) if found else math.nan


def signs_of(answers: Sequence[Sequence[str]]) -> dict[str, float]:  # (P, N)
    flat = [answer for own in answers for answer in own]
    return {
        "distinct_1": distinct(flat, 1),
        "distinct_2": distinct(flat, 2),
        "self_similarity": self_similarity(answers),
        "refusals": sum(map(is_refusal, flat)) / len(flat) if flat else math.nan,
    }


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _counts(text: str) -> Counter:
    return Counter(_grams(text, 2) or _grams(text, 1))


def _cosine(first: Counter, second: Counter) -> float:
    """Two answers without a word are alike."""
    norms = math.sqrt(sum(v * v for v in first.values()) * sum(v * v for v in second.values()))
    if not norms:
        return float(first == second)
    return sum(count * second[gram] for gram, count in first.items()) / norms
