"""pytest-benchmark over the same cases and providers: `pytest benchmarks`, small shapes on a CPU, `-k ours` to choose.

Each provider is verified against the float64 reference in its test, then timed: one execution a round, synchronised,
gradients and counters set back before it, outside the clock.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.cases import CASES, SMALL, TINY, Problem
from benchmarks.plan import everyone
from benchmarks.provider import Context
from benchmarks.timing import Timer
from benchmarks.verification import Truth, judge, twin

pytest.importorskip("pytest_benchmark", reason='needs pip install ".[bench]"')

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = ("float32", "bfloat16") if CUDA else ("float32",)
SHAPES = [CASES["open-images"], CASES["batch"]] if CUDA else [TINY["open-images"], SMALL]
TIMER = Timer(DEVICE)
PARAMETERS = [
    pytest.param(case, p, dtype, id=f"{case.name}-{p.op}-{p.name.replace(', ', '-').replace(' ', '-')}-{dtype}")
    for case in SHAPES
    for p in everyone()
    for dtype in DTYPES
    if dtype in p.dtypes
]


@pytest.fixture(scope="module")
def problems():
    """(case's name) -> problem and its truth, made once."""
    made = {}

    def get(case):
        if case.name not in made:
            made.clear()  # the last one's tensors go
            problem = Problem(case, DEVICE)
            made[case.name] = problem, Truth(problem)
        return made[case.name]

    return get


@pytest.mark.parametrize(("case", "provider", "dtype"), PARAMETERS)
def test_provider(benchmark, request, problems, case, provider, dtype):
    official = request.config.getoption("--official", default=None)
    context = Context(DEVICE, Path(official) if official else None)
    reason = provider.absent(context) or provider.fits(case)
    if reason:
        pytest.skip(reason)
    assert twin(case.shape, DEVICE) == case.shape, "the float64 reference does not fit: choose a smaller case"
    problem, truth = problems(case)
    benchmark.group = f"{provider.op}, {case.name}, {dtype}"
    job = provider.build(context, problem, dtype)
    TIMER.once(job, "full")
    if provider.check is not None:
        verdict = judge(*provider.check(truth, dtype, job.result()), dtype)
        assert verdict.verified, verdict.reason
        benchmark.extra_info["verification"] = verdict.as_dict()
    benchmark.extra_info.update(provider=provider.what, shape=case.as_dict())

    mode = "step" if "step" in job.modes else "full"  # what is a step and nothing else is timed whole

    def run():
        job.execute(mode)
        TIMER.sync()

    def setup():
        job.reset()
        TIMER.sync()

    benchmark.pedantic(run, setup=setup, rounds=20 if CUDA else 5, warmup_rounds=2)
