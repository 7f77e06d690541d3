"""Builds the generator's prompts from questions and ordered passages.

A prompt is made of segments that are tokenised one by one and joined as ids: the prefix
(instruction and few-shot examples), each passage, the question. So every prompt starts with exactly
the same prefix ids, whatever follows, and engines compute that prefix once. The cost is that no
token spans two segments.

Texts of questions and passages never become control tokens: `<|im_end|>` in a passage is read as
the characters that it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2.exceptions import TemplateError

from rlrag.config import FewShotExample, PromptConfig
from rlrag.data.checks import MAX_CUT_SHARE
from rlrag.errors import ConfigError, ModelNotFoundError, PromptTooLongError
from rlrag.records import Passage, Prompt, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no chat template and no text has them, none is trimmed as white space.
_USER_SLOT = "\ue000user\ue000"
_ANSWER_SLOT = "\ue000answer\ue000"
_AFTER_EXAMPLE = "\n\n"
"""What the plain layout has between an answer and the next example."""
_BEGIN_TEXTS = ("gemma", "recurrent_gemma", "vaultgemma", "mistral", "mixtral", "cohere")
"""Families, by the beginning of `model_type`, whose texts all began with a token for it."""
_WRONG_FIELD = (AttributeError, LookupError, TypeError, ValueError)
"""What a template raises that asks for another field, or for a part of one."""


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of the model in `model_dir`, from local files only.

    Raises:
        ModelNotFoundError: when the directory holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{model_dir} has no tokenizer that transformers can load ({error}); copy the "
            "model's tokenizer files there"
        ) from error


def lacks_first_token(model_dir: Path, prefix_ids: Sequence[int]) -> bool:
    """Whether prompts begin without the token that every text of the model's training began with.

    Tokenizers that were converted from other formats, such as GGUF, may have lost it. Known for
    families that were all trained with one, and for tokenizers that promise it.
    """
    path = model_dir / "config.json"
    if not path.is_file():  # of a model that a server has, a directory may hold the tokenizer alone
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    first = config.get("bos_token_id", (config.get("text_config") or {}).get("bos_token_id"))
    promises: dict[str, object] = {}
    if (path := model_dir / "tokenizer_config.json").is_file():
        promises = json.loads(path.read_text(encoding="utf-8"))
    begins = config.get("model_type", "").startswith(_BEGIN_TEXTS)
    if first is None or not (begins or promises.get("add_bos_token")):
        return False
    return tuple(prefix_ids[:1]) != (first,)


class PromptBuilder:
    """Builds prompts of one style for one tokenizer; keeps no state between calls."""

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = ("\n",),
    ) -> None:
        """Check the templates and tokenise the shared prefix.

        Args:
            config: The layout.
            tokenizer: The generator's.
            stop: Strings that decoding stops at (`generator.stop`), for `encode_target`.

        Raises:
            ConfigError: when a template has a wrong field, or the tokenizer no chat template.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._stop = tuple(mark for mark in stop if mark)
        self._before_text, self._after_text = _split_passage_template(config.passage_template)
        _check_question_template(config.question_template)
        if config.style == "chat":
            self._prefix, self._suffix = self._chat_frame()
            start: tuple[int, ...] = ()  # a chat template writes its own first token
        else:
            self._prefix, self._suffix = self._plain_prefix(), ""
            start = self._first_token()
        self._prefix_ids = start + self._encode(self._prefix, allow_control=True)
        self._suffix_ids = self._encode(self._suffix, allow_control=True)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Token ids that every prompt of this builder starts with."""
        return self._prefix_ids

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        """Prompt for `question` with `passages`, the best one first, numbered as they are shown.

        A prompt over `max_prompt_tokens` loses passage text from the ends, the longest passage
        first; a passage left without text is not shown. `passage_order` says whether they are shown
        in the order given or the other way round.

        Raises:
            PromptTooLongError: when instruction, examples and question alone are too long.
        """
        asked = self._config.question_template.format(question=question.question)
        asked_ids = self._encode(asked)
        num_fixed = len(self._prefix_ids) + len(asked_ids) + len(self._suffix_ids)
        limit = self._config.max_prompt_tokens
        if num_fixed > limit:
            raise PromptTooLongError(
                f"question {question.id!r}: instruction, examples and question take {num_fixed} "
                f"tokens, but max_prompt_tokens is {limit}; raise it, or use fewer examples"
            )
        numbers = list(range(1, len(passages) + 1))
        best_last = self._config.passage_order == "best_last"
        if best_last:
            numbers.reverse()
        shown, num_cut = self._fit(passages, numbers, limit - num_fixed)
        if best_last:
            shown.reverse()
        return Prompt(
            token_ids=(
                *self._prefix_ids,
                *(token for _, ids in shown for token in ids),
                *asked_ids,
                *self._suffix_ids,
            ),
            text="".join((self._prefix, *(text for text, _ in shown), asked, self._suffix)),
            num_passages=len(shown),
            num_cut_tokens=num_cut,
            question=question.question,
        )

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of `answer` as it follows a prompt: after a space, or alone in a chat turn.

        White space at its ends is left out, as it is of what a generator answers.
        """
        return self._encode(self._answer_text(answer))

    def encode_target(self, answer: str) -> tuple[int, ...]:
        """Token ids of `answer` and of what ends it, for a generator to learn when to stop.

        They are the ids that the generator would emit: the first at which decoding stops is the
        last one. In the plain layout that is the stop string in the blank line behind an answer,
        tokenised together with what stands around it, or the end-of-text token where the blank line
        holds no stop string; in a chat the control token that ends a turn, or a stop string before
        it.

        Raises:
            ConfigError: when nothing ends an answer, or the chat template shows it more than once.
        """
        text, chat = self._answer_text(answer), self._config.style == "chat"
        after, last_id = self._turn_end if chat else (_AFTER_EXAMPLE, self._tokenizer.eos_token_id)
        ends = [
            start + len(mark)
            for mark in self._stop
            if (start := (text + after).find(mark, max(0, len(text) - len(mark) + 1))) >= 0
        ]
        if ends:
            # A tokenizer may join a line break to what is before or behind it.
            behind = "" if chat else self._passage(1, "A", "A")
            encoded = self._tokenizer(
                text + after + behind,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
            )
            starts = [start for start, _ in encoded["offset_mapping"]]
            return tuple(encoded["input_ids"][: sum(start < min(ends) for start in starts)])
        if last_id is None:
            raise ConfigError(
                f"answers would never end: generator.stop {list(self._stop)} has no string that "
                f"follows an answer, and the tokenizer of {self._tokenizer.name_or_path!r} has "
                "no end-of-text token; add a line break to generator.stop"
            )
        return (*self._encode(text + after if chat else text), last_id)

    def _answer_text(self, answer: str) -> str:
        answer = answer.strip()
        return answer if self._config.style == "chat" else f" {answer}"

    def _encode(self, text: str, *, allow_control: bool = False) -> tuple[int, ...]:
        if not text:
            return ()
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not allow_control
        )
        return tuple(encoded["input_ids"])

    def _first_token(self) -> tuple[int, ...]:
        """The beginning-of-text token, for tokenizers that put one before every text."""
        bos = self._tokenizer.bos_token_id
        ids = self._tokenizer("")["input_ids"]
        return (bos,) if bos is not None and ids[:1] == [bos] else ()

    def _passage(self, number: int, title: str, text: str) -> str:
        before = self._before_text.format(number=number, title=title)
        return before + text + self._after_text.format(number=number, title=title)

    def _example_question(self, example: FewShotExample) -> str:
        asked = self._config.question_template.format(question=example.question)
        return self._passage(1, example.title, example.text) + asked

    def _plain_prefix(self) -> str:
        examples = (
            f"{self._example_question(e)} {e.answer}{_AFTER_EXAMPLE}" for e in self._config.few_shot
        )
        return self._config.instruction + "".join(examples)

    def _chat_frame(self) -> tuple[str, str]:
        """Text of the chat before and after the user's last message."""
        return self._around(_USER_SLOT, "the user's message", self._messages(), prompting=True)

    @cached_property
    def _turn_end(self) -> tuple[str, int | None]:
        """Text between an answer and the control token that ends its turn, and that token."""
        answered = [*self._messages(), {"role": "assistant", "content": _ANSWER_SLOT}]
        _, after = self._around(_ANSWER_SLOT, "the answer", answered, prompting=False)
        tokenizer = self._tokenizer
        found = [
            (after.index(token.content), token_id)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content in after
        ]
        if not found:
            return after, tokenizer.eos_token_id
        start, token_id = min(found)
        return after[:start], token_id

    def _messages(self) -> list[dict[str, str]]:
        messages = []
        if self._config.instruction.strip():
            messages.append({"role": "system", "content": self._config.instruction.strip()})
        for example in self._config.few_shot:
            messages.append({"role": "user", "content": self._example_question(example)})
            messages.append({"role": "assistant", "content": example.answer})
        return [*messages, {"role": "user", "content": _USER_SLOT}]

    def _around(
        self, slot: str, name: str, messages: list[dict[str, str]], *, prompting: bool
    ) -> tuple[str, str]:
        """Text of the chat before and after the slot, which holds what `name` says."""
        try:
            # Templates of models that may think first, Qwen 3's for one, know the last; others
            # have no use for it.
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompting, enable_thinking=False
            )
        except (ValueError, TemplateError) as error:
            raise ConfigError(
                f"the tokenizer of {self._tokenizer.name_or_path!r} cannot render this chat "
                f"({error}); use prompt.style plain"
            ) from error
        parts = str(text).split(slot)
        if len(parts) != 2:
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path!r} shows {name} "
                f"{len(parts) - 1} times instead of once; use prompt.style plain"
            )
        return parts[0], parts[1]

    def _fit(
        self, passages: Sequence[Passage], numbers: Sequence[int], budget: int
    ) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
        """Text and ids of each passage shown within `budget` tokens, and the tokens cut away.

        Where not all can be shown, those at the end of `passages` are not.
        """
        numbered = list(zip(numbers, passages, strict=True))
        whole = [self._passage(number, p.title, p.text) for number, p in numbered]
        ids = [self._encode(text) for text in whole]
        num_all = sum(map(len, ids))
        if num_all <= budget:
            return list(zip(whole, ids, strict=True)), 0
        frames, texts, starts = [], [], []
        for number, passage in numbered:
            before = self._before_text.format(number=number, title=passage.title)
            after = self._after_text.format(number=number, title=passage.title)
            texts.append(
                self._tokenizer(
                    passage.text,
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_offsets_mapping=True,
                )
            )
            starts.append((before, after))
            frames.append((self._encode(before), self._encode(after)))
        kept = cut_lengths(
            [len(text["input_ids"]) for text in texts],
            [len(before) + len(after) for before, after in frames],
            budget,
        )
        shown = []
        for i, length in enumerate(kept):
            if length:
                before, after = starts[i]
                end = texts[i]["offset_mapping"][length - 1][1]
                head, tail = frames[i]
                cut_ids = (*head, *texts[i]["input_ids"][:length], *tail)
                shown.append((before + passages[i].text[:end] + after, cut_ids))
        return shown, num_all - sum(len(ids) for _, ids in shown)


