"""Compiled encoders on two processes; compiling takes half a minute, so ``make test-slow`` runs this."""

import pytest

from test_strategies import in_two_processes, losses_of
from tiny import subset
from two_processes import COMPILED, train

pytestmark = pytest.mark.slow


def test_compiled_on_two_processes_trains_as_compiled_on_one(tmp_path):
    data = str(subset(tmp_path / "data.parquet", train=48, val=16, test=8))
    in_two_processes(tmp_path, data, *COMPILED)
    one = train(tmp_path, data, "one", "trainer.accumulate_grad_batches=2", "trainer.compile=true")
    plain = train(tmp_path, data, "plain", "trainer.accumulate_grad_batches=2")
    assert one != plain, "compiled code draws other numbers for dropout"
    for case in COMPILED:
        assert losses_of(tmp_path, case) == pytest.approx(one, rel=1e-6, abs=1e-6), case
