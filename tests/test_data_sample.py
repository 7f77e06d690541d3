"""The built-in sample: small, consistent and with one right passage for each answer."""

from __future__ import annotations

from rlrag.data.sample import sample_corpus, sample_questions


def test_sizes_and_ids():
    corpus, questions = sample_corpus(), sample_questions()
    assert len(corpus) == 24
    assert len(questions) >= 24
    assert len({question.id for question in questions}) == len(questions)
    assert len({question.question for question in questions}) == len(questions)
    assert max(len(passage.text.split()) for passage in corpus) <= 40


def test_every_answer_stands_in_its_gold_passage_alone():
    corpus = sample_corpus()
    for question in sample_questions():
        for answer in question.golden_answers:
            holders = [p.id for p in corpus if answer.lower() in p.contents.lower()]
            assert holders == list(question.gold_ids), (question.question, answer)


def test_every_passage_answers_some_question():
    asked = {gold_id for question in sample_questions() for gold_id in question.gold_ids}
    assert asked == {passage.id for passage in sample_corpus()}


def test_no_question_gives_its_answer_away():
    for question in sample_questions():
        assert not any(a.lower() in question.question.lower() for a in question.golden_answers)


def test_matching_words_errs_now_and_then():
    # A word-overlap search finds the gold passage first for some questions and not for others.
    corpus, questions = sample_corpus(), sample_questions()

    def words(text: str) -> set[str]:
        return set(text.lower().replace("?", "").replace(".", "").replace(",", "").split())

    first = [
        max(corpus, key=lambda p: len(words(q.question) & words(p.contents))).id for q in questions
    ]
    right = sum(found == q.gold_ids[0] for found, q in zip(first, questions, strict=True))
    assert 0.2 * len(questions) < right < 0.8 * len(questions)


def test_two_calls_give_equal_values():
    assert sample_corpus().content_hash == sample_corpus().content_hash
    assert sample_questions() == sample_questions()
