"""What the passage graph reads from texts: words in order, names, documents, rare spans.

A name is what texts call a document: its title without a parenthesised suffix. Titles that are
paths, such as "Aruba - Geography: Area" or "Handbook > Travel", belong to the document at their
root. Everything is compared case-folded.

Shape letters: T words of all texts together, one after the other, F found names.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from rlrag.retrieval.graph.incidence import Keys, Lists
from rlrag.retrieval.words import split_words

# Another number where any text gives other edges: graphs made before are then refused.
TEXTS_VERSION = 1

_MIN_LETTERS = 3
_PATH_SEPARATOR = re.compile(r" [->] ")
_SUFFIX = re.compile(r"\s*\([^()]*\)\s*$")
_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it is 0 modulo 2**64
_MASK = 2**64 - 1


def _ranges(codes: Iterable[int]) -> str:
    """Ascending code points as the inside of a character class."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


_CATEGORIES = [unicodedata.category(chr(code)) for code in range(0x20000)]
_CAPITALS = _ranges(code for code, kind in enumerate(_CATEGORIES) if kind in ("Lu", "Lt"))
_MARKS = _ranges(code for code, kind in enumerate(_CATEGORIES) if kind in ("Mn", "Mc"))
# Letters of scripts without spaces, where each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_find_ascii_words = re.compile(r"\w+").findall
_find_words = re.compile(
    rf"[{_UNSPACED}][{_MARKS}]*|(?:[^\W{_UNSPACED}][{_MARKS}]*)+", re.UNICODE
).findall
_find_spans = re.compile(
    rf"\b[{_CAPITALS}][\w{_MARKS}]*(?:[ '’-][{_CAPITALS}][\w{_MARKS}]*)*|\b\d{{4}}\b"
).findall
_find_ascii_spans = re.compile(r"\b[A-Z]\w*(?:[ '-][A-Z]\w*)*|\b\d{4}\b").findall


def words_in_order(text: str) -> list[str]:
    """All words of a text as they follow each other, stop words too, case-folded.

    Of scripts that do not show where a word ends each character is a word, so that a name is found
    wherever its characters stand together.

    Example:
        >>> words_in_order("The Lord of the Rings, 東京")
        ['the', 'lord', 'of', 'the', 'rings', '東', '京']
    """
    if text.isascii():
        return _find_ascii_words(text.lower())
    return _find_words(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()))


def document_of(title: str) -> str:
    """The document that a passage of this title belongs to; empty where there is no title.

    Example:
        >>> document_of("Aruba - Geography: Area"), document_of("Good Time  (Inna song)")
        ('aruba', 'good time (inna song)')
    """
    root = _PATH_SEPARATOR.split(title.strip(), maxsplit=1)[0]
    return " ".join(unicodedata.normalize("NFC", root.casefold()).split())


def name_of(title: str) -> list[str]:
    """The words by which texts mention a document; empty where the title is too common a word.

    Names of one word with under three letters are left out, and those of stop words alone.

    Example:
        >>> name_of("Good Time (Inna song)"), name_of("It"), name_of("Up (2009 film)")
        (['good', 'time'], [], [])
    """
    root = _PATH_SEPARATOR.split(title.strip(), maxsplit=1)[0]
    # A title that is nothing but parentheses keeps them.
    words = words_in_order(_SUFFIX.sub("", root)) or words_in_order(root)
    if len(words) == 1 and len(words[0]) < _MIN_LETTERS:
        return []
    return words if split_words(" ".join(words)) else []


def rare_spans(text: str) -> list[str]:
    """What passages may have in common: spans of capitalised words, and numbers of four digits.

    Each once, in the order of the text, case-folded, without stop words at either end.

    Example:
        >>> rare_spans("The Treaty of Ghent ended the War in 1815. The Treaty held.")
        ['treaty', 'ghent', 'war', '1815']
    """
    find = _find_ascii_spans if text.isascii() else _find_spans
    folded = [" ".join(span.replace("’", "'").casefold().split()) for span in find(text)]
    return [span for span in dict.fromkeys(map(_without_stop_words, folded)) if span]