def cut_lengths(lengths: Sequence[int], overheads: Sequence[int], budget: int) -> list[int]:
    """Tokens of text that each passage keeps so that all shown ones fit into `budget`.

    The longest texts are cut first, to a common length; what remains after the division goes to
    the first passages. A passage with text costs its overhead too. When not even one token of
    each fits, the last passage is dropped (length 0), then the one before it.

    Example:
        >>> cut_lengths([10, 3, 8], [1, 1, 1], budget=20)
        [7, 3, 7]
        >>> cut_lengths([10, 10], [5, 5], budget=11)
        [6, 0]
    """
    for num_shown in range(len(lengths), 0, -1):
        shown = [length for length in lengths[:num_shown] if length]
        room = budget - sum(o for o, n in zip(overheads, lengths[:num_shown], strict=False) if n)
        if room < len(shown):
            continue
        # The common length c with sum(min(length, c)) <= room < sum(min(length, c + 1)).
        cap, spare = max(shown, default=0), room
        for rank, length in enumerate(sorted(shown)):
            share = spare // (len(shown) - rank)
            if length > share:
                cap = share
                break
            spare -= length
        kept = [min(length, cap) for length in lengths[:num_shown]]
        extra = room - sum(kept)
        for i in range(num_shown):
            if extra and kept[i] < lengths[i]:
                kept[i] += 1
                extra -= 1
        return kept + [0] * (len(lengths) - num_shown)
    return [0] * len(lengths)


