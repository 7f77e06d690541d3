"""The passage graph: edges between the passages of a corpus, and how they follow its changes.

Edges come from the texts of the whole corpus, so they know nothing of any question. Each weighs
what the two passages share, ln(N / df) nats with N passages, of which df have it:

- TITLE_OUT: the text mentions the name of the other passage's document (`texts.name_of`); df is
  the number of passages that mention it. At each place the longest of all names counts, and none
  within a longer one.
- TITLE_IN: the same edge from its other end.
- DOCUMENT: both are of one document (`texts.document_of`); df is its number of passages. There is
  no TITLE edge within a document.
- SHARED: rare names and years that both have (`texts.rare_spans` of title and text), those of 2 to
  12 passages; the weight is the sum over them. Of these a passage lists its 15 strongest.
- LINKED, OWN: brought by an `EdgeSource`, with its weights.

A passage's edges are made from inverted lists when they are asked for. So a document of many
passages takes no more room than others, a change of a few passages needs no rebuild though it
changes N and the df of others, and the edges are those of a graph built anew.

A name that begins or ceases to exist changes which names are longest in other texts. The words of
all texts are therefore kept, as numbers, and texts that hold a new name's rarest word are read
again.

Shape letters: P passages, S slots (a passage as it was when it was read), M neighbours, T words.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlrag import plugins
from rlrag.data.corpus import Corpus, encode_passage, hash_id
from rlrag.errors import ConfigError, DataError, RetrievalError, RlragError
from rlrag.records import Passage
from rlrag.retrieval.graph.incidence import Incidence, Keys, Lists
from rlrag.retrieval.graph.texts import (
    TEXTS_VERSION,
    NameTree,
    document_of,
    hash_texts,
    mentions_of,
    name_of,
    rare_spans,
    words_in_order,
)
from rlrag.retrieval.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_manifest,
    damaged,
    staged_directory,
)

MAX_SHARED = 15
"""SHARED edges that a passage lists."""
MIN_SHARED_DF, MAX_SHARED_DF = 2, 12
"""Passages that have a span which counts as rare."""

_BLOCK_WORDS = 2**20
_logger = logging.getLogger(__name__)


class EdgeKind(IntEnum):
    """Why there is an edge; the module says what each means."""

    TITLE_OUT = 0
    TITLE_IN = 1
    DOCUMENT = 2
    SHARED = 3
    LINKED = 4
    OWN = 5


EdgeSource = Callable[[Sequence[Passage]], Iterable[tuple[str, str, float]]]
"""Brings edges that begin at the passages it is given: (source id, target id, weight) each.

The target may be any passage of the corpus; an edge to one that the corpus lacks waits for it, one
from a passage to itself is left out, and of equal edges the heaviest counts. When passages are
added or replaced, the source is called with these alone. Its edges are of kind OWN, or LINKED where
the callable has an attribute `kind` that says so: for edges that lead from what a passage asks to
the passage that answers it.
"""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The edges of one passage, heaviest first, equal weights in the order of rows, then kinds.

    A passage comes once for each kind of edge that leads to it.
    """

    rows: np.ndarray
    """Rows of the corpus, int64 (M,)."""
    kinds: np.ndarray
    """Values of `EdgeKind`, int8 (M,)."""
    weights: np.ndarray
    """float32 (M,)."""


