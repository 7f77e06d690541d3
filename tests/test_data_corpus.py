"""Corpora in memory and on disk: equal to each other, whole or absent, small in memory."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlrag
from rlrag.data import corpus as corpus_module
from rlrag.data import corpus_writer, load
from rlrag.data.checks import DataReport, Finding, Tally
from rlrag.data.corpus import Corpus, DiskCorpus, MemoryCorpus
from rlrag.data.corpus_writer import write_disk_corpus
from rlrag.data.load import load_corpus
from rlrag.errors import DataError, SetupError
from rlrag.records import Passage

PASSAGES = [
    Passage("p1", "Rome", "A city in Italy."),
    Passage("p2", "", 'Quotes " and \n lines and \\ slashes.'),
    Passage("ü3", "Ünïcode", "日本語のテキスト 🏔"),
    Passage("p4", "Paris", "A city in France."),
]


def many(num_passages: int) -> Iterator[Passage]:
    return (Passage(f"id-{n}", f"Title {n}", f"Text of passage {n}.") for n in range(num_passages))


@pytest.fixture(params=["memory", "disk"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    if request.param == "memory":
        return MemoryCorpus(PASSAGES)
    return write_disk_corpus(PASSAGES, tmp_path / "corpus")


def test_rows_iteration_and_lookup_agree(corpus: Corpus):
    assert len(corpus) == 4
    assert list(corpus) == PASSAGES
    assert [corpus[row] for row in range(4)] == PASSAGES
    assert [corpus.row_of(passage.id) for passage in PASSAGES] == [0, 1, 2, 3]
    assert corpus.row_of("p") is None
    assert corpus.row_of("") is None


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_outside_is_refused(corpus: Corpus, row: int):
    with pytest.raises(IndexError, match="outside the corpus of 4 passages"):
        corpus[row]


def test_disk_and_memory_have_the_same_hash(tmp_path: Path):
    disk = write_disk_corpus(PASSAGES, tmp_path / "corpus")
    assert disk.content_hash == MemoryCorpus(PASSAGES).content_hash
    assert len(disk.content_hash) == 64


def test_the_hash_is_stable_and_sees_every_part():
    fixed = MemoryCorpus([Passage("p1", "Rome", "A city.")])
    # SHA-256 of the line ["p1","Rome","A city."] with a newline, from another program.
    expected = "6afe59e7a75bb6694420b5ef6369e24b7cec78be2a20c2ad6c1465f7cec8aec3"
    assert fixed.content_hash == expected
    variants = [
        [Passage("p2", "Rome", "A city.")],
        [Passage("p1", "Rom", "eA city.")],
        [Passage("p1", "Rome", "A city")],
        [Passage("p1", "Rome", "A city."), Passage("p2", "", "x")],
        [Passage("p2", "", "x"), Passage("p1", "Rome", "A city.")],
    ]
    hashes = {MemoryCorpus(passages).content_hash for passages in variants}
    assert len(hashes | {expected}) == len(variants) + 1


def test_every_id_of_a_larger_corpus_is_found(tmp_path: Path):
    disk = write_disk_corpus(many(5000), tmp_path / "corpus")
    assert all(disk.row_of(f"id-{row}") == row for row in range(5000))
    assert disk.row_of("id-5000") is None


def test_ids_that_share_a_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (corpus_module, corpus_writer):
        monkeypatch.setattr(module, "hash_id", lambda passage_id: b"same" + b"\0" * 4)
    tally = Tally()
    passages = [*PASSAGES, Passage("p2", "", "again"), Passage("p4", "", "again")]
    disk = write_disk_corpus(passages, tmp_path / "corpus", tally=tally)
    assert list(disk) == PASSAGES
    assert [disk.row_of(passage.id) for passage in PASSAGES] == [0, 1, 2, 3]
    assert disk.row_of("p9") is None
    assert disk.report.duplicates == Finding(2, ("p2", "p4"))


def test_duplicates_are_refused_without_a_tally(tmp_path: Path):
    passages = [*PASSAGES, Passage("p1", "", "Another text.")]
    with pytest.raises(DataError, match="'p1' is used in rows 0 and 4"):
        MemoryCorpus(passages)
    with pytest.raises(DataError, match="'p1' is used in rows 0 and 4"):
        write_disk_corpus(passages, tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


def test_duplicates_are_dropped_with_a_tally(tmp_path: Path):
    tally = Tally()
    passages = [*many(9000), *many(3), Passage("new", "", "text"), *many(1)]
    disk = write_disk_corpus(passages, tmp_path / "corpus", tally=tally)
    kept = [*many(9000), Passage("new", "", "text")]
    assert disk.content_hash == MemoryCorpus(kept).content_hash
    assert disk.report.duplicates == Finding(4, ("id-0", "id-1", "id-2"))
    assert disk.row_of("new") == 9000
    assert sorted(path.name for path in disk.directory.iterdir()) == [
        "ids.bin",
        "meta.json",
        "offsets.bin",
        "passages.jsonl",
    ]


def test_an_empty_corpus_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no passages"):
        MemoryCorpus([])
    with pytest.raises(DataError, match="no passage"):
        write_disk_corpus([], tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


def test_text_that_no_file_can_store_is_refused():
    with pytest.raises(DataError, match="'p1' contains the lone surrogate"):
        MemoryCorpus([Passage("p1", "", "\ud800")])


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    def broken() -> Iterator[Passage]:
        yield from PASSAGES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_disk_corpus(broken(), tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


KILLED_WRITER = """
import os, sys
from pathlib import Path
from rlrag.data.corpus_writer import write_disk_corpus
from rlrag.records import Passage