def _split_passage_template(template: str) -> tuple[str, str]:
    parts = template.split("{text}")
    try:
        if len(parts) != 2:
            raise ValueError(f"it has {{text}} {len(parts) - 1} times instead of once")
        for part in parts:
            part.format(number=1, title="")
    except _WRONG_FIELD as error:
        raise ConfigError(
            f"prompt.passage_template {template!r} cannot be filled in ({error}); its fields are "
            "{number}, {title} and, exactly once, {text}"
        ) from error
    return parts[0], parts[1]


def _check_question_template(template: str) -> None:
    probe = "\ue000"
    try:
        filled = template.format(question=probe)
    except _WRONG_FIELD as error:
        raise ConfigError(
            f"prompt.question_template {template!r} cannot be filled in ({error}); its only field "
            "is {question}"
        ) from error
    if probe not in filled:
        raise ConfigError(
            f"prompt.question_template {template!r} must contain the field {{question}}"
        )


@dataclass
class PromptCounts:
    """What was built so far, and what `prompt.max_prompt_tokens` left out of it.

    Example:
        >>> counts = PromptCounts()
        >>> counts.add(Prompt((7,) * 90, "", num_passages=1, num_cut_tokens=10), num_given=2)
        >>> counts.shares()
        {'prompt_cut_share': 0.1, 'dropped_passage_share': 0.5}
    """

    num_tokens: int = 0
    num_cut_tokens: int = 0
    num_given: int = 0
    num_dropped: int = 0

    def add(self, prompt: Prompt, num_given: int) -> None:
        """Count a prompt that was built from so many passages.

        A passage that has no text and is not shown for that counts as dropped.
        """
        self.num_tokens += len(prompt.token_ids)
        self.num_cut_tokens += prompt.num_cut_tokens
        self.num_given += num_given
        self.num_dropped += num_given - prompt.num_passages

    def values(self) -> np.ndarray:
        """The four counts, in order, to be subtracted and summed."""
        return np.array(astuple(self), np.float64)

    def shares(self) -> dict[str, float]:
        """Tokens cut of all that the passages and their prompts had, and passages not shown."""
        wanted = self.num_tokens + self.num_cut_tokens
        return {
            "prompt_cut_share": self.num_cut_tokens / max(wanted, 1),
            "dropped_passage_share": self.num_dropped / max(self.num_given, 1),
        }


def shares_of(values: np.ndarray) -> dict[str, float]:
    """`PromptCounts.shares` of summed or subtracted `values`."""
    return PromptCounts(*map(int, values)).shares()


def cut_warning(shares: Mapping[str, float]) -> str | None:
    """What to tell where more than `MAX_CUT_SHARE` of the tokens or passages was left out."""
    tokens = shares.get("prompt_cut_share", 0.0)
    passages = shares.get("dropped_passage_share", 0.0)
    if not max(tokens, passages) > MAX_CUT_SHARE:
        return None
    return (
        f"prompts had no room for {100 * tokens:.1f} % of their tokens and showed nothing of "
        f"{100 * passages:.1f} % of the passages picked: the generator answers without them. Raise "
        "generator.prompt.max_prompt_tokens, or lower data.passage_words or "
        "environment.num_selected"
    )
