"""What is measured of a system whose generator says what is known."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from stand_ins import ReadingGenerator, WordPrompts

from rlrag.config import (
    RunConfig,
)
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, GenerationError
from rlrag.evaluation.picked import NUM_TIMED, Picked, first_picks, seconds_per_question
from rlrag.evaluation.probe.contradiction import contradictions
from rlrag.evaluation.probe.measures import Probe, ProbeSettings, impossible, measure
from rlrag.evaluation.probe.robustness import GoldQuestions, gold_questions, shuffled
from rlrag.evaluation.probe.table import ProbeTable, render
from rlrag.pipeline import open_reward
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable

# The generator repeats the last word of the first passage or, without one, of the question.
GOLDEN = [("paris",), ("lima",), ("blue",), ()]
ASKED = ["where is it", "where is lima", "what is blue", "what is it"]
SETTINGS = ProbeSettings(num_distractors=2, distractor_counts=(0, 1, 2), copies=(1, 3))


def four_questions() -> CandidateTable:
    """The second of four candidates is gold and says the answer, or something else for `blue`."""
    words = [["no", golden[0] if golden else "x", "nope", "never"] for golden in GOLDEN]
    words[2][1] = "red"
    passages = [
        Passage(f"p{q}-{n}", "", f"it says {word}")
        for q, said in enumerate(words)
        for n, word in enumerate(said)
    ]
    return CandidateTable(
        questions=tuple(
            Question(f"q{q}", asked, golden, {"gold_ids": [f"p{q}-1"]})
            for q, (asked, golden) in enumerate(zip(ASKED, GOLDEN, strict=True))
        ),
        corpus=MemoryCorpus(passages),
        rows_QN=np.arange(16).reshape(4, 4),
        scores_QNC=np.zeros((4, 4, 1), dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((4, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((16, 0), dtype=np.float32),
    )


def probe_of(picked: Picked | None = None, generator: ReadingGenerator | None = None) -> Probe:
    table = four_questions()
    answering = open_reward(RunConfig(), generator or ReadingGenerator(), WordPrompts())
    gold = gold_questions(table, SETTINGS.needed_distractors)
    return Probe(table.questions, gold, picked or first_picks(table, 2), answering, SETTINGS)


def values(of: Probe, name: str, part: str | None = None) -> dict[str, list[float | None]]:
    found = measure([name], of)[part or name].values
    return {key: [None if math.isnan(v) else float(v) for v in row] for key, row in found.items()}


def test_mirage_of_known_answers():
    """Base says it, lima, blue; gold says paris, lima, red; the mixed context's first decides."""
    of = probe_of()
    first = [
        shuffled(f"q{q}", [context.gold[0], *context.distractors[:2]])[0].id == f"p{q}-1"
        for q, context in enumerate(of.gold.contexts)
        if context is not None
    ]
    found = values(of, "mirage")
    assert found["context_acceptability"] == [float(first[0]), float(first[1]), 0, None]
    assert found["noise_vulnerability"] == [float(not first[0]), float(not first[1]), 0, None]
    assert found["context_misinterpretation"] == [0, 0, 1, None]
    assert found["context_insensitivity"] == [0, 0, 0, None]


def test_mirage_with_the_picked_passages_in_the_place_of_the_mixed_ones():
    picked = Picked([of[1::-1] for of in (four_questions().passages(q) for q in range(4))])
    assert values(probe_of(picked), "mirage", "mirage_picked")["overall"] == [1, 1, -1, None]
    assert values(probe_of(), "mirage", "mirage_picked")["overall"] == [-1, -1, -1, None]


def test_orders_of_the_picked_passages():
    """Candidates 0 and 1 say no and the gold word; the last question should not be answered."""
    found = values(probe_of(), "order")
    assert found["changes"] == [1, 1, 0, 0]
    assert found["accuracy_mean"] == [0.5, 0.5, 0, 0]
    assert found["f1_spread"] == [0.5, 0.5, 0, 0]


def test_positions_of_the_gold_passage():
    found = values(probe_of(), "position")
    assert [found[f"accuracy@{place}"] for place in (1, 2, 3)] == [
        [1, 1, 0, None],
        [0, 0, 0, None],
        [0, 0, 0, None],
    ]
    assert found["f1_change"] == [-1, -1, 0, None]