class PassageGraph:
    """Edges between the passages of a corpus, by their rows.

    Rows are those of the corpus: passages are added behind the last one, a replaced passage keeps
    its row, and those behind a deleted one move up.

    Example:
        >>> graph = PassageGraph.build(
        ...     [
        ...         Passage("a", "Ada Lovelace", "She worked with Charles Babbage."),
        ...         Passage("b", "Charles Babbage", "He designed an engine."),
        ...     ]
        ... )
        >>> found = graph.neighbours(0)
        >>> found.rows.tolist(), [EdgeKind(kind).name for kind in found.kinds]
        ([1, 1], ['TITLE_OUT', 'SHARED'])
        >>> graph.named_in("Where was Charles Babbage born?").tolist()
        [1]
    """

    def __init__(self, state: _State, sources: Sequence[_Source], corpus_digest: str | None):
        """Use `build` or `load`."""
        self._state = state
        self._sources = sources
        self._corpus_digest = corpus_digest

    @classmethod
    def build(
        cls, passages: Sequence[Passage] | Corpus, sources: Sequence[EdgeSource | str] = ()
    ) -> PassageGraph:
        """Read all passages once.

        Args:
            passages: The corpus, in the order of its rows.
            sources: What brings edges besides: callables, or `package.module:name` of them.

        Raises:
            ConfigError: when a source cannot be found.
            DataError: when a text is not Unicode.
            RetrievalError: when a source failed, or brought what is no edge of these passages.
        """
        found = [_Source(source) for source in sources]
        state = _State()
        state.fill(_read(state, passages, found))
        digest = getattr(passages, "content_hash", None) or _digest(passages)
        graph = cls(state, found, digest)
        graph._warn_of_waiting()
        return graph

    @classmethod
    def open(
        cls, corpus: Corpus, folder: Path, sources: Sequence[EdgeSource | str]
    ) -> PassageGraph:
        """The graph of a corpus, built and saved where it is not among a folder's indexes.

        Raises:
            RlragError: as `build`, `save` and `load` do.
        """
        found = [_Source(source) for source in sources]
        manifest = _manifest(corpus.content_hash, len(corpus), found)
        place = folder / manifest.directory_name
        if not place.is_dir():
            cls.build(corpus, sources).save(place)
        return cls.load(place, corpus.content_hash, sources)

    @property
    def num_passages(self) -> int:
        """Passages of the corpus (P)."""
        return len(self._state.slot_of_row)

    def neighbours(self, row: int) -> Neighbours:
        """The edges of one passage.

        Raises:
            IndexError: when there is no such row.
        """
        if not 0 <= row < self.num_passages:
            raise IndexError(f"row {row} is outside the graph of {self.num_passages} passages")
        state, slot = self._state, int(self._state.slot_of_row[row])
        parts = [
            *state.title_edges(slot),
            *state.document_edges(slot),
            *state.shared_edges(slot),
            *state.brought_edges(slot),
        ]
        if not parts:
            return Neighbours(np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.float32))
        rows = np.concatenate([part[1] for part in parts])
        sizes = [len(part[1]) for part in parts]
        kinds = np.repeat(np.array([part[0] for part in parts], dtype=np.int8), sizes)
        weights = np.concatenate([part[2] for part in parts])
        order = np.lexsort((kinds, rows, -weights))
        return Neighbours(rows[order], kinds[order], weights[order])

    def named_in(self, text: str) -> np.ndarray:
        """Rows of the passages whose document a text names, int64, ascending."""
        state = self._state
        hashes_T = hash_texts(words_in_order(text))
        _, nodes = state.names.find(hashes_T, np.array([0, len(hashes_T)]), state.is_name())
        rows = [state.live_rows(state.named.slots_of(node)) for node in set(nodes.tolist())]
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *rows]))

    def add(self, passages: Sequence[Passage]) -> None:
        """Follow passages that were added behind the last one.

        Raises:
            RetrievalError: when a source failed, or brought what is no edge of these passages.
        """
        num_rows = self.num_passages
        self._change([], passages, list(range(num_rows, num_rows + len(passages))))

    def replace(self, rows: Sequence[int], passages: Sequence[Passage]) -> None:
        """Follow passages that have taken the places of others.

        Raises:
            DataError: when rows are not distinct rows of the graph, or another number than there
                are passages.
            RetrievalError: when a source failed, or brought what is no edge of these passages.
        """
        if len(rows) != len(passages):
            raise DataError(f"{len(rows)} rows were to be replaced by {len(passages)} passages")
        self._change(self._checked(rows), passages, list(rows))

    def delete(self, rows: Sequence[int]) -> None:
        """Follow the deletion of passages; those behind them move up.

        Raises:
            DataError: when rows are not distinct rows of the graph.
        """
        self._change(self._checked(rows), (), [])
        self._state.close_up(rows)

    def save(self, directory: Path, corpus_digest: str | None = None) -> None:
        """Write the graph; where it lies already, nothing is done.

        Args:
            directory: Its place, which does not exist yet.
            corpus_digest: `content_hash` of the corpus. It may be left out for a graph as it was
                built or loaded, and must be given for one that has followed changes.

        Raises:
            ConfigError: when it must be given.
            IndexMismatchError: when something else lies in the directory.
            SetupError: when the directory cannot be written.
        """
        digest = corpus_digest or self._corpus_digest
        if digest is None:
            raise ConfigError(
                "the graph has followed changes since it was built; save it with the content_hash "
                "of the corpus as it is now"
            )
        manifest = _manifest(digest, self.num_passages, self._sources)
        if directory.exists():
            check_manifest(directory, manifest)
            return
        with staged_directory(directory, manifest) as staging:
            for name, values in self._state.compact().arrays().items():
                np.save(staging / f"{name}.npy", values)

    @classmethod
    def load(
        cls, directory: Path, corpus_digest: str, sources: Sequence[EdgeSource | str] = ()
    ) -> PassageGraph:
        """Open what `save` wrote; arrays stay on disk and are read where they are used.

        Args:
            directory: Its place.
            corpus_digest: `content_hash` of the corpus that it is used with.
            sources: Those that it was built with.

        Raises:
            IndexMismatchError: when it is missing, damaged or of another corpus or other sources.
        """
        found = [_Source(source) for source in sources]
        manifest = _manifest(corpus_digest, _num_passages(directory), found)
        check_manifest(directory, manifest)
        arrays = {}
        for name in _State().arrays():
            path = directory / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError, EOFError) as error:
                raise damaged(path, error) from error
        return cls(_State.of_arrays(arrays), found, corpus_digest)

    def _checked(self, rows: Sequence[int]) -> list[int]:
        outside = [row for row in rows if not 0 <= row < self.num_passages]
        if outside or len(set(rows)) < len(rows):
            what = f"row {outside[0]} is outside" if outside else "a row comes twice among those"
            raise DataError(f"{what} of the graph of {self.num_passages} passages")
        return [int(row) for row in rows]

    def _change(
        self, gone: Sequence[int], passages: Sequence[Passage], rows: Sequence[int]
    ) -> None:
        self._state.change(gone, _read(self._state, passages, self._sources), rows)
        self._corpus_digest = None
        if passages:
            self._warn_of_waiting()

    def _warn_of_waiting(self) -> None:
        waiting = self._state.num_waiting() if self._sources else 0
        if waiting:
            _logger.warning(
                "%d edges that were brought lead to passages that the corpus lacks; they wait "
                "until it has them",
                waiting,
            )


