"""The benchmark for GPUs runs on a CPU too, on a small scale, so that it works where there is a GPU."""

import time

import pytest
import torch

from benchmarks import gpu

TINY = ["encoder.width=16", "encoder.layers=1", "denoiser.width=16", "denoiser.layers=1", "denoiser.heads=2"]


def test_every_encoder_stage_format_and_place_of_graphs_is_measured_once() -> None:
    cases = gpu.all_cases()
    assert len(set(map(str, cases))) == len(cases) == 36
    for encoder in gpu.ENCODERS:
        own = [case for case in cases if case.encoder == encoder]
        assert {case.stage for case in own} == {"vae", "diffusion"}
        assert {case.numbers for case in own} == {"float32", "TF32", "bfloat16"}
        assert {case.graph_on for case in own} == {"host", "device"}
        assert {case.compiled for case in own} == {True, False}
    assert [case.compiled for case in cases] == sorted(case.compiled for case in cases), "what takes longest comes last"


@pytest.mark.parametrize("encoder", gpu.ENCODERS)
def test_a_small_run_measures_everything(encoder: str) -> None:
    cases = [gpu.Case(encoder, "vae", "bfloat16"), gpu.Case(encoder, "diffusion", "float32", "device")]
    how = {"batch": 4, "steps": 1, "workers": 0, "words": TINY, "side": 64}
    found = dict(gpu.results(cases, "cpu", until=time.monotonic() + 600.0, **how))
    assert list(found) == ["the card itself", *map(str, cases)]
    for name, measures in found.items():
        values = {metric: value for metric, _, value in measures}
        assert len(values) == (4 if name == "the card itself" else 8)
        assert all(value > 0 for value in values.values()), values
        assert values.get("waiting for data", 0.0) < 100.0


def test_what_there_is_no_time_for_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    case = gpu.Case("cartnet", "vae")
    how = {"batch": 4, "steps": 1, "workers": 0, "words": TINY, "side": 64}
    assert [name for name, _ in gpu.results([case], "cpu", until=0.0, **how)] == ["the card itself"]
    assert f"left out, no time: {case}" in capsys.readouterr().out


def test_operations_and_their_bytes_are_counted_without_views() -> None:
    a, b = torch.ones(10, 20), torch.ones(10, 20)
    with gpu.Operations() as counted:
        (a + b).view(-1)
    assert counted.count == 1
    assert counted.bytes == 3 * 10 * 20 * 4
