"""What the generator makes of single passages, against answers and probabilities by hand."""

from __future__ import annotations

import math

import pytest
import torch
from stand_ins import CutPrompts, WordPrompts

from rlrag.config import PromptConfig
from rlrag.errors import DataError, PromptTooLongError, RewardError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.records import Generation, Passage, Question, Score
from rlrag.training.openrag.passage_judge import Judgement, PassageJudge

NAN = float("nan")


class Scripted:
    """Says and scores what a script has for the first word of the passage."""

    def __init__(self, says=None, logp=None) -> None:
        self.identity, self.version = "scripted", 0
        self.tokens = TokenCount()
        self.says = says or {}
        self.logp = logp or {}
        self.generated: list[str] = []
        self.scored: list[tuple[str, str]] = []

    def load_weights(self, weights) -> None:
        raise NotImplementedError

    def generate(self, prompts, sampling):
        words = [prompt.text.split()[0] for prompt in prompts]
        self.generated += words
        return [Generation(self.says[word], -1.0, 1, 1) for word in words]

    def score(self, prompts, answers):
        asked = [
            (p.text.split()[0], bytes(a).decode()) for p, a in zip(prompts, answers, strict=True)
        ]
        self.scored += asked
        return [Score(self.logp[pair], 1, 1) for pair in asked]

    def close(self) -> None:
        """Nothing to free."""


class ShortPrompts(WordPrompts):
    """Has no room for long questions."""

    def build(self, question, passages):
        if len(question.question) > 30:
            raise PromptTooLongError(f"question {question.id!r} is too long")
        return super().build(question, passages)


def judge_of(generator: Scripted) -> PassageJudge:
    return PassageJudge(generator, ShortPrompts(), Sampling())


def passage(word: str) -> Passage:
    return Passage(word, "", f"{word} is here")


def free(*golden: str, id_: str = "q", text: str = "which?") -> Question:
    return Question(id_, text, golden)


def closed(choices, *golden: str, id_: str = "c") -> Question:
    return Question(id_, "which one?", golden, {"choices": list(choices)})


def test_a_free_form_answer_is_right_when_it_contains_the_golden_one():
    generator = Scripted(
        {"one": "It is Paris, France.", "two": "parisian cafés", "three": ""},
        {("one", "Paris"): -0.5, ("two", "Paris"): -1.5, ("three", "Paris"): -7.0},
    )
    found = judge_of(generator)(
        [free("Paris")] * 3, [passage(w) for w in ("one", "two", "three")], with_labels=True
    )
    assert found == [Judgement(-0.5, True), Judgement(-1.5, False), Judgement(-7.0, False)]


def test_of_several_golden_answers_the_likeliest_is_the_score_and_any_is_right():
    generator = Scripted(
        {"one": "the big apple", "two": "gotham"},
        {
            ("one", "New York"): -4.0,
            ("one", "big apple"): -3.0,
            ("two", "New York"): -1.0,
            ("two", "big apple"): -9.0,
        },
    )
    found = judge_of(generator)(
        [free("New York", "big apple")] * 2, [passage("one"), passage("two")], with_labels=True
    )
    assert found == [Judgement(-3.0, True), Judgement(-1.0, False)]
    assert len(generator.scored) == 4


def test_without_labels_nothing_is_generated():
    generator = Scripted({}, {("one", "a"): -1.0})
    assert judge_of(generator)([free("a")], [passage("one")], with_labels=False) == [
        Judgement(-1.0, None)
    ]
    assert generator.generated == []
    assert generator.scored == [("one", "a")]


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_closed_set_answer_is_the_choice_with_the_likeliest_first_token(with_labels):
    """The tokens of these prompts are bytes, so that the first of `true` is `t`."""
    generator = Scripted(
        {},
        {
            **{("one", "t"): -0.3, ("one", "f"): -1.2},
            **{("two", "t"): -2.0, ("two", "f"): -0.1},
            **{("tie", "t"): -0.7, ("tie", "f"): -0.7},
        },
    )
    questions = [closed(["true", "false"], "true")] * 3
    found = judge_of(generator)(
        questions, [passage(w) for w in ("one", "two", "tie")], with_labels=with_labels
    )
    assert found == [Judgement(-0.3, True), Judgement(-2.0, False), Judgement(-0.7, False)]
    assert generator.generated == []
    assert len(generator.scored) == 6


def test_the_likeliest_of_several_correct_choices_stands_against_the_wrong_ones():
    logp = {("one", "A"): -3.0, ("one", "B"): -1.0, ("one", "C"): -2.0, ("one", "D"): -9.0}
    found = judge_of(Scripted({}, logp))(
        [closed("ABCD", "A", "B"), closed("ABCD", "A", "C"), closed("ABCD", "D")],
        [passage("one")] * 3,
        with_labels=True,
    )
    assert found == [Judgement(-1.0, True), Judgement(-2.0, False), Judgement(-9.0, False)]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (
            closed(["tree", "town"], "tree"),
            r"question 'c': choices \('tree', 'town'\) do not differ",
        ),
        (closed(["A", "B"], "C"), r"question 'c': no golden answer \('C',\) is among the choices"),
        (closed(["A", ""], "A"), r"question 'c': the choice '' has no token"),
    ],
)
def test_choices_that_the_generator_cannot_choose_between_are_refused_by_name(question, words):
    generator = Scripted({}, {("one", "A"): -1.0, ("one", "B"): -2.0})
    bad, good = judge_of(generator)(
        [question, closed("AB", "A")], [passage("one")] * 2, with_labels=True
    )
    assert isinstance(bad, DataError)
    with pytest.raises(DataError, match=words):
        raise bad
    assert good == Judgement(-1.0, True)


