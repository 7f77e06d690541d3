"""Splits text in any script into the words that BM25 indexes.

Words are runs of letters, digits, underscores and the marks that belong to letters, lower-cased,
without English stop words and without stemming. A letter or digit that stands alone is a word:
"Apollo 8", "vitamin K", "U.S."; "C++" and "C#" are other words than "C". What an apostrophe joins
to a word is none: the s of "Schindler's", the O of "O'Brien".

Some scripts do not show where a word ends, or put endings on it without a space: Chinese, Japanese,
Korean, Thai, Lao, Khmer, Burmese. Of these each pair of neighbouring characters is a word (Nie et
al. 2000, "On the Use of Words and N-grams for Chinese Information Retrieval"), and so is each
Chinese character.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import pairwise

# Another number where any text gives other words: indexes of the words before are then made anew.
WORDS_VERSION = 2

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf"  # Tai scripts
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese
    "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff" + _CHINESE  # Korean
)
# Python's \w has the letters alone, and would cut Hindi and Thai words at every vowel sign.
_MARKS = "".join(
    chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
_LONE = r"(?<!\w['’])\w(?!['’]\w\w)(?:\+\+|#)?"
_find_words = re.compile(rf"\w\w+|{_LONE}").findall
_find_marked = re.compile(rf"\w+(?:[{_MARKS}]+\w*)+|\w\w+|{_LONE}").findall
_has_marked = re.compile(f"[{_UNSPACED}{_MARKS}]").search
_find_unspaced = re.compile(rf"[{_UNSPACED}{_MARKS}]+|[^{_UNSPACED}]+").findall
_find_characters = re.compile(rf".[{_MARKS}]*").findall
_is_chinese = re.compile(f"[{_CHINESE}]").match
_is_unspaced = re.compile(f"[{_UNSPACED}]").match
# Hyphens that only show at the end of a line, joiners, and which of its forms a character has.
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# Latin letters as wide as Chinese characters, and Japanese ones of half the width.
_OTHER_WIDTHS = re.compile("[\uff00-\uffef]+")


def split_words(text: str) -> list[str]:
    """The words of a text that are indexed.

    Example:
        >>> split_words("What is the capital of Guinea-Bissau?")
        ['what', 'capital', 'guinea', 'bissau']
        >>> split_words("Who's on Apollo 8? 서울에서")
        ['who', 'apollo', '8', '서울', '울에', '에서']
    """
    text = (text if text.isascii() else _one_form(text)).lower()
    if text.isascii() or not _has_marked(text):
        words = _find_words(text)
    else:
        words = [word for run in _find_marked(text) for word in _split_run(run)]
    stop_words = _stop_words()
    return [word for word in words if word not in stop_words]


def _split_run(run: str) -> list[str]:
    parts = [run] if run.isascii() else _find_unspaced(run)
    return [word for part in parts for word in (_pairs(part) if _is_unspaced(part) else [part])]


def _one_form(text: str) -> str:
    """The text with one spelling for what looks alike, such as é as one character or as two."""
    text = _INVISIBLE.sub("", text)
    text = _OTHER_WIDTHS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return unicodedata.normalize("NFC", text)


def _pairs(run: str) -> list[str]:
    characters = _find_characters(run)
    if len(characters) == 1:
        return characters
    pairs = [first + second for first, second in pairwise(characters)]
    return pairs + [character for character in characters if _is_chinese(character)]


@cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)
