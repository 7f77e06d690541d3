"""The ranking prompt of the listwise policy, and the rankings it may generate.

The prompt numbers the n passages from 1 and asks for the K most useful ones. What the model writes
is `[i] > [j] > ...` with K distinct numbers. Prompt and ranking are tokenised in pieces that are
joined as ids, so that drawing a ranking and scoring one read exactly the same tokens.

While a ranking is written, few tokens can follow: those that go on with the number of a candidate
that is not picked yet. Where one token alone can follow, it is written without asking the model.
The places with a choice are forks. Two numbers differ before the first of them ends, as `]` closes
a number, so each ranking takes its own way through the forks, and the probabilities of all rankings
sum to 1 whenever those at each fork do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from rlrag.errors import ConfigError

# Private-use characters: no chat template and no text has them, none is trimmed as white space.
_SLOT = "\ue000user\ue000"
_TASK = (
    "Below are {num_candidates} passages, each after its number in brackets. Rank them by how "
    "useful they are for answering the question: a useful passage is about what is asked and "
    "holds the facts that the answer needs.\n\n"
)
_ASKED = (
    "\nQuestion: {question}\nName the {num_selected} most useful passages, the most useful one "
    "first, in the form [2] > [1]. Write the ranking only, without an explanation.\n"
)


@dataclass(frozen=True, slots=True)
class Draft:
    """A ranking up to its next fork, or to its end.

    `path` holds the tokens written since the prompt, `picks` the positions of the numbers that are
    whole, `left` those that the number begun may still become and `depth` its tokens so far.
    """

    path: tuple[int, ...]
    picks: tuple[int, ...]
    left: tuple[int, ...]
    depth: int


class Rankings:
    """All rankings of `num_picks` among numbered candidates, as ways through forks.

    Args:
        first: Token ids of each candidate's number where it opens a ranking: `[1]`.
        later: Token ids of the same after another number: ` > [1]`.
        num_picks: Numbers in a ranking; at most the candidates.

    Example:
        >>> two = Rankings(first=((7, 1), (7, 2)), later=((8, 1), (8, 2)), num_picks=2)
        >>> two.begin().path, two.options(two.begin())
        ((7,), (1, 2))
        >>> two.follow(two.begin(), 2)
        Draft(path=(7, 2, 8, 1), picks=(1, 0), left=(), depth=0)
    """

    def __init__(
        self,
        first: Sequence[tuple[int, ...]],
        later: Sequence[tuple[int, ...]],
        num_picks: int,
    ) -> None:
        if num_picks > len(first):
            raise ConfigError(
                f"a ranking of {num_picks} passages among {len(first)} candidates is impossible; "
                "lower environment.num_selected or raise retrieval.num_candidates"
            )
        self._first, self._later, self._num_picks = first, later, num_picks

    @property
    def longest(self) -> int:
        """Tokens of the longest ranking, or a few more."""
        return self._num_picks * max(map(len, (*self._first, *self._later)))

    def begin(self) -> Draft:
        """The ranking at its first fork."""
        return self._settle(Draft((), (), tuple(range(len(self._first))), 0))

    def ended(self, draft: Draft) -> bool:
        """Whether all numbers are written."""
        return len(draft.picks) == self._num_picks

    def options(self, draft: Draft) -> tuple[int, ...]:
        """Tokens that may follow at a fork, in the order of the first candidate each leads to."""
        numbers = self._numbers(draft)
        return tuple(dict.fromkeys(numbers[candidate][draft.depth] for candidate in draft.left))

    def follow(self, draft: Draft, token: int) -> Draft:
        """The draft at the fork after this one, or at its end, when `token` is written here."""
        numbers = self._numbers(draft)
        left = tuple(c for c in draft.left if numbers[c][draft.depth] == token)
        return self._settle(Draft((*draft.path, token), draft.picks, left, draft.depth + 1))

    def forks(self, picks: Sequence[int]) -> list[tuple[Draft, int]]:
        """Each fork on the way to these distinct candidates, with the token taken there."""
        found, draft = [], self.begin()
        while len(draft.picks) < min(len(picks), self._num_picks):
            token = self._numbers(draft)[picks[len(draft.picks)]][draft.depth]
            found.append((draft, token))
            draft = self.follow(draft, token)
        return found

    def _numbers(self, draft: Draft) -> Sequence[tuple[int, ...]]:
        return self._later if draft.picks else self._first

    def _settle(self, draft: Draft) -> Draft:
        """Write the tokens that are the only ones possible, up to the next fork or the end."""
        while not self.ended(draft):
            numbers = self._numbers(draft)
            if len(draft.left) == 1:
                (last,) = draft.left
                picks = (*draft.picks, last)
                left = tuple(c for c in range(len(numbers)) if c not in picks)
                draft = Draft((*draft.path, *numbers[last][draft.depth :]), picks, left, 0)
                continue
            options = self.options(draft)
            if len(options) > 1:
                return draft
            draft = Draft((*draft.path, *options), draft.picks, draft.left, draft.depth + 1)
        return Draft(draft.path, draft.picks, (), 0)


class RankingPrompt:
    """Writes the prompt for one tokenizer and says which rankings may follow it.

    The tokenizer's chat template frames the prompt where there is one. Texts of questions and
    passages never become control tokens.
    """

    def __init__(self, model_dir: Path, max_tokens: int, num_selected: int) -> None:
        """Load the tokenizer.

        Args:
            model_dir: Directory with the tokenizer's files.
            max_tokens: Tokens of one passage, its title included, that are shown.
            num_selected: Passages asked for (K).

        Raises:
            ConfigError: when there is no tokenizer, or its chat template cannot write the prompt.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"selector.model: {model_dir} has no tokenizer that transformers can load "
                f"({error}); choose a causal language model with its tokenizer"
            ) from error
        self._max_tokens, self._num_selected = max_tokens, num_selected
        if self._tokenizer.chat_template:
            self._before, self._after = self._chat_frame()
            self._start, self._lead = [], ""
        else:
            self._before, self._after = "", "Ranking:"
            self._start, self._lead = self._first_token(), " "
        self._rankings: dict[tuple[int, int], Rankings] = {}

    def encode(self, question: str, passages: Sequence[str]) -> list[int]:
        """Token ids of the prompt. A passage is its title and its text, joined by a newline."""
        task = self._before + _TASK.format(num_candidates=len(passages))
        asked = _ASKED.format(question=question, num_selected=self._num_selected)
        ids = self._start + self._encode(task, allow_control=True)
        shown = self._tokenized(passages)
        newline = self._encode("\n")
        for number, text in enumerate(shown, start=1):
            ids += [*self._encode(f"[{number}] "), *text[: self._max_tokens], *newline]
        return ids + self._encode(asked) + self._encode(self._after, allow_control=True)

    def lengths(self, passages: Sequence[str]) -> list[int]:
        """Tokens of each passage, those that are not shown included."""
        return [len(ids) for ids in self._tokenized(passages)]

    def _tokenized(self, passages: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(
            [_one_line(passage) for passage in passages],
            add_special_tokens=False,
            split_special_tokens=True,
        )["input_ids"]
        return found

    def rankings(self, num_candidates: int, num_picks: int) -> Rankings:
        """The rankings of `num_picks` among `num_candidates` that may follow the prompt.

        Raises:
            ConfigError: when the tokenizer does not tell two numbers apart.
        """
        key = (num_candidates, num_picks)
        if key not in self._rankings:
            self._rankings[key] = self._make_rankings(num_candidates, num_picks)
        return self._rankings[key]

    def _make_rankings(self, num_candidates: int, num_picks: int) -> Rankings:
        written = [f"[{i}]" for i in range(1, num_candidates + 1)]
        first = [tuple(self._encode(self._lead + number)) for number in written]
        later = [tuple(self._encode(f" > {number}")) for number in written]
        for numbers in (first, later):
            ordered = sorted(numbers)
            for one, two in pairwise(ordered):
                if two[: len(one)] == one:
                    raise ConfigError(
                        f"the tokenizer of {self._tokenizer.name_or_path!r} encodes two of the "
                        f"numbers [1] to [{num_candidates}] in the same way; choose another "
                        "selector.model"
                    )
        return Rankings(first, later, num_picks)

    def _encode(self, text: str, *, allow_control: bool = False) -> list[int]:
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not allow_control
        )
        return list(encoded["input_ids"])

    def _first_token(self) -> list[int]:
        """The beginning-of-text token, for tokenizers that put one before every text."""
        bos = self._tokenizer.bos_token_id
        ids = list(self._tokenizer("")["input_ids"])
        return [bos] if bos is not None and ids[:1] == [bos] else []

    def _chat_frame(self) -> tuple[str, str]:
        """Text of the chat before and after the user's message."""
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": _SLOT}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # where the template knows it
            )
        except (ValueError, TemplateError) as error:
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path!r} cannot render the "
                f"ranking prompt ({error}); choose another selector.model"
            ) from error
        parts = str(text).split(_SLOT)
        if len(parts) != 2:
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path!r} shows the user's message "
                f"{len(parts) - 1} times instead of once; choose another selector.model"
            )
        return parts[0], parts[1]


def _one_line(passage: str) -> str:
    r"""Title and text on one line, so that no passage can open another one's number.

    Example:
        >>> _one_line("Paris\nCapital of\nFrance.")
        'Paris: Capital of France.'
    """
    title, newline, text = passage.partition("\n")
    return " ".join((f"{title}: {text}" if newline else title).split())