class _Source:
    """A source of edges, found by its name where it was given so."""

    def __init__(self, source: EdgeSource | str) -> None:
        found: Any = plugins.load("edge source", source) if isinstance(source, str) else source
        self.name = source if isinstance(source, str) else _name_of_callable(source)
        if not callable(found) or inspect.isclass(found):
            raise ConfigError(
                f"edge source {self.name!r} is a {type(found).__name__}; name a function, or an "
                "object that can be called"
            )
        self.identity = [self.name]
        if isinstance(source, str):
            self.identity = plugins.identity("edge source", source, ())
        self.kind = EdgeKind(getattr(found, "kind", EdgeKind.OWN))
        if self.kind not in (EdgeKind.OWN, EdgeKind.LINKED):
            raise ConfigError(
                f"edge source {self.name!r} has the kind {self.kind.name}; set it to OWN or LINKED"
            )
        self._find = found

    def edges(self, passages: Sequence[Passage]) -> dict[tuple[str, str], float]:
        """The heaviest weight of each pair (source id, target id)."""
        ids = {passage.id for passage in passages}
        edges: dict[tuple[str, str], float] = {}
        try:
            for start, end, weight in self._find(passages):
                if start not in ids:
                    raise RetrievalError(
                        f"edge source {self.name!r} brought an edge from {start!r}, which is none "
                        "of the passages that it was given"
                    )
                if not math.isfinite(weight):
                    raise RetrievalError(
                        f"edge source {self.name!r} brought the weight {weight} from {start!r} to "
                        f"{end!r}; weights are finite"
                    )
                if start != end:
                    edges[start, end] = max(weight, edges.get((start, end), -math.inf))
        except RlragError:
            raise
        except Exception as error:
            raise RetrievalError(
                f"edge source {self.name!r} failed with {type(error).__name__}: {error}"
            ) from error
        return edges