def test_a_mix_of_both_kinds_keeps_its_order():
    words = ["one", "two", "three", "four", "five"]
    logp = {(word, letter): -1.0 - n for n, word in enumerate(words) for letter in "abAB"}
    logp |= {(word, "B"): -9.0 for word in words}
    generator = Scripted({word: "a" for word in words}, logp)
    questions = [free("a"), closed("AB", "A"), free("b"), closed("AB", "B"), free("a")]
    found = judge_of(generator)(questions, [passage(w) for w in words], with_labels=True)
    assert found == [
        Judgement(-1.0, True),
        Judgement(-2.0, True),
        Judgement(-3.0, False),
        Judgement(-9.0, False),
        Judgement(-5.0, True),
    ]
    assert generator.generated == ["one", "three", "five"]


def test_a_pair_that_fails_takes_its_place_and_disturbs_no_other():
    logp = {("one", "a"): -1.0, ("bad", "a"): NAN, ("two", "a"): -2.0}
    logp |= {("one", "A"): -0.1, ("one", "B"): -3.0, ("bad", "A"): -0.1, ("bad", "B"): NAN}
    generator = Scripted({"one": "a", "two": "b"}, logp)
    long = "a question that leaves no room for anything"
    questions = [
        *(free("a"), free("a"), free("a", id_="long", text=long), free(id_="none"), free("a")),
        *(closed("AB", "A"), closed("AB", "A", id_="unknown")),
        Question("long choice", long, ("A",), {"choices": ["A", "B"]}),
    ]
    words = ["one", "bad", "one", "one", "two", "one", "bad", "one"]
    found = judge_of(generator)(questions, [passage(w) for w in words], with_labels=True)
    assert [found[i] for i in (0, 4, 5)] == [
        Judgement(-1.0, True),
        Judgement(-2.0, False),
        Judgement(-0.1, True),
    ]
    kinds = {1: RewardError, 2: PromptTooLongError, 3: RewardError, 6: RewardError}
    for place, kind in (kinds | {7: PromptTooLongError}).items():
        assert isinstance(found[place], kind), place
    assert "'unknown'" in str(found[6])
    assert "'none'" in str(found[3])
    assert generator.generated == ["one", "two"]


@pytest.mark.parametrize("with_labels", [False, True])
def test_what_prompts_left_out_is_counted_for_every_kind_of_question(with_labels):
    class Dropping(CutPrompts):
        """Shows nothing of a passage about two."""

        def build(self, question, passages):
            return super().build(question, [p for p in passages if p.id != "two"])

    class Even(Scripted):
        """Finds every answer equally likely."""

        def score(self, prompts, answers):
            return [Score(-1.0, 1, 1)] * len(prompts)

    generator = Even(dict.fromkeys(["one", "which?"], "a"))
    judge = PassageJudge(generator, Dropping(), Sampling())
    questions = [free("a"), free("a"), closed("AB", "A")]
    judge(questions, [passage(word) for word in ("one", "two", "two")], with_labels)
    counts = judge.prompt_counts
    assert (counts.num_given, counts.num_dropped) == (3, 2)
    assert counts.num_cut_tokens == counts.num_tokens > 0


def test_nothing_asked_is_nothing_found():
    generator = Scripted()
    assert judge_of(generator)([], [], with_labels=True) == []
    assert generator.scored == generator.generated == []


def test_judgements_of_a_real_model_are_those_of_its_next_token(model_dir):
    """The logits of the model, computed without this package, say the same."""
    from transformers import AutoModelForCausalLM

    prompts = PromptBuilder(PromptConfig(), load_tokenizer(model_dir))
    generator = TransformersGenerator(model_dir, "float32", "cpu")
    question = Question("q", "Which letter?", ("B",), {"choices": ["A", "B", "C"]})
    plain = Question("p", "Which letter?", ("B",))
    passages = [Passage(f"p{n}", f"Title {n}", "some words " * n) for n in range(4)]
    judge = PassageJudge(generator, prompts, Sampling(max_new_tokens=2))
    found = judge([question] * 4 + [plain] * 4, [*passages, *passages], with_labels=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokens = [prompts.encode_answer(choice)[0] for choice in "ABC"]
    golden = prompts.encode_answer("B")
    assert len(set(tokens)) == 3
    for row, shown in enumerate(passages):
        ids = list(prompts.build(question, [shown]).token_ids)
        with torch.no_grad():
            logp_TV = model(torch.tensor([[*ids, *golden]])).logits[0].log_softmax(-1)
        choices = logp_TV[len(ids) - 1, tokens]
        assert found[row].logp == pytest.approx(choices[1].item(), abs=1e-4)
        assert found[row].is_right == (choices.argmax().item() == 1)
        summed = sum(logp_TV[len(ids) - 1 + i, token].item() for i, token in enumerate(golden))
        assert found[4 + row].logp == pytest.approx(summed, abs=1e-4)
    assert all(math.isfinite(judgement.logp) for judgement in found)
