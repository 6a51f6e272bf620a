"""Vectors in memory for exact search: an index that grows as documents come, and a view of one version.

Pure; `searching.py` reads the rows that it is filled with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BLOCK_ROWS = 8192
"""Vectors are kept in blocks, so that an index that grows copies none: 12 MB of 384 dimensions."""
NEVER = np.iinfo(np.int64).max
MAX_GONE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """Vectors for exact search: 100,000 of 384 dimensions take 154 MB and milliseconds a query.

    Attributes:
        ids: what each vector stands for, shape (n,).
        blocks: unit vectors, n in all, each block of shape (rows, dimensions).
        is_shown: which of them are searched, shape (n,); None for all.
    """

    ids: Ids
    blocks: Sequence[Matrix]
    is_shown: npt.NDArray[np.bool_] | None = None

    def among(self, demanded: Iterable[Sequence[int]], excluded: Iterable[Sequence[int]]) -> VectorIndex:
        """Those of the vectors whose ids are in each of some lists, and in none of others."""
        is_kept = np.ones(len(self.ids), np.bool_) if self.is_shown is None else self.is_shown
        for ids in demanded:
            is_kept = is_kept & np.isin(self.ids, np.array(ids, np.int64))
        for ids in excluded:
            is_kept = is_kept & ~np.isin(self.ids, np.array(ids, np.int64))
        return VectorIndex(self.ids, self.blocks, is_kept)

    def nearest(self, vector: Matrix, *, limit: int) -> list[tuple[int, float]]:
        """The `limit` nearest by cosine, as (id, similarity), nearest first; ties in the order of the ids."""
        if not len(self.ids):
            return []
        similarities = np.concatenate([block @ vector for block in self.blocks])
        shown = len(self.ids)
        if self.is_shown is not None:
            similarities[~self.is_shown] = -np.inf
            shown = int(np.count_nonzero(self.is_shown))
        count = min(limit, shown)
        if not count:
            return []
        # Everything at least as near as the last one in, so that ties are cut by id and not by chance.
        last = len(similarities) - count
        candidates = np.flatnonzero(similarities >= np.partition(similarities, last)[last])
        order = candidates[np.lexsort((self.ids[candidates], -similarities[candidates]))][:count]
        return [(int(self.ids[at]), float(similarities[at])) for at in order]


class GrowingIndex:
    """The vectors of an embedder, each with the versions of the index in which searches see it.

    Not safe in several threads at once; the views that it gives are, also while it grows.
    """

    def __init__(self) -> None:
        self.version = 0
        """The version of the index up to which it has been filled."""
        self._clear()

    def _clear(self) -> None:
        self._blocks: list[Matrix] = []
        self._rows = 0
        self._ids: Ids = np.empty(0, np.int64)
        self._documents: Ids = np.empty(0, np.int64)
        self._born: Ids = np.empty(0, np.int64)
        self._died: Ids = np.empty(0, np.int64)

    def add(self, version: int, documents: Ids, ids: Ids, vectors: Matrix) -> None:
        """Add vectors of documents that searches see from a version on.

        Args:
            version: that version.
            documents: the document of each vector, shape (n,).
            ids: what each stands for, shape (n,).
            vectors: of length one, shape (n, dimensions).
        """
        added = len(ids)
        self._ids = np.concatenate([self._ids, ids])
        self._documents = np.concatenate([self._documents, documents])
        self._born = np.concatenate([self._born, np.full(added, version)])
        self._died = np.concatenate([self._died, np.full(added, NEVER)])
        start = 0
        while start < added:
            at = self._rows % BLOCK_ROWS
            if at == 0:
                self._blocks.append(np.empty((BLOCK_ROWS, vectors.shape[1]), np.float32))
            taken = min(BLOCK_ROWS - at, added - start)
            # Beyond the rows of all views that are in use: these do not change.
            self._blocks[-1][at : at + taken] = vectors[start : start + taken]
            self._rows += taken
            start += taken

    def remove(self, version: int, documents: Iterable[int]) -> None:
        """Let searches see these documents no more, from a version on."""
        # Those that went before this: searches that are under way now may still see what goes now.
        self._forget(self._died < version)
        gone = np.isin(self._documents, np.fromiter(documents, np.int64)) & (self._died == NEVER)
        # A new array: views that are in use keep theirs.
        self._died = np.where(gone, version, self._died)

    def at(self, version: int) -> VectorIndex:
        """The index as it was at a version, not long ago."""
        is_shown = (self._born <= version) & (self._died > version)
        blocks = [block for _, block in self._filled()]
        return VectorIndex(self._ids, blocks, None if is_shown.all() else is_shown)

    def _forget(self, gone: npt.NDArray[np.bool_]) -> None:
        """Give up the room of vectors that are gone, once it is worth the copying."""
        if np.count_nonzero(gone) <= MAX_GONE_SHARE * self._rows:
            return
        kept = ~gone
        blocks = [block[kept[start : start + BLOCK_ROWS]] for start, block in self._filled()]
        documents, ids = self._documents[kept], self._ids[kept]
        born, died = self._born[kept], self._died[kept]
        self._clear()
        at = 0
        for block in blocks:
            rows = slice(at, at + len(block))
            self.add(0, documents[rows], ids[rows], block)
            at += len(block)
        self._born, self._died = born, died

    def _filled(self) -> list[tuple[int, Matrix]]:
        """The blocks as far as they are filled, each with the number of its first row."""
        starts = range(0, self._rows, BLOCK_ROWS)
        return [
            (start, block[: self._rows - start]) for start, block in zip(starts, self._blocks, strict=True)
        ]