def test_distractors_and_copies_are_read_where_the_shuffle_puts_them():
    of = probe_of()
    for name, contexts in (
        ("distractors", {count: (1, count) for count in (0, 1, 2)}),
        ("duplicates", {copies: (copies, 2) for copies in (1, 3)}),
    ):
        found = values(of, name)
        for setting, (copies, count) in contexts.items():
            for q in (0, 1):
                context = of.gold.contexts[q]
                assert context is not None
                shown = shuffled(f"q{q}", context.gold * copies + context.distractors[:count])
                assert found[f"accuracy@{setting}"][q] == float(shown[0].id == f"p{q}-1")
    assert values(of, "distractors")["accuracy@0"] == [1, 1, 0, None]


def test_copies_that_say_another_answer_mislead_where_the_shuffle_puts_them_first():
    """Of `blue` the gold passage says red, so that there is nothing to contradict."""
    of = probe_of()
    found = values(of, "contradictions")
    made = contradictions(of.questions, of.gold)
    assert sorted(made) == [0, 1]
    assert found["misled@0"] == [0, 0, None, None]
    for q, wrong in made.items():
        assert wrong.wrong_answer in {"paris", "lima", "blue"} - {GOLDEN[q][0]}
        context = of.gold.contexts[q]
        assert context is not None
        for count in (0, 1, 2):
            around = context.gold + context.distractors[:2] + wrong.passages * count
            said = shuffled(f"q{q}", around)[0].text.split()[-1]
            assert found[f"accuracy@{count}"][q] == float(said == GOLDEN[q][0])
            assert found[f"misled@{count}"][q] == float(said == wrong.wrong_answer)
    assert found["misled@2"] != found["misled@0"]


def test_contradictions_need_an_answer_that_stands_in_a_gold_passage():
    table = four_questions()
    questions = [replace(q, golden_answers=("Paris, France",)) for q in table.questions[:3]]
    gold = GoldQuestions(gold_questions(table, 2).contexts[:3], {})
    found = impossible(questions, gold, 2, 2)
    assert "contains a golden answer literally" in str(found["contradictions"])


def test_attribution_and_abstention_of_the_picked_answers():
    """All answers are `no`, which the first passage says; it is no abstention."""
    assert values(probe_of(), "attribution") == {
        "found": [1, 1, 1, 1],
        "found_when_right": [None] * 4,
        "found_when_wrong": [1, 1, 1, 1],
    }
    assert values(probe_of(), "abstention")["hallucination"] == [None, None, None, 1]


def test_calibration_of_answers_selections_and_first_picks():
    """The generator's log-probability is always -1; half of the first picks are gold."""
    table = four_questions()
    pairs = [table.passages(q)[:2] for q in range(4)]
    selections = [pairs[0][::-1], pairs[1], pairs[2][::-1], pairs[3]]
    logp = np.log([[0.5, 0.5], [0.5, 0.5], [0.8, 0.25], [0.8, 0.25]])
    found = measure(["calibration"], probe_of(Picked(selections, logp)))
    sure = math.exp(-1)
    answer = found["calibration_answer"]
    assert answer.values["share"].tolist() == [1, 0, 0, 0]
    assert answer.values["brier"] == pytest.approx([(1 - sure) ** 2, *[sure**2] * 3])
    assert answer.numbers["ece"] == pytest.approx(sure - 0.25)
    assert found["calibration_selection"].values["probability"] == pytest.approx(
        [0.25, 0.25, 0.2, 0.2]
    )
    first = found["calibration_first_pick"]
    assert first.values["probability"] == pytest.approx([0.5, 0.5, 0.8, 0.8])
    assert first.values["share"].tolist() == [1, 0, 1, 0]
    assert [row["num_questions"] for row in first.tables["reliability"]] == [2, 2]
    assert first.numbers["ece"] == pytest.approx(0.15)
    assert list(measure(["calibration"], probe_of())) == ["calibration_answer"]


def test_tokens_are_counted_and_parts_timed():
    asked: list[list[int]] = []
    table = four_questions()
    picked = Picked(first_picks(table, 2).selections, None, {"retrieval": asked.append})
    found = measure(["cost"], probe_of(picked))["cost"]
    prompt = "it says no | it says paris | where is it"
    assert found.values["prompt_tokens"][0] == len(prompt)
    assert found.values["answer_tokens"].tolist() == [1, 1, 1, 1]
    assert asked == [[0], [0, 1, 2, 3]]
    assert found.numbers["retrieval_seconds"] >= 0
    seconds_per_question(asked.append, NUM_TIMED + 1)
    assert asked[2:] == [[0], list(range(NUM_TIMED))]


