"""A log on a full disk is said once and holds nobody up."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rlrag.errors import SetupError
from rlrag.json_logs import log_file, logging_to


def test_a_full_disk_costs_one_line_and_no_traceback(capsys):
    with logging_to([log_file(Path("/dev/full"), "run", "driver")]):
        for number in range(3):
            logging.getLogger("rlrag.test").warning("said %d", number)
    said = capsys.readouterr().err
    assert said == (
        "warning: cannot write /dev/full: No space left on device; what is logged is lost\n"
    )


def test_a_record_that_cannot_be_shown_is_not_hidden(tmp_path, capsys):
    with logging_to([log_file(tmp_path / "x.log", "run", "driver")]):
        logging.getLogger("rlrag.test").warning("%d", "no number")
    assert "Traceback" in capsys.readouterr().err


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"cannot write the log .*file/x\.log"):
        log_file(tmp_path / "file" / "x.log", "run", "driver")