def _name_of_callable(source: Any) -> str:
    named = source if hasattr(source, "__qualname__") else type(source)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class _Read:
    """What some passages have, a list each."""

    words: Lists
    spans: Lists
    documents: Lists
    names: Lists
    ids: Lists
    targets: Lists
    weights: Lists
    kinds: Lists
    titles: Mapping[int, str] = field(default_factory=dict)
    """By node of a name, a title that has it."""

    def __len__(self) -> int:
        return len(self.words)


class _Numbered:
    """Lists of texts as lists of keys: each distinct text is hashed once."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self._items, self._counts = array("i"), array("i")

    def append(self, texts: Sequence[str]) -> None:
        known = self.known
        self._items.extend([known.setdefault(text, len(known)) for text in texts])
        self._counts.append(len(texts))

    def lists(self, key_of: np.ndarray) -> Lists:
        """With the key of each known text, -1 for none."""
        items = key_of[np.array(self._items, dtype=np.int32)]
        return _without_gaps(items, np.array(self._counts, dtype=np.int32))


def _without_gaps(items: np.ndarray, counts: np.ndarray) -> Lists:
    """Lists of these lengths without their items of -1."""
    kept = items >= 0
    if kept.all():
        return Lists.of_counts(counts, items)
    of_list = np.repeat(np.arange(len(counts)), counts)[kept]
    return Lists.of_counts(np.bincount(of_list, minlength=len(counts)), items[kept])


def _read(state: _State, passages: Sequence[Passage] | Corpus, sources: Sequence[_Source]) -> _Read:
    """Read passages; what is new in them gets keys."""
    words, spans, documents, titles = _Numbered(), _Numbered(), _Numbered(), _Numbered()
    ids: list[str] = []
    for passage in passages:
        words.append(words_in_order(passage.text))
        spans.append(rare_spans(passage.contents))
        document = document_of(passage.title)
        documents.append([document] if document else [])
        titles.append([passage.title])
        if sources:
            ids.append(passage.id)
    nodes = state.names.add([name_of(title) for title in titles.known])
    no_ids = Lists.of_counts(np.zeros(len(passages), dtype=np.int32), np.zeros(0, dtype=np.int32))
    id_lists = targets = kinds = no_ids
    weights = Lists(no_ids.starts, np.zeros(0, dtype=np.float32))
    if sources:
        id_lists = Lists.of_counts(np.ones(len(ids), dtype=np.int32), state.ids.add(_hashes(ids)))
        targets, weights, kinds = _brought(state, passages, ids, sources)
    return _Read(
        words=words.lists(state.words.add(hash_texts(words.known))),
        spans=spans.lists(state.span_keys.add(hash_texts(spans.known))),
        documents=documents.lists(state.document_keys.add(hash_texts(documents.known))),
        names=titles.lists(nodes),
        ids=id_lists,
        targets=targets,
        weights=weights,
        kinds=kinds,
        titles=dict(zip(nodes.tolist(), titles.known, strict=True)),
    )


def _brought(
    state: _State,
    passages: Sequence[Passage] | Corpus,
    ids: Sequence[str],
    sources: Sequence[_Source],
) -> tuple[Lists, Lists, Lists]:
    """Targets, weights and kinds of the edges that sources bring from each passage."""
    given: Any = passages
    best: dict[tuple[str, str, EdgeKind], float] = {}
    for source in sources:
        for (start, end), weight in source.edges(given).items():
            key = (start, end, source.kind)
            best[key] = max(weight, best.get(key, -math.inf))
    place = {passage_id: number for number, passage_id in enumerate(ids)}
    edges = sorted(best, key=lambda edge: place[edge[0]])
    counts = np.bincount(
        np.array([place[start] for start, _, _ in edges], dtype=np.int64), minlength=len(ids)
    )
    targets = state.ids.add(_hashes([end for _, end, _ in edges]))
    weights = np.array([best[edge] for edge in edges], dtype=np.float32)
    kinds = np.array([edge[2] for edge in edges], dtype=np.int32)
    return (
        Lists.of_counts(counts, targets),
        Lists.of_counts(counts, weights),
        Lists.of_counts(counts, kinds),
    )


def _hashes(ids: Iterable[str]) -> np.ndarray:
    return np.fromiter((int.from_bytes(hash_id(each), "big") for each in ids), dtype=np.uint64)


_Edges = tuple[EdgeKind, np.ndarray, np.ndarray]
"""Kind, rows (int64) and weights (float32) of some edges."""


class _State:
    """What the edges are made from, by slot."""

    def __init__(self) -> None:
        nothing = Lists.of_counts([], np.zeros(0, dtype=np.int32))
        self.words = Keys()
        self.span_keys = Keys()
        self.document_keys = Keys()
        self.ids = Keys()
        self.names = NameTree()
        self.texts = nothing
        self.spans = Incidence(nothing, 0)
        self.documents = Incidence(nothing, 0)
        self.named = Incidence(nothing, 0)
        self.mentions = Incidence(nothing, 0)
        self.identified = Incidence(nothing, 0)
        self.targets = nothing
        self.weights = Lists(nothing.starts, np.zeros(0, dtype=np.float32))
        self.kinds = nothing
        self._set_rows(np.zeros(0, dtype=np.int32), 0)

    def _set_rows(self, slot_of_row: np.ndarray, num_slots: int) -> None:
        self.slot_of_row = slot_of_row
        self.row_of_slot = np.full(num_slots, -1, dtype=np.int64)
        self.row_of_slot[slot_of_row] = np.arange(len(slot_of_row))

    def fill(self, read: _Read) -> None:
        """Take the first passages."""
        num_nodes = len(self.names.nodes)
        self.texts = read.words
        self.spans = Incidence(read.spans, len(self.span_keys))
        self.documents = Incidence(read.documents, len(self.document_keys))
        self.named = Incidence(read.names, num_nodes)
        self.identified = Incidence(read.ids, len(self.ids))
        self.targets, self.weights, self.kinds = read.targets, read.weights, read.kinds
        self.mentions = Incidence(self._all_mentions(), num_nodes)
        self._set_rows(np.arange(len(read), dtype=np.int32), len(read))

    def _all_mentions(self) -> Lists:
        starts, is_name = self.texts.starts, self.is_name()
        node_of_word = self.names.nodes.find(self.words.hashes_K)
        firsts = np.searchsorted(starts, np.arange(0, starts[-1], _BLOCK_WORDS)).tolist()
        edges = list(dict.fromkeys([0, *firsts, len(self.texts)]))
        counts, items = [], []
        for first, last in pairwise(edges):
            words = self.texts.items[starts[first] : starts[last]]
            found = mentions_of(
                self.names,
                self.words.hashes_K[words],
                starts[first : last + 1] - starts[first],
                is_name,
                node_of_word[words],
            )
            counts.append(np.diff(found.starts))
            items.append(found.items)
        nothing = np.zeros(0, dtype=np.int32)
        return Lists.of_counts(
            np.concatenate([nothing, *counts]), np.concatenate([nothing, *items])
        )

    def is_name(self) -> np.ndarray:
        """By node, whether some passage of the corpus has the name that ends there."""
        return self.named.live_K > 0

    def live_rows(self, slots: np.ndarray) -> np.ndarray:
        """Rows of those of the slots that still stand for a passage."""
        rows = self.row_of_slot[slots]
        return rows[rows >= 0]

    # Edges of one slot.

    def _information(self, df: int) -> float:
        return math.log(len(self.slot_of_row) / df)

    def title_edges(self, slot: int) -> list[_Edges]:
        """To the documents that it mentions, and from those that mention its own."""
        own = self.documents.keys[slot]
        row = self.row_of_slot[slot]
        siblings = self.live_rows(self.documents.slots_of(own[0])) if len(own) else own
        edges: list[_Edges] = []
        ends = [(node, self.named, EdgeKind.TITLE_OUT) for node in self.mentions.keys[slot]]
        ends += [(node, self.mentions, EdgeKind.TITLE_IN) for node in self.named.keys[slot]]
        for node, others, kind in ends:
            rows = self.live_rows(others.slots_of(int(node)))
            rows = rows[~np.isin(rows, siblings)] if len(siblings) > 1 else rows[rows != row]
            if len(rows):
                weight = self._information(int(self.mentions.live_K[node]))
                edges.append((kind, rows, np.full(len(rows), weight, dtype=np.float32)))
        return edges

    def document_edges(self, slot: int) -> list[_Edges]:
        """To the other passages of its document."""
        edges: list[_Edges] = []
        for key in self.documents.keys[slot].tolist():
            rows = self.live_rows(self.documents.slots_of(key))
            if len(rows) > 1:
                weight = self._information(len(rows))
                rows = rows[rows != self.row_of_slot[slot]]
                weights = np.full(len(rows), weight, dtype=np.float32)
                edges.append((EdgeKind.DOCUMENT, rows, weights))
        return edges

    def shared_edges(self, slot: int) -> list[_Edges]:
        """To those that share rare spans with it, the strongest."""
        sums: dict[int, float] = {}
        keys = self.spans.keys[slot]
        for key, df in zip(keys.tolist(), self.spans.live_K[keys].tolist(), strict=True):
            if MIN_SHARED_DF <= df <= MAX_SHARED_DF:
                weight = self._information(df)
                for other in self.spans.slots_of(key).tolist():
                    sums[other] = sums.get(other, 0.0) + weight
        sums.pop(slot, None)
        if not sums:
            return []
        rows = self.row_of_slot[np.fromiter(sums, dtype=np.int64, count=len(sums))]
        weights = np.fromiter(sums.values(), dtype=np.float32, count=len(sums))
        rows, weights = rows[rows >= 0], weights[rows >= 0]
        strongest = np.lexsort((rows, -weights))[:MAX_SHARED]
        return [(EdgeKind.SHARED, rows[strongest], weights[strongest])]

    def brought_edges(self, slot: int) -> list[_Edges]:
        """To where sources led."""
        edges: list[_Edges] = []
        found = zip(self.targets[slot], self.weights[slot], self.kinds[slot], strict=True)
        for target, weight, kind in found:
            rows = self.live_rows(self.identified.slots_of(int(target)))
            edges.append((EdgeKind(kind), rows, np.full(len(rows), weight, dtype=np.float32)))
        return edges

    def num_waiting(self) -> int:
        """Brought edges of passages of the corpus to passages that it lacks."""
        return int((self.identified.live_K[self.targets.of(self.slot_of_row).items] == 0).sum())

    # Changes.

    def change(self, gone: Sequence[int], read: _Read, rows: Sequence[int]) -> None:
        """Passages of some rows are gone; those that were read have the rows that are given."""
        dead = self.slot_of_row[np.asarray(gone, dtype=np.int64)]
        touched = np.unique(np.concatenate([self.named.keys.of(dead).items, read.names.items]))
        self.named.append([], len(self.names.nodes))
        was_name = self.is_name()[touched]
        self._kill(dead)
        self._append(read, rows, [np.zeros(0, dtype=np.int32)] * len(read))
        is_name = self.is_name()[touched]
        stale = [self.mentions.slots_of(node) for node in touched[was_name & ~is_name].tolist()]
        stale.append(self._holding(touched[is_name & ~was_name], read))
        stale.append(np.arange(len(self.texts) - len(read), len(self.texts)))
        slots = np.unique(np.concatenate(stale)).astype(np.int64)
        self._mention_anew(slots[self.row_of_slot[slots] >= 0])

    def close_up(self, rows: Sequence[int]) -> None:
        """Take away rows whose passages are gone."""
        kept = np.delete(self.slot_of_row, np.asarray(rows, dtype=np.int64))
        self._set_rows(kept, len(self.row_of_slot))

    def _kill(self, slots: np.ndarray) -> None:
        for incidence in self._incidences():
            incidence.kill(slots)
        self.row_of_slot[slots] = -1

    def _append(self, read: _Read, rows: Sequence[int], mentions: Sequence[np.ndarray]) -> None:
        """Slots for passages, which take these rows."""
        first = len(self.texts)
        self.texts.append(list(read.words))
        self.spans.append(list(read.spans), len(self.span_keys))
        self.documents.append(list(read.documents), len(self.document_keys))
        self.named.append(list(read.names), len(self.names.nodes))
        self.mentions.append(list(mentions), len(self.names.nodes))
        self.identified.append(list(read.ids), len(self.ids))
        self.targets.append(list(read.targets))
        self.weights.append(list(read.weights))
        self.kinds.append(list(read.kinds))
        places = np.asarray(rows, dtype=np.int64)
        missing = int(places.max(initial=-1)) + 1 - len(self.slot_of_row)
        self.slot_of_row = np.pad(self.slot_of_row, (0, max(0, missing)))
        self.slot_of_row[places] = np.arange(first, first + len(read))
        self.row_of_slot = np.concatenate([self.row_of_slot, places])

    def _holding(self, nodes: np.ndarray, read: _Read) -> np.ndarray:
        """Slots whose texts may hold one of these names, which some of what was read has.

        Keys of words are numbered as they came, so the word of a name with the highest key is
        likely its rarest.
        """
        if not len(nodes):
            return np.zeros(0, dtype=np.int64)
        wanted = np.zeros(len(self.words), dtype=bool)
        for node in nodes.tolist():
            keys = self.words.find(hash_texts(name_of(read.titles[node])))
            if keys.min() >= 0:
                wanted[keys.max()] = True
        held = np.flatnonzero(wanted[self.texts.items])
        found = [np.searchsorted(self.texts.starts, held, side="right") - 1]
        appended = enumerate(self.texts.appended, start=self.texts.num_first)
        found.append(np.array([s for s, words in appended if wanted[words].any()], dtype=np.int64))
        return np.unique(np.concatenate(found))

    def _mention_anew(self, slots: np.ndarray) -> None:
        """Find the mentions of slots again; where they changed, another slot takes the row."""
        texts = self.texts.of(slots)
        found = mentions_of(
            self.names, self.words.hashes_K[texts.items], texts.starts, self.is_name()
        )
        changed = [
            number
            for number, slot in enumerate(slots.tolist())
            if not np.array_equal(found[number], self.mentions.keys[slot])
        ]
        old = slots[changed]
        read = _Read(
            words=self.texts.of(old),
            spans=self.spans.keys.of(old),
            documents=self.documents.keys.of(old),
            names=self.named.keys.of(old),
            ids=self.identified.keys.of(old),
            targets=self.targets.of(old),
            weights=self.weights.of(old),
            kinds=self.kinds.of(old),
        )
        rows = self.row_of_slot[old].tolist()
        self._kill(old)
        self._append(read, rows, [found[number] for number in changed])

    def _incidences(self) -> tuple[Incidence, ...]:
        return (self.spans, self.documents, self.named, self.mentions, self.identified)

    # On disk.

    def compact(self) -> _State:
        """The same without slots that no longer stand for a passage, in the order of rows."""
        slots = self.slot_of_row
        state = _State()
        for name in _KEYS:
            setattr(state, name, getattr(self, name))
        state.names = self.names
        for name in _LISTS:
            setattr(state, name, getattr(self, name).of(slots))
        for name in _INCIDENCES:
            incidence = getattr(self, name)
            keys = incidence.keys.of(slots)
            setattr(state, name, Incidence(keys, len(incidence.live_K)))
        state._set_rows(np.arange(len(slots), dtype=np.int32), len(slots))
        return state

    def arrays(self) -> dict[str, np.ndarray]:
        """What a compact state is stored as, by name."""
        arrays: dict[str, np.ndarray] = {}
        for name in _KEYS:
            keys: Keys = getattr(self, name)
            arrays |= {f"{name}.hashes": keys.sorted_K, f"{name}.ids": keys.ids_K}
        arrays["names.hashes"] = self.names.nodes.sorted_K
        arrays["names.ids"] = self.names.nodes.ids_K
        for name in _LISTS:
            lists: Lists = getattr(self, name)
            arrays |= {f"{name}.starts": lists.starts, f"{name}.items": lists.items}
        for name in _INCIDENCES:
            incidence: Incidence = getattr(self, name)
            for part, lists in (("keys", incidence.keys), ("slots", incidence.slots)):
                arrays[f"{name}.{part}.starts"] = lists.starts
                arrays[f"{name}.{part}.items"] = lists.items
        return arrays

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> _State:
        """Read back `arrays`."""
        state = cls()
        for name in _KEYS:
            setattr(state, name, Keys(arrays[f"{name}.hashes"], arrays[f"{name}.ids"]))
        state.names = NameTree(Keys(arrays["names.hashes"], arrays["names.ids"]))
        for name in _LISTS:
            setattr(state, name, Lists(arrays[f"{name}.starts"], arrays[f"{name}.items"]))
        for name in _INCIDENCES:
            keys, slots = (
                Lists(arrays[f"{name}.{part}.starts"], arrays[f"{name}.{part}.items"])
                for part in ("keys", "slots")
            )
            setattr(state, name, Incidence(keys, len(slots), slots))
        num_rows = len(state.texts)
        state._set_rows(np.arange(num_rows, dtype=np.int32), num_rows)
        return state


_KEYS = ("words", "span_keys", "document_keys", "ids")
_LISTS = ("texts", "targets", "weights", "kinds")
_INCIDENCES = ("spans", "documents", "named", "mentions", "identified")


def _manifest(digest: str, num_passages: int, sources: Sequence[_Source]) -> Manifest:
    return Manifest(
        kind="graph",
        corpus_hash=digest,
        num_passages=num_passages,
        parameters={
            "texts_version": TEXTS_VERSION,
            "sources": [[*source.identity, source.kind.name] for source in sources],
        },
    )


def _num_passages(directory: Path) -> int:
    """What the manifest says, for the corpus's hash decides; -1 where it says nothing readable."""
    try:
        return int(json.loads((directory / MANIFEST_FILE).read_text())["compared"]["num_passages"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return -1  # check_manifest tells what is wrong


def _digest(passages: Iterable[Passage]) -> str:
    """`content_hash` of a corpus of these passages."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(encode_passage(passage))
    return digest.hexdigest()