class Refusing(ReadingGenerator):
    """Cannot answer prompts that hold a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def generate(self, prompts, sampling):
        answers = super().generate(prompts, sampling)
        pairs = zip(prompts, answers, strict=True)
        return [GenerationError("no") if self.word in p.text else a for p, a in pairs]


def test_questions_that_the_generator_cannot_answer_are_left_out_and_named():
    of = probe_of(generator=Refusing("paris"))
    assert values(of, "position")["accuracy@1"] == [None, 1, 0, None]
    assert values(of, "cost")["answer_tokens"] == [None, 1, 1, 1]
    assert values(of, "mirage")["overall"][0] is None
    assert values(of, "order")["changes"] == [None, 1, 0, 0]
    assert list(of.errors) == [0]
    with pytest.raises(GenerationError):
        measure(["order"], probe_of(generator=Refusing("it")))


def test_what_cannot_be_measured_is_said_with_its_reason():
    questions = four_questions().questions

    def reasons(left_out: dict[str, int], contexts=(None,) * 4, asked=questions) -> dict[str, str]:
        found = impossible(asked, GoldQuestions(contexts, left_out), 1, 4)
        return {name: str(error) for name, error in found.items()}

    unknown = reasons({"no_gold_named": 3, "unanswerable": 1})
    around = ["mirage", "position", "distractors", "duplicates", "contradictions"]
    assert list(unknown) == [*around, "order"]
    assert "position: no gold passages are known: of 4 questions none" in unknown["position"]
    assert "picks 1 passage, which has only one order" in unknown["order"]
    assert "lacks the gold passages of all 3" in reasons({"gold_not_in_corpus": 3})["mirage"]
    few = reasons({"too_few_distractors": 2, "gold_not_in_corpus": 1})["mirage"]
    assert "none of the 2 questions with gold passages has 4 distractors" in few
    usable = probe_of().gold.contexts
    found = reasons({}, usable[:3], questions[:3])
    assert list(found) == ["order", "abstention"]
    assert "all 3 questions have golden answers" in found["abstention"]
    assert list(reasons({}, usable)) == ["order"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_distractors": 0}, "num_distractors is 0; give at least 1"),
        ({"distractor_counts": ()}, r"distractor_counts is \[\]; give ascending numbers"),
        ({"distractor_counts": (0, 2, 1)}, r"distractor_counts is \[0, 2, 1\]"),
        ({"distractor_counts": (-1,)}, "of at least 0"),
        ({"copies": (0, 1)}, r"copies is \[0, 1\]; give ascending numbers of at least 1"),
        ({"copies": (1, 1)}, r"copies is \[1, 1\]"),
        ({"max_orders": 1}, "max_orders is 1; give at least 2"),
    ],
)
def test_settings_that_no_context_can_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProbeSettings(**settings)


def test_a_table_has_means_with_intervals_and_compares_two_systems():
    ours = measure(["position", "attribution"], probe_of())
    picked = Picked([of[1::-1] for of in (four_questions().passages(q) for q in range(4))])
    theirs = measure(["position", "attribution"], probe_of(picked))
    record = ProbeTable({"trained": ours, "retriever_order": theirs}, 200).to_json()
    found = record["systems"]["trained"]
    assert found["position"]["accuracy@1"]["mean"] == pytest.approx(2 / 3)
    assert found["position"]["accuracy@1"]["num_questions"] == 3
    assert found["position"]["accuracy@2"] == {"mean": 0, "ci95": [0, 0], "num_questions": 3}
    assert found["attribution"]["found_when_right"] is None
    pair = record["paired"]["trained_vs_retriever_order"]
    assert list(pair) == ["position", "attribution"]
    assert pair["position"]["accuracy_change"]["diff"] == 0
    assert pair["position"]["accuracy_change"]["p_value"] == 1
    assert "found_when_right" not in pair["attribution"]
    json.dumps(record, allow_nan=False)
    console = Console(file=io.StringIO(), width=80)
    console.print(render(record, "4 questions"))
    lines = console.file.getvalue().splitlines()
    (line,) = [line for line in lines if "accuracy@1" in line]
    assert line.split() == [
        "accuracy@1",
        ".667",
        "(.000,",
        "1.00)",
        ".667",
        "(.000,",
        "1.00)",
        "3",
        "1",
    ]
    (line,) = [line for line in lines if "accuracy_change" in line]
    assert line.split()[1:4] == ["-.667", "(-1.00,", ".000)"]
    assert not any("f1@" in line for line in lines)
    (line,) = [line for line in lines if "found_when_right" in line]
    assert line.split()[1] == "-"


# The program
