"""Query writers that need no model, and those of one's own by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rlrag import plugins
from rlrag.errors import ConfigError, nearest_name
from rlrag.records import Passage, Question
from rlrag.retrieval.words import split_words
from rlrag.selection.queries.protocol import QueryWriter


class TitleWriter:
    """The question with the title of the chosen pick.

    Example:
        >>> pick = Passage("p", "Inception", "A film by Christopher Nolan.")
        >>> TitleWriter().write([Question("q", "Who made it?", ())], [[pick]], [pick])
        ['Who made it? Inception']
    """

    needs_pick = True

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """Nothing to ask where no pick is chosen, or it has no title."""
        return [
            f"{question.question} {passage.title}" if passage and passage.title else None
            for question, passage in zip(questions, chosen, strict=True)
        ]


class TextWriter:
    """The text of the chosen pick: what resembles it, or is about what it names.

    Example:
        >>> pick = Passage("p", "Inception", "A film by Christopher Nolan.")
        >>> TextWriter().write([Question("q", "Who made it?", ())], [[pick]], [pick])
        ['A film by Christopher Nolan.']
    """

    needs_pick = True

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """Nothing to ask where no pick is chosen, or it has no text."""
        return [passage.text if passage and passage.text.strip() else None for passage in chosen]


class UncoveredWriter:
    """The words of the question that no pick has, with the title of the chosen pick.

    Words are those that BM25 indexes, in the question's order.

    Example:
        >>> pick = Passage("p", "Inception", "A film by Christopher Nolan.")
        >>> question = Question("q", "Which school did the maker of the film Inception attend?", ())
        >>> UncoveredWriter().write([question], [[pick]], [pick])
        ['which school did maker attend Inception']
    """

    needs_pick = True

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """Nothing to ask where no pick is chosen, or the picks have every word."""
        episodes = zip(questions, picks, chosen, strict=True)
        return [_uncovered(*episode) for episode in episodes]


def _uncovered(question: Question, picks: Sequence[Passage], chosen: Passage | None) -> str | None:
    covered = {word for passage in picks for word in split_words(passage.contents)}
    left = [word for word in dict.fromkeys(split_words(question.question)) if word not in covered]
    if chosen is None or not left:
        return None
    return " ".join([*left, chosen.title]).rstrip()


QUERY_WRITERS: Mapping[str, Callable[[], QueryWriter]] = MappingProxyType(
    {"title": TitleWriter, "text": TextWriter, "uncovered": UncoveredWriter}
)
"""The built-in query writers, which have no options."""


def build_query_writer(name: str, options: Sequence[str] = ()) -> QueryWriter:
    """The query writer of a name.

    Args:
        name: A key of `QUERY_WRITERS`, or `package.module:name` of a class or function that makes
            one.
        options: Of a writer of somebody's own, each `name=value`.

    Raises:
        ConfigError: when there is no such writer, it does not take these options, or what was made
            is no query writer.
    """
    if plugins.is_own(name):
        own: QueryWriter = plugins.make("query_writer", name, options)
        if not isinstance(getattr(own, "needs_pick", None), bool):
            raise ConfigError(
                f"query_writer {name!r} made a {type(own).__name__} without the attribute "
                "needs_pick, True or False: whether it writes about one of the picks"
            )
        return own
    if name not in QUERY_WRITERS:
        listing = f"there are: {', '.join(QUERY_WRITERS)}"
        hint = nearest_name(name, QUERY_WRITERS, listing)
        raise ConfigError(
            f"query writer {name!r} is unknown; {hint} (one of your own is package.module:name)"
        )
    if options:
        raise ConfigError(f"query writer {name!r} has no option {options[0]!r}; leave it out")
    return QUERY_WRITERS[name]()
