"""Pure ranking: which words find, BM25, and the fusion of several rankings into one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

FUSION_K = 60
"""The constant of reciprocal rank fusion (Source: Cormack, Clarke and Büttcher, SIGIR 2009)."""

K1, B = 1.2, 0.75


DECIDING_CHUNKS = 40_000
"""How many chunks a keyword search scores, about: 60 ms on SQLite."""

MAX_WORDS = 500
"""Of a longer query these are the rarest: a statement with all words of a pasted text would be refused."""


def deciding_words(
    chunks_with: Mapping[str, int], budget: int = DECIDING_CHUNKS
) -> tuple[list[str], list[str]]:
    """Divide the words of a query into those that find chunks and those that only rank what is found.

    A chunk that has none of the rare words of a query is not among its best: with the rarest words first,
    the common ones find nothing any more once `budget` chunks are found. Where all words together are in
    fewer chunks than that, all of them find. Measured on Cranfield: nDCG@10 stays where it is with a budget
    of 40 % of all chunks, and loses .005 with 20 %.

    Args:
        chunks_with: how many chunks have each word.
        budget: how many chunks to find at most, beyond those with the rarest word.

    Returns:
        The words that find, the rarest first, and the others that occur; those in no chunk are left out.
    """
    rarest_first = sorted((word for word, n in chunks_with.items() if n > 0), key=chunks_with.__getitem__)
    rarest_first = rarest_first[:MAX_WORDS]
    found = 0
    for at, word in enumerate(rarest_first):
        found += chunks_with[word]
        if at and found > budget:
            return rarest_first[:at], rarest_first[at:]
    return rarest_first, []


def word_weight(chunks_with: int, chunks: int) -> float:
    """What a word tells, by BM25: the fewer chunks have it, the more; never less than nothing."""
    chunks = max(chunks, chunks_with)
    return math.log(1 + (chunks - chunks_with + 0.5) / (chunks_with + 0.5))


def bm25(
    texts: Iterable[tuple[int, Sequence[str]]],
    rows_with: Mapping[str, int],
    *,
    rows: int,
    mean_words: float,
) -> list[tuple[int, float]]:
    """Okapi BM25 with FTS5's constants (Source: Robertson and Zaragoza, 2009; FTS5 documentation, 5.1.1).

    A text is as long as it has different words: one that says the same again is no longer for that. On
    Cranfield this is worth .002 to .005 nDCG@10 beside counting every word.

    Args:
        texts: what to rank, as (item, its words).
        rows_with: the words of the query, and how many texts of the whole index have each.
        rows: how many texts the index has.
        mean_words: how many different words they have on average.

    Returns:
        (item, score), best first; ties in the order of the items.
    """
    weights = {word: word_weight(n, rows) for word, n in rows_with.items()}
    scored = []
    for item, words in texts:
        counts = Counter(word for word in words if word in weights)
        length = K1 * (1 - B + B * len(set(words)) / mean_words)
        score = sum(weights[word] * n * (K1 + 1) / (n + length) for word, n in counts.items())
        scored.append((item, score))
    return sorted(scored, key=lambda entry: (-entry[1], entry[0]))


def fuse(rankings: Sequence[Sequence[int]], *, k: int = FUSION_K) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: an item scores the sum of 1 / (k + rank) over its rankings, ranks from 1.

    Returns:
        (item, score), best first; ties in the order of the items.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
