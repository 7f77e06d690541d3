"""What a run says of itself in a report, by what it was trained on."""

from __future__ import annotations

from rlrag.config import FeedbackConfig, RunConfig
from rlrag.evaluation.report.page import render_report
from rlrag.evaluation.report.run_record import RunRecord


def test_a_run_on_a_log_draws_no_samples_and_passes_over_the_log():
    """Its effective sample size is that of a batch, and no share of the m of DRO."""
    config = RunConfig(algorithm=FeedbackConfig(log="log.sqlite", num_epochs=7))
    records = [{"step": 0, "epoch": 0.0}, {"step": 1, "epoch": 3.5, "ess": 24.0, "loss": 0.5}]
    run = RunRecord("logged", config, records, (), None)
    assert (run.algorithm, run.num_samples, run.num_epochs) == ("feedback", None, 7)
    assert run.weight_statistics()["ess_share"] is None
    page = render_report([run])
    assert "3.50 of 7" in page
    assert "samples a question" not in page