def passages():
    for number in range(5000):
        yield Passage(str(number), "", "text")
    os._exit(9)

write_disk_corpus(passages(), Path(sys.argv[1]))
"""


def test_a_killed_write_leaves_no_usable_half(tmp_path: Path):
    project = Path(rlrag.__file__).parents[1]
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "corpus")]
    assert subprocess.run(command, cwd=project, timeout=120, check=False).returncode == 9
    assert not (tmp_path / "corpus").exists()
    for leftover in tmp_path.iterdir():
        with pytest.raises(DataError, match="not a corpus on disk"):
            DiskCorpus(leftover)
    assert len(write_disk_corpus(PASSAGES, tmp_path / "corpus")) == 4


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_writer, "_flush_to_disk", no_space)
    with pytest.raises(SetupError, match="No space left on device; free space"):
        write_disk_corpus(PASSAGES, tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


def test_whoever_may_read_the_cache_may_read_the_corpus(tmp_path: Path):
    (tmp_path / "ordinary").mkdir()
    mode = (tmp_path / "ordinary").stat().st_mode
    assert write_disk_corpus(PASSAGES, tmp_path / "corpus").directory.stat().st_mode == mode


def test_a_cache_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="choose another cache_dir"):
        write_disk_corpus(PASSAGES, tmp_path / "file" / "corpus")


def test_a_second_writer_of_the_same_corpus_takes_the_first_copy(tmp_path: Path):
    def raced() -> Iterator[Passage]:
        yield from PASSAGES
        write_disk_corpus(PASSAGES, tmp_path / "corpus")

    assert list(write_disk_corpus(raced(), tmp_path / "corpus")) == PASSAGES
    with pytest.raises(DataError, match="already holds another corpus"):
        write_disk_corpus(PASSAGES[:2], tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("name", ["passages.jsonl", "offsets.bin", "ids.bin"])
def test_a_damaged_corpus_is_refused(tmp_path: Path, name: str):
    directory = write_disk_corpus(PASSAGES, tmp_path / "corpus").directory
    (directory / name).write_bytes((directory / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} is damaged: it has \d+ bytes and not \d+"):
        DiskCorpus(directory)
    (directory / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is damaged: it has 0 bytes"):
        DiskCorpus(directory)


@pytest.mark.parametrize("name", ["passages.jsonl", "offsets.bin", "ids.bin"])
def test_a_corpus_with_changed_bytes_of_equal_length_is_refused(tmp_path: Path, name: str):
    path = write_disk_corpus(PASSAGES, tmp_path / "corpus").directory / name
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DataError, match=rf"{name} is damaged: its bytes are others"):
        DiskCorpus(path.parent)


@pytest.mark.parametrize("meta", [{"format": 2}, {"format": 2, "content_hash": "x", "files": 3}])
def test_a_damaged_description_is_refused(tmp_path: Path, meta: dict):
    path = write_disk_corpus(PASSAGES, tmp_path / "corpus").directory / "meta.json"
    path.write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        DiskCorpus(path.parent)


def test_another_format_is_refused(tmp_path: Path):
    meta = write_disk_corpus(PASSAGES, tmp_path / "corpus").directory / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    with pytest.raises(DataError, match="not of corpus format"):
        DiskCorpus(meta.parent)


def test_a_pickle_carries_the_path_only(tmp_path: Path):
    disk = write_disk_corpus(many(2000), tmp_path / "corpus")
    packed = pickle.dumps(disk)
    assert len(packed) < 1000
    assert list(pickle.loads(packed)) == list(disk)


def test_meta_tells_what_the_corpus_is(tmp_path: Path):
    tally = Tally()
    tally.num_read = 4
    source = {"spec": "made up", "words": 9}
    disk = write_disk_corpus(PASSAGES, tmp_path / "corpus", source=source, tally=tally)
    meta = json.loads((disk.directory / "meta.json").read_text())
    assert meta["content_hash"] == disk.content_hash
    assert meta["num_passages"] == 4
    assert meta["source"] == disk.source == source
    assert disk.report.summary() == "made up: read 4, kept 4"


def write_jsonl(path: Path, num_passages: int) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for passage in many(num_passages):
            file.write(json.dumps({"id": passage.id, "contents": passage.contents}) + "\n")
    return path


def test_words_that_are_cut_are_counted_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "corpus.jsonl"
    texts = [" ".join(["word"] * num) for num in (4, 10, 6)]
    path.write_text("".join(json.dumps({"id": text, "contents": text}) + "\n" for text in texts))
    for _ in range(2):  # read, then from the copy
        caplog.clear()
        report = load_corpus(str(path), tmp_path / "cache", 5).report
        assert (report.cut.count, report.cut.first) == (2, (texts[1], texts[2]))
        assert report.cut_share == 6 / 20
        (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "30.0% of all words" in warning.message
    caplog.clear()
    assert load_corpus(str(path), tmp_path / "cache", 10).report.is_clean
    assert "cut" not in caplog.text
    assert DataReport("a", 3, 3, cut=report.cut, cut_share=0.01).is_clean  # hardly any


def test_the_cache_is_used_until_the_source_changes(tmp_path: Path):
    path = write_jsonl(tmp_path / "corpus.jsonl", 3)
    cache = tmp_path / "cache"
    first = load_corpus(str(path), cache, 100)
    inode = (first.directory / "meta.json").stat().st_ino
    again = load_corpus(str(path), cache, 100)
    assert again.directory == first.directory
    assert (again.directory / "meta.json").stat().st_ino == inode
    assert again.report == first.report
    shorter = load_corpus(str(path), cache, 2)
    assert shorter[0].text == "Text of"
    assert shorter.directory != first.directory
    write_jsonl(path, 4)
    assert len(load_corpus(str(path), cache, 100)) == 4


def test_a_damaged_cache_that_another_process_deletes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_jsonl(tmp_path / "corpus.jsonl", 3)
    directory = load_corpus(str(path), tmp_path, 100).directory
    (directory / "ids.bin").write_bytes(b"")
    monkeypatch.setattr(load._logger, "warning", lambda *words: shutil.rmtree(directory))
    assert len(load_corpus(str(path), tmp_path, 100)) == 3


def test_a_cache_that_cannot_be_read_now_is_not_deleted(tmp_path: Path):
    path = write_jsonl(tmp_path / "corpus.jsonl", 3)
    directory = load_corpus(str(path), tmp_path, 100).directory
    (directory / "meta.json").unlink()
    (directory / "meta.json").symlink_to("meta.json")  # an error other than its absence
    with pytest.raises(SetupError, match=r"meta\.json cannot be read: Too many levels"):
        load_corpus(str(path), tmp_path, 100)
    assert (directory / "ids.bin").is_file()


def test_a_damaged_cache_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_jsonl(tmp_path / "corpus.jsonl", 3)
    first = load_corpus(str(path), tmp_path, 100)
    (first.directory / "ids.bin").write_bytes(b"")
    again = load_corpus(str(path), tmp_path, 100)
    assert len(again) == 3
    assert "rebuilding the corpus" in caplog.text


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    small = write_jsonl(tmp_path / "small.jsonl", 2_500)
    large = write_jsonl(tmp_path / "large.jsonl", 25_000)

    def peak_of(path: Path) -> int:
        tracemalloc.start()
        load_corpus(str(path), tmp_path / "cache", 100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_of(write_jsonl(tmp_path / "warm_up.jsonl", 10))
    peak_small, peak_large = peak_of(small), peak_of(large)
    # Small peaks differ by what else this process does; one that held the corpus would not.
    num_more_bytes = large.stat().st_size - small.stat().st_size
    assert peak_large - peak_small < 0.05 * num_more_bytes
