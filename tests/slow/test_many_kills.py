"""Runs that are killed many times; minutes each, run by ``make test-slow``. Figures: docs/reliability.md."""

import pytest

from test_resume import kill_and_resume

pytestmark = pytest.mark.slow


def test_fifty_kills_of_a_two_stage_run_leave_no_trace(tmp_path):
    found = kill_and_resume(tmp_path, kills=50, ranks=1, seed=1)
    assert found["exit_statuses"] == {"-9": 50}
    assert found["killed_while_writing_a_file"] > 0
    assert found["lost_and_repeated"] > 0


def test_ten_kills_of_a_run_on_two_ranks_leave_no_trace(tmp_path):
    found = kill_and_resume(tmp_path, kills=10, ranks=2, seed=2)
    assert sum(found["exit_statuses"].values()) == 20
    assert "0" not in found["exit_statuses"], "the rank that wasn't killed ends too, and says that it failed"