def _without_stop_words(span: str) -> str:
    parts = span.split(" ")
    while parts and _is_stop_word(parts[0]):
        parts = parts[1:]
    while parts and _is_stop_word(parts[-1]):
        parts = parts[:-1]
    return " ".join(parts)


@lru_cache(maxsize=2**16)
def _is_stop_word(word: str) -> bool:
    return not split_words(word)


def hash_text(text: str) -> int:
    """64 bits that a text is known by.

    Two of ten million texts share them with a probability of 3e-6; they then count as the same.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """`hash_text` of each, uint64."""
    return np.fromiter(map(hash_text, texts), dtype=np.uint64)


class NameTree:
    """All names as a tree of words: a node is a prefix of some name, known by its hash.

    The hash of the words w_0 .. w_n is sum_i h(w_i) B^i modulo 2^64, so that all places of many
    texts go down the tree together, a word at a time.
    """

    def __init__(self, nodes: Keys | None = None) -> None:
        self.nodes = nodes or Keys()

    def add(self, names: Sequence[Sequence[str]]) -> np.ndarray:
        """Take in names; the node of each, int32, or -1 for an empty one."""
        prefixes: list[int] = []
        ends: list[int] = []
        for words in names:
            total, power = 0, 1
            for word in words:
                total = (total + hash_text(word) * power) & _MASK
                power = (power * _BASE) & _MASK
                prefixes.append(total)
            ends.append(len(prefixes) - 1 if words else -1)
        found = self.nodes.add(np.array(prefixes, dtype=np.uint64))
        return np.array([found[end] if end >= 0 else -1 for end in ends], dtype=np.int32)

    def find(
        self,
        hashes_T: np.ndarray,
        texts: np.ndarray,
        is_name: np.ndarray,
        first_T: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The names in texts: at each place the longest, and none within a longer one.

        Args:
            hashes_T: The words' hashes, uint64.
            texts: Where each text begins, and at last the number of words.
            is_name: By node, whether it is the end of a name.
            first_T: The nodes of the single words, -1 for none; looked up when unset.

        Returns:
            Places (F,) among the words, ascending, and the nodes (F,).
        """
        ends_T = np.repeat(texts[1:], np.diff(texts))
        length_T = np.zeros(len(hashes_T), dtype=np.int32)
        node_T = np.full(len(hashes_T), -1, dtype=np.int32)
        places = np.arange(len(hashes_T))
        sums = hashes_T
        nodes = self.nodes.find(sums) if first_T is None else first_T
        length, power = 1, _BASE
        while True:
            known = nodes >= 0
            places, sums, nodes = places[known], sums[known], nodes[known]
            named = is_name[nodes]
            length_T[places[named]] = length
            node_T[places[named]] = nodes[named]
            goes_on = places + length < ends_T[places]
            places, sums = places[goes_on], sums[goes_on]
            if not len(places):
                break
            sums = sums + hashes_T[places + length] * np.uint64(power)
            nodes = self.nodes.find(sums)
            length, power = length + 1, (power * _BASE) & _MASK
        found = np.flatnonzero(length_T)
        ends = found + length_T[found]
        # Places ascend, so an earlier name that reaches as far holds the later one.
        within = np.zeros(len(found), dtype=bool)
        within[1:] = np.maximum.accumulate(ends)[:-1] >= ends[1:]
        return found[~within], node_T[found[~within]]


def mentions_of(
    tree: NameTree,
    hashes_T: np.ndarray,
    texts: np.ndarray,
    is_name: np.ndarray,
    first_T: np.ndarray | None = None,
) -> Lists:
    """The nodes of the names in each text, each once, ascending; see `NameTree.find`."""
    places, nodes = tree.find(hashes_T, texts, is_name, first_T)
    of_text = np.searchsorted(texts, places, side="right") - 1
    pairs = np.unique(of_text * max(1, len(tree.nodes)) + nodes)
    of_text, nodes = np.divmod(pairs, max(1, len(tree.nodes)))
    counts = np.bincount(of_text, minlength=len(texts) - 1)
    return Lists.of_counts(counts, nodes.astype(np.int32))
