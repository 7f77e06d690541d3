"""Nearest-neighbour search over passage vectors with FAISS.

`flat` searches the memory map of the vectors itself, in blocks that FAISS walks through, and keeps
no second copy. `hnsw` and `ivfpq` are FAISS indexes in a file, trained and filled from the memory
map block by block. All three only propose rows: a proposal is scored by the exact inner product,
summed in float64 in a fixed order, so that scores do not depend on the index or on the batch and
equal vectors have equal scores.

HNSW graphs are built by several threads; two builds of one graph may differ in a few links. A
graph is built once and then read from disk.

Shape letters: B questions, P passages, D vector length, K hits, N given or proposed rows.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.errors import ConfigError
from rlrag.retrieval.manifest import (
    Manifest,
    cannot_write,
    check_manifest,
    damaged,
    staged_directory,
)
from rlrag.retrieval.protocol import Hits, best_rows, check_num_hits, in_order

logger = logging.getLogger(__name__)

INDEX_FILE = "index.faiss"
# Links per node of an HNSW graph (M), as FAISS has them by default, and the size of the candidate
# list of a search (efSearch), which is larger where more rows are proposed.
HNSW_LINKS = 32
HNSW_SEARCH_DEPTH = 128
# Lists of an IVF-PQ index, where there are passages enough for them, and those that a search
# visits: it looks at an eighth of a large corpus, whose best hits are then scored exactly.
IVF_LISTS = 256
IVF_PROBES = 32
# Bytes of a vector in it, at most: an eighth of the numbers of the usual small encoders.
PQ_BYTES = 48
# k-means wants this many vectors a centroid; FAISS warns below it.
VECTORS_PER_LIST = 39
# Eight bits a code: each of the product quantiser's parts learns this many centroids.
_PQ_CENTROIDS = 256
_TRAINING_VECTORS_PER_LIST = 256
_BLOCK_ROWS = 8192
# Rows proposed beyond k, so that rounding in the proposal cannot push out a row that ties.
_SPARE_ROWS = 32
_ROUNDING = 1e-6
# A product-quantised order is coarse: this many times k rows are proposed and scored exactly.
_IVFPQ_PROPOSALS = 4
_GATHERED_FLOATS = 2**22


def _library() -> Any:
    import faiss  # its type stubs lack half of its classes, hence Any

    return faiss


def ivfpq_parameters(num_passages: int, size: int) -> dict[str, int]:
    """Lists of an IVF-PQ index of these vectors, and bytes of each, which divide its length.

    Example:
        >>> ivfpq_parameters(21_000_000, 384), ivfpq_parameters(2000, 1024)
        ({'lists': 256, 'bytes': 48}, {'lists': 51, 'bytes': 32})
    """
    return {
        "lists": min(IVF_LISTS, max(1, num_passages // VECTORS_PER_LIST)),
        "bytes": max(number for number in range(1, PQ_BYTES + 1) if size % number == 0),
    }


def check_index_fits(config: RetrievalConfig, num_passages: int) -> None:
    """Refuse an IVF-PQ index that so few vectors cannot train.

    Raises:
        ConfigError: naming both numbers.
    """
    if config.index == "ivfpq" and num_passages < _PQ_CENTROIDS:
        raise ConfigError(
            f"retrieval.index ivfpq learns from at least {_PQ_CENTROIDS} vectors, but there are "
            f"{num_passages} in a shard; use fewer retrieval.num_shards or retrieval.index flat"
        )


def open_index(
    vectors_PD: np.ndarray, config: RetrievalConfig, directory: Path, manifest: Manifest
) -> Any:
    """Load the FAISS index in `directory`, after building it where there is none.

    An IVF-PQ index has as many lists and bytes as the manifest says.

    Raises:
        ConfigError: when there are too few vectors for an IVF-PQ index.
        IndexMismatchError: when the directory belongs to something else or is damaged.
        SetupError: when the disk has no room.
    """
    faiss = _library()
    if not directory.exists():
        check_index_fits(config, len(vectors_PD))
        with staged_directory(directory, manifest) as staging:
            built = _build(vectors_PD, config, manifest)
            try:
                faiss.write_index(built, str(staging / INDEX_FILE))
            except RuntimeError as error:  # FAISS reports a full disk as its own
                raise cannot_write(directory, OSError(str(error))) from error
    check_manifest(directory, manifest)
    try:
        index = faiss.read_index(str(directory / INDEX_FILE))
    except RuntimeError as error:
        raise damaged(directory / INDEX_FILE, error) from error
    if (index.ntotal, index.d) != vectors_PD.shape:
        raise damaged(
            directory / INDEX_FILE,
            f"it holds {index.ntotal} vectors of length {index.d} and not {vectors_PD.shape}",
        )
    return index


def _build(vectors_PD: np.ndarray, config: RetrievalConfig, manifest: Manifest) -> Any:
    faiss = _library()
    num_passages, size = vectors_PD.shape
    logger.info("building the %s index of %d vectors", config.index, num_passages)
    if config.index == "hnsw":
        index = faiss.index_factory(size, f"HNSW{HNSW_LINKS},Flat", faiss.METRIC_INNER_PRODUCT)
    else:
        # "np": no polysemous codes, whose training takes a second a byte and which are not used.
        lists, num_bytes = manifest.parameters["lists"], manifest.parameters["bytes"]
        factory = f"IVF{lists},PQ{num_bytes}x8np"
        index = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        # The number of vectors is checked above, with a message that names the setting.
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
        num_training = max(_TRAINING_VECTORS_PER_LIST * lists, 2**16)
        index.train(_sample(vectors_PD, num_training))
    for start in range(0, num_passages, _BLOCK_ROWS):
        index.add(np.ascontiguousarray(vectors_PD[start : start + _BLOCK_ROWS]))
    return index


def _sample(vectors_PD: np.ndarray, num_rows: int) -> np.ndarray:
    if num_rows >= len(vectors_PD):
        return np.array(vectors_PD)
    rows = np.random.default_rng(0).choice(len(vectors_PD), num_rows, replace=False)
    return np.array(vectors_PD[np.sort(rows)])


def exact_products(vectors_BD: np.ndarray, vectors_BND: np.ndarray) -> np.ndarray:
    """The inner products of B vectors with N each, summed in float64: float32 of shape (B, N)."""
    products_BN = np.einsum(
        "bd,bnd->bn", vectors_BD.astype(np.float64), vectors_BND.astype(np.float64)
    )
    return products_BN.astype(np.float32)


class VectorIndex:
    """Finds the vectors with the largest inner products.

    Args:
        vectors_PD: All vectors, usually a memory map.
        config: `index`.
        index: What `open_index` gave; None for `flat`.
    """

    def __init__(
        self, vectors_PD: np.ndarray, config: RetrievalConfig, index: Any | None = None
    ) -> None:
        self._vectors_PD = vectors_PD
        self._config = config
        self._index = index

    def search_vectors(self, vectors_BD: np.ndarray, k: int) -> Hits:
        """The best `k` rows for each question vector.

        A question for which an approximate index finds fewer than `k` rows, or for which more
        passages tie for the last place than were proposed, is answered by an exhaustive scan.
        """
        check_num_hits(k, len(self._vectors_PD))
        if not len(vectors_BD):
            return Hits(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
        rows_BN = self._propose(vectors_BD, k)
        scores_BN = self.inner_products(vectors_BD, np.maximum(rows_BN, 0))
        scores_BN[rows_BN < 0] = -np.inf
        hits = in_order(rows_BN, scores_BN, k)
        for position in np.flatnonzero(self._incomplete(rows_BN, scores_BN, hits)):
            scores_P = self._all_inner_products(vectors_BD[position])
            hits.rows_BK[position] = rows_K = best_rows(scores_P, k)
            hits.scores_BK[position] = scores_P[rows_K]
        return hits

    def _incomplete(self, rows_BN: np.ndarray, scores_BN: np.ndarray, hits: Hits) -> np.ndarray:
        missing_B = np.any(hits.rows_BK < 0, axis=1)
        if self._index is not None or rows_BN.shape[1] == len(self._vectors_PD):
            return missing_B
        return missing_B | (hits.scores_BK[:, -1] - scores_BN.min(axis=1) < _ROUNDING)

    def _propose(self, vectors_BD: np.ndarray, k: int) -> np.ndarray:
        """Rows that hold the best `k`, and some more; -1 where an index found none."""
        faiss = _library()
        num_passages = len(self._vectors_PD)
        depth = min(k + _SPARE_ROWS, num_passages)
        vectors_BD = np.ascontiguousarray(vectors_BD, dtype=np.float32)
        if self._index is None:
            return faiss.knn(vectors_BD, self._vectors_PD, depth, faiss.METRIC_INNER_PRODUCT)[1]
        if self._config.index == "hnsw":
            search_depth = max(HNSW_SEARCH_DEPTH, depth)
            parameters = faiss.SearchParametersHNSW(efSearch=search_depth)
        else:
            depth = min(_IVFPQ_PROPOSALS * k + _SPARE_ROWS, num_passages)
            parameters = faiss.SearchParametersIVF(nprobe=IVF_PROBES)
        return self._index.search(vectors_BD, depth, params=parameters)[1]

    def vectors(self, rows_N: np.ndarray) -> np.ndarray:
        """The vectors of given rows, float32 of shape (N, D)."""
        return np.asarray(self._vectors_PD[rows_N], dtype=np.float32)

    def inner_products(self, vectors_BD: np.ndarray, rows_BN: np.ndarray) -> np.ndarray:
        """The exact inner product of each given row with its question, shape (B, N)."""
        scores_BN = np.zeros(rows_BN.shape, dtype=np.float32)
        step = max(1, _GATHERED_FLOATS // max(1, rows_BN.shape[1] * vectors_BD.shape[1]))
        for start in range(0, len(rows_BN), step):
            part = slice(start, start + step)
            scores_BN[part] = exact_products(vectors_BD[part], self._vectors_PD[rows_BN[part]])
        return scores_BN

    def _all_inner_products(self, vector_D: np.ndarray) -> np.ndarray:
        scores_P = np.zeros(len(self._vectors_PD), dtype=np.float32)
        for start in range(0, len(scores_P), _BLOCK_ROWS):
            block = self._vectors_PD[start : start + _BLOCK_ROWS].astype(np.float64)
            scores_P[start : start + _BLOCK_ROWS] = np.einsum(
                "d,pd->p", vector_D.astype(np.float64), block
            )
        return scores_P
