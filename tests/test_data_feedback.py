"""The log of selections and feedback: what goes in comes out, whoever writes; it stays small."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from rlrag.data import feedback_file
from rlrag.data.feedback import (
    FeedbackStore,
    SelectionEvent,
    copy_feedback,
    count_selections,
    read_feedback,
)
from rlrag.errors import DataError

DAY_S = 86_400.0


def event(number: int = 0, **changes) -> SelectionEvent:
    found = SelectionEvent(
        request_id=f"request-{number}",
        time_s=time.time(),
        version="abc123",
        question="wo liegt Zürich?",
        candidate_ids=("p1", "p2", "p3"),
        actions=(2, 0),
        propensity_logp=-1.25,
        explored=True,
        answer="Schweiz",
        answer_logp=-0.5,
    )
    return replace(found, **changes)


def ids_in(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [id_ for (id_,) in connection.execute("SELECT request_id FROM selections")]


def num_feedback(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT COUNT(*) FROM feedback").fetchone()[0]


def test_what_goes_in_comes_out_with_its_reward(tmp_path):
    path = tmp_path / "new" / "log.sqlite"
    store = FeedbackStore(path)
    events = [event(n) for n in range(5)]
    assert all(store.record_selection(each) for each in events)
    assert store.record_feedback("request-3", golden_answers=["Schweiz", "die Schweiz"])
    assert store.record_feedback("request-0", reward=-2.5)
    assert store.record_feedback("request-1", thumbs="up")
    assert store.record_feedback("request-2", thumbs="down")
    found = read_feedback(path)
    assert [record.event for record in found] == events[:4]
    assert [record.reward for record in found] == [-2.5, 1.0, 0.0, None]
    assert [record.golden_answers for record in found] == [
        *(None, None, None),
        ("Schweiz", "die Schweiz"),
    ]
    assert count_selections(path) == 5


def test_the_last_word_counts_and_all_are_kept(tmp_path):
    store = FeedbackStore(tmp_path / "log.sqlite")
    store.record_selection(event())
    for word in ({"thumbs": "up"}, {"reward": 0.25}, {"golden_answers": ()}):
        assert store.record_feedback("request-0", **word)
    [record] = read_feedback(tmp_path / "log.sqlite")
    assert (record.reward, record.golden_answers) == (None, ())
    assert num_feedback(tmp_path / "log.sqlite") == 3


def test_an_unknown_request_and_one_that_is_taken_store_nothing(tmp_path):
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path)
    assert store.record_feedback("request-0", reward=1.0) is False
    assert store.record_selection(event()) is True
    assert store.record_selection(event(answer="another")) is False
    store.record_feedback("request-0", reward=1.0)
    [record] = read_feedback(path)
    assert record.event.answer == "Schweiz"
    assert num_feedback(path) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": ()}, "distinct candidate positions"),
        ({"actions": (4,)}, "3 candidates"),
        ({"actions": (3, 1)}, "3 at the end for a stop"),
        ({"actions": (-1,)}, "positions"),
        ({"actions": (1, 1)}, "distinct candidate positions"),
        ({"propensity_logp": 0.1}, "probability"),
        ({"propensity_logp": float("-inf")}, "probability"),
        ({"propensity_logp": float("nan")}, "probability"),
        ({"answer_logp": float("nan")}, "finite"),
        ({"question": " "}, "empty"),
        ({"question": "half \ud800"}, "surrogate"),
    ],
)
def test_impossible_selections_are_refused(tmp_path, changes, message):
    store = FeedbackStore(tmp_path / "log.sqlite")
    with pytest.raises(DataError, match=message):
        store.record_selection(event(**changes))
    assert ids_in(tmp_path / "log.sqlite") == []


def test_a_propensity_just_above_1_is_1(tmp_path):
    """As sums of log-probabilities may be, by rounding."""
    store = FeedbackStore(tmp_path / "log.sqlite")
    store.record_selection(event(propensity_logp=3e-8))
    store.record_feedback("request-0", reward=1)
    assert read_feedback(tmp_path / "log.sqlite")[0].event.propensity_logp == 0.0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ({}, "0 of"),
        ({"reward": 1.0, "thumbs": "up"}, "2 of"),
        ({"reward": float("inf")}, "the reward is inf; give a number from -1000 to 1000"),
        ({"reward": float("nan")}, "the reward is nan"),
        ({"reward": 1e6}, "the reward is 1000000.0"),
        ({"thumbs": "sideways"}, "'sideways'"),
        ({"golden_answers": "Paris"}, "list"),
        ({"golden_answers": ["\udc00"]}, "surrogate"),
    ],
)
def test_feedback_that_says_nothing_or_too_much_is_refused(tmp_path, word, message):
    store = FeedbackStore(tmp_path / "log.sqlite")
    store.record_selection(event())
    with pytest.raises(DataError, match=message):
        store.record_feedback("request-0", **word)
    assert read_feedback(tmp_path / "log.sqlite") == []


def test_the_oldest_selections_go_first_with_their_feedback(tmp_path):
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path, max_rows=50)
    for number in range(401):  # the first of each hundred deletes what is beyond the bound
        store.record_selection(event(number, question=f"question {number}?"))
        store.record_feedback(f"request-{number}", reward=1.0)
    kept = ids_in(path)
    assert kept == [f"request-{number}" for number in range(301, 401)]  # 50, and 50 with feedback
    assert num_feedback(path) == 100
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    assert b"question 400?" in content
    assert b"question 17?" not in content


def test_a_flood_of_selections_drives_out_none_with_feedback(tmp_path):
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path, max_rows=50)
    for number in range(20):
        store.record_selection(event(number))
        store.record_feedback(f"request-{number}", thumbs="up")
    for number in range(20, 1001):
        store.record_selection(event(number))
    kept = ids_in(path)
    assert {f"request-{number}" for number in range(20)} < set(kept)
    assert len(kept) == 70
    path.rename(tmp_path / "moved.sqlite")  # its successor is bounded from its first row
    for number in range(201):
        store.record_selection(event(number))
    assert len(ids_in(path)) <= 150


def test_the_last_words_about_an_answer_are_kept_and_the_file_is_its_users_alone(tmp_path):
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path)
    store.record_selection(event(0))
    for number in range(200):
        assert store.record_feedback("request-0", reward=number / 200)
    assert num_feedback(path) == 16
    [logged] = read_feedback(path)
    assert logged.reward == 199 / 200
    copy_feedback(path, tmp_path / "copy.sqlite")
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_old_selections_go_however_few_they_are(tmp_path):
    path = tmp_path / "log.sqlite"
    now = time.time()
    FeedbackStore(path).record_selection(event(0, time_s=now - 8 * DAY_S))
    store = FeedbackStore(path, max_days=7)
    store.record_selection(event(1, time_s=now - 6 * DAY_S))
    assert ids_in(path) == ["request-1"]


def test_a_great_excess_is_deleted_in_steps(tmp_path):
    """So that no request waits for it."""
    path = tmp_path / "log.sqlite"
    FeedbackStore(path)
    columns = "request_id, time_s, version, question, candidate_ids, positions, propensity_logp, "
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            f"INSERT INTO selections ({columns} explored, answer, answer_logp) "
            "VALUES (?, 0, 'v', 'q', '[\"p\"]', '[0]', -1, 1, 'a', -1)",
            [(str(n),) for n in range(1300)],
        )
    store = FeedbackStore(path, max_rows=10, max_days=1)
    sizes = []
    for number in range(201):
        store.record_selection(event(number))
        sizes.append(count_selections(path))
    # By number and by age, 500 each.
    assert sizes[0] == 301
    assert sizes[99] == 400
    assert sizes[200] == 10


def _append(path: Path, first: int, count: int) -> None:
    store = FeedbackStore(path)
    for number in range(first, first + count):
        assert store.record_selection(event(number))
        assert store.record_feedback(f"request-{number}", reward=number / 10_000)


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "log.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(path, 1000 * n, 40)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
        assert writer.exitcode == 0
    found = {record.event.request_id: record.reward for record in read_feedback(path)}
    assert found == {
        f"request-{n}": n / 10_000 for k in range(3) for n in range(1000 * k, 1000 * k + 40)
    }


def test_a_store_travels_to_another_process(tmp_path):
    store = pickle.loads(pickle.dumps(FeedbackStore(tmp_path / "log.sqlite")))
    assert store.record_selection(event())


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path):
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path)
    store.record_selection(event(0))
    store.close()
    path.rename(tmp_path / "old.sqlite")
    assert store.record_selection(event(1))
    assert ids_in(path) == ["request-1"]
    path.rename(tmp_path / "newer.sqlite")  # while the store has it open
    assert store.record_feedback("request-1", reward=1.0) is False
    assert store.record_selection(event(2))
    assert ids_in(path) == ["request-2"]
    assert ids_in(tmp_path / "old.sqlite") == ["request-0"]


def test_threads_share_a_store(tmp_path):
    store = FeedbackStore(tmp_path / "log.sqlite")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda number: store.record_selection(event(number)), range(60)))
    assert count_selections(tmp_path / "log.sqlite") == 60


def test_a_file_that_another_process_holds_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback_file, "_BUSY_TIMEOUT_S", 0.2)
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataError, match="locked; another process locked it"):
            store.record_selection(event())
        other.rollback()
    assert store.record_selection(event())


def test_a_copy_is_the_log_at_one_moment(tmp_path):
    store = FeedbackStore(tmp_path / "log.sqlite")
    store.record_selection(event())
    store.record_feedback("request-0", reward=1.0)
    copy = tmp_path / "copy.sqlite"
    copy_feedback(tmp_path / "log.sqlite", copy)
    store.record_feedback("request-0", reward=0.0)
    assert [record.reward for record in read_feedback(copy)] == [1.0]
    assert [record.reward for record in read_feedback(tmp_path / "log.sqlite")] == [0.0]
    assert sorted(p.name for p in tmp_path.iterdir() if "copy" in p.name) == ["copy.sqlite"]
    for folder in ("absent", "log.sqlite"):
        target = tmp_path / folder / "copy.sqlite"
        with pytest.raises(DataError, match=f"{target}.*cannot|cannot write {target}"):
            copy_feedback(tmp_path / "log.sqlite", target)


@pytest.mark.parametrize("with_log", [True, False])
def test_a_file_copied_without_its_log_is_warned_of(tmp_path, caplog, with_log):
    store, copy = FeedbackStore(tmp_path / "log.sqlite"), tmp_path / "copy.sqlite"
    for number in range(3):
        store.record_selection(event(number))
        store.record_feedback(f"request-{number}", reward=1.0)
    shutil.copy(tmp_path / "log.sqlite", copy)
    if with_log:
        shutil.copy(tmp_path / "log.sqlite-wal", tmp_path / "copy.sqlite-wal")
        assert len(read_feedback(copy)) == 3
        assert caplog.text == ""
    for _ in range(0 if with_log else 2):  # the first reader leaves an empty log
        caplog.clear()
        with pytest.raises(DataError, match="not a feedback log"):  # not even its tables
            read_feedback(copy)
        assert "copy.sqlite-wal, which contains the newest rows" in caplog.text
        assert "'.backup COPY'" in caplog.text
    caplog.clear()
    store.close()
    assert [path.name for path in tmp_path.glob("log.*")] == ["log.sqlite"]
    shutil.copy(tmp_path / "log.sqlite", tmp_path / "closed.sqlite")
    assert len(read_feedback(tmp_path / "closed.sqlite")) == 3
    assert caplog.text == ""


def test_a_store_that_is_closed_beside_another_leaves_the_log(tmp_path):
    path = tmp_path / "log.sqlite"
    first, second = FeedbackStore(path), FeedbackStore(path)
    first.record_selection(event(1))
    second.record_selection(event(2))
    first.close()
    second.record_selection(event(3))
    assert (tmp_path / "log.sqlite-wal").stat().st_size > 0
    second.close()
    assert ids_in(path) == ["request-1", "request-2", "request-3"]


def test_another_format_is_named(tmp_path):
    path = tmp_path / "log.sqlite"
    FeedbackStore(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")
    for use in (FeedbackStore, read_feedback):
        with pytest.raises(DataError, match="format 7, and this version reads 1"):
            use(path)


def test_foreign_and_damaged_files_are_left_as_they_are(tmp_path):
    foreign = tmp_path / "generations.sqlite"
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE results (key BLOB)")
    text = tmp_path / "notes.txt"
    text.write_text("no database " * 100)
    for path, message in ((foreign, "not a feedback log"), (text, "move it away")):
        before = path.read_bytes()
        for use in (FeedbackStore, read_feedback):
            with pytest.raises(DataError, match=message):
                use(path)
        assert path.read_bytes() == before
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    with pytest.raises(DataError, match="not a feedback log"):
        read_feedback(empty)
    with pytest.raises(
        DataError, match=r"does not exist; give the file that a service's feedback\.path"
    ):
        read_feedback(tmp_path / "absent.sqlite")
    with pytest.raises(DataError, match="folder"):
        FeedbackStore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE selections SET candidate_ids = '[1, 2'",
        "UPDATE selections SET positions = '[0, 9]'",
        "UPDATE selections SET propensity_logp = 3.0",
        "UPDATE feedback SET thumbs = 'sideways', reward = NULL",
        "UPDATE feedback SET golden_answers = '\"text\"', reward = NULL",
        "UPDATE feedback SET reward = 'much'",
        "UPDATE feedback SET reward = -1e308",
        "UPDATE feedback SET reward = 9e999",
    ],
)
def test_a_damaged_record_is_named(tmp_path, change):
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path)
    store.record_selection(event())
    store.record_feedback("request-0", reward=1.0)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    with pytest.raises(DataError, match="request 'request-0' is damaged"):
        read_feedback(path)


def test_a_path_comes_out_as_it_went_in_and_older_files_take_it(tmp_path):
    """A file of the first form lacks the columns; its rows stay what they were."""
    path = tmp_path / "log.sqlite"
    store = FeedbackStore(path)
    store.record_selection(event(0))
    store.record_feedback("request-0", reward=1.0)
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        for name in feedback_file.LATER_COLUMNS:
            connection.execute(f"ALTER TABLE selections DROP COLUMN {name}")
    [old] = read_feedback(path)
    assert (old.event.action_logps, old.event.num_selected) == (None, None)

    logps = (-1.0, -0.5, -0.25)
    walked = event(1, actions=(4, 17, 0), propensity_logp=-1.75, action_logps=logps, num_selected=2)
    store = FeedbackStore(path)
    store.record_selection(walked)
    store.record_feedback("request-1", reward=0.5)
    assert [record.event for record in read_feedback(path)] == [old.event, walked]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_selected": None}, "num_selected None"),
        ({"action_logps": (-1.25,)}, "a log-probability for each action"),
        ({"action_logps": (-1.0, -1.0)}, "which sum to it"),
        ({"action_logps": (0.25, -1.5)}, "a log-probability for each action"),
        ({"actions": (2, -1)}, "actions of its path"),
    ],
)
def test_an_impossible_path_is_refused(tmp_path, changes, message):
    fields = {"action_logps": (-1.0, -0.25), "num_selected": 2} | changes
    with pytest.raises(DataError, match=message):
        FeedbackStore(tmp_path / "log.sqlite").record_selection(event(**fields))
