"""Lists of numbers in one array, and which slots have which keys, in both directions.

A slot is a passage as it was when it was read: slots are only appended. Whether a slot still
stands for a passage is known to the graph.

Shape letters: S slots, K keys, J items of all lists together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_INT32_LIMIT = 2**31


def _starts_of(counts: np.ndarray) -> np.ndarray:
    """Where lists of these lengths begin, and the end of the last."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts.astype(np.int32) if starts[-1] < _INT32_LIMIT else starts


class Keys:
    """Numbers from 0 for distinct hashes, in the order in which they came.

    Example:
        >>> keys = Keys()
        >>> keys.add(np.array([7, 5, 7], dtype=np.uint64)).tolist(), len(keys)
        ([0, 1, 0], 2)
        >>> keys.find(np.array([5, 6], dtype=np.uint64)).tolist()
        [1, -1]
    """

    def __init__(self, sorted_K: np.ndarray | None = None, ids_K: np.ndarray | None = None) -> None:
        self.sorted_K = np.zeros(0, dtype=np.uint64) if sorted_K is None else sorted_K
        self.ids_K = np.zeros(0, dtype=np.int32) if ids_K is None else ids_K
        self._hashes_K: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids_K)

    @property
    def hashes_K(self) -> np.ndarray:
        """The hash of each key."""
        if self._hashes_K is None:
            self._hashes_K = np.empty(len(self), dtype=np.uint64)
            self._hashes_K[self.ids_K] = self.sorted_K
        return self._hashes_K

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The key of each hash, int32; -1 where there is none."""
        if not len(self):
            return np.full(len(hashes), -1, dtype=np.int32)
        places = np.searchsorted(self.sorted_K, hashes)
        places[places == len(self)] = 0
        return np.where(self.sorted_K[places] == hashes, self.ids_K[places], np.int32(-1))

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """The key of each hash, int32, after new ones have got theirs."""
        found = self.find(hashes)
        new, first = np.unique(hashes[found < 0], return_index=True)
        if not len(new):
            return found
        ids = np.empty(len(new), dtype=np.int32)
        ids[np.argsort(first)] = np.arange(len(self), len(self) + len(new))
        places = np.searchsorted(self.sorted_K, new)
        self.sorted_K = np.insert(self.sorted_K, places, new)
        self.ids_K = np.insert(self.ids_K, places, ids)
        self._hashes_K = None
        return self.find(hashes)


class Lists:
    """A list of numbers for each slot; those of the slots that were appended stand apart.

    Example:
        >>> lists = Lists.of_counts([2, 0], np.array([4, 5]))
        >>> lists.append([np.array([6])])
        >>> [lists[slot].tolist() for slot in range(len(lists))]
        [[4, 5], [], [6]]
    """

    def __init__(self, starts_S: np.ndarray, items_J: np.ndarray) -> None:
        self.starts = starts_S
        self.items = items_J
        self.appended: list[np.ndarray] = []
        self.num_first = len(starts_S) - 1
        """Slots before those that were appended."""

    @classmethod
    def of_counts(cls, counts: Sequence[int] | np.ndarray, items: np.ndarray) -> Lists:
        """Lists of these lengths, one after the other."""
        return cls(_starts_of(np.asarray(counts, dtype=np.int64)), items)

    def __len__(self) -> int:
        return self.num_first + len(self.appended)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[slot] for slot in range(len(self)))

    def __getitem__(self, slot: int) -> np.ndarray:
        if slot < self.num_first:
            return self.items[self.starts[slot] : self.starts[slot + 1]]
        return self.appended[slot - self.num_first]

    def append(self, lists: Sequence[np.ndarray]) -> None:
        """Add slots behind the last one."""
        self.appended.extend(lists)

    def of(self, slots: np.ndarray) -> Lists:
        """The lists of some slots, in this order, in one array."""
        starts, items = self.starts, self.items
        if self.appended:
            starts = _starts_of(
                np.concatenate([np.diff(starts), [len(each) for each in self.appended]])
            )
            items = np.concatenate([items, *self.appended])
        firsts = starts[slots].astype(np.int64)
        counts = starts[slots + 1] - firsts
        taken = Lists.of_counts(counts, items[:0])
        places = np.repeat(firsts - taken.starts[:-1], counts) + np.arange(taken.starts[-1])
        taken.items = items[places]
        return taken


class Incidence:
    """Which keys each slot has, which slots have a key, and how many of them are live.

    Args:
        keys: Of each slot, each key once.
        num_keys: Keys that exist (K).
        slots: Of each key; made from `keys` when unset.
    """

    def __init__(self, keys: Lists, num_keys: int, slots: Lists | None = None) -> None:
        self.keys = keys
        self.slots = slots or _inverted(keys, num_keys)
        self.live_K = np.diff(self.slots.starts)
        """Live slots that have a key."""
        self._appended: dict[int, list[int]] = {}

    def slots_of(self, key: int) -> np.ndarray:
        """The slots that have a key, ascending, those that are not live too."""
        first = self.slots[key] if key < self.slots.num_first else self.slots.items[:0]
        appended = self._appended.get(key) if self._appended else None
        return first if appended is None else np.concatenate([first, appended])

    def append(self, lists: Sequence[np.ndarray], num_keys: int) -> None:
        """Add live slots with these keys; `num_keys` exist by now."""
        self.live_K = np.pad(self.live_K, (0, num_keys - len(self.live_K)))
        for slot, keys in enumerate(lists, start=len(self.keys)):
            self.live_K[keys] += 1
            for key in keys.tolist():
                self._appended.setdefault(key, []).append(slot)
        self.keys.append(lists)

    def kill(self, slots: Sequence[int] | np.ndarray) -> None:
        """Count live slots no longer."""
        for slot in slots:
            self.live_K[self.keys[slot]] -= 1


def _inverted(keys: Lists, num_keys: int) -> Lists:
    counts = np.bincount(keys.items, minlength=num_keys)
    slots_J = np.repeat(np.arange(len(keys), dtype=np.int32), np.diff(keys.starts))
    return Lists.of_counts(counts, slots_J[np.argsort(keys.items, kind="stable")])
