"""The optimizer's cost model: bytes by hand, launches against the traced step, the goals as computed."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from sparc_kernels import cost_model, cost_optim, cost_report
from sparc_kernels.launch.adam import adam_rows
from sparc_kernels.tools.trace import Shape, trace

H200 = cost_model.GPUS["H200"]
OFFICIAL = replace(cost_report.CASES["A"], auxk=64, dead=819)
LARGE = cost_model.Shape(4096, 65536, 64, (1024, 768, 768), auxk=64, dead=6553)
TINY = cost_model.Shape(2, 8, 2, (4, 2), "float32")  # 96 weights


def test_bytes_by_hand():
    moved = 28 * (96 + 2 * 8 + 6)  # weights, latent biases, pre-biases
    assert cost_optim.sparc_adam(TINY).l2 == moved + 4 * 2 * 28
    # by operator 3 + 2 + 4 + 2 + 2 + 2 + 4 numbers of Adam; 8 of the helpers for decoders
    assert cost_optim.official_optimizer(TINY).l2 == 4 * 19 * 96 + 4 * 8 * 48
    assert cost_optim.fused_adam(TINY).l2 == 28 * 96 + 32 * 48
    update = cost_optim.direct_update(TINY)
    adam_rows_programs = -(-8 // adam_rows(8))
    rows = (2 + 1) * 4 * 6 * 4  # of 4 entries: 2 errors and one x, 6 columns, float32
    assert sum(p.reuse.used for p in update.parts) == rows
    lists = 2 * (4 * (4 + 16) + 4 * 8) + 2 * (4 * 12 + 4 * 8)
    lean = 4 * adam_rows_programs * 6  # a partial sum of each program
    own = [p for p in update.parts if p.name == "weights and moments"]
    assert sum(p.streamed for p in own) == 24 * (96 + 16) + lists + lean


def test_bytes_of_a_parameter():
    """What the step without gradients must show: at most 24, beside SparcAdam's 28 and torch's."""
    for s in (replace(OFFICIAL, autocast=True), replace(LARGE, autocast=True), replace(LARGE, dtype="float32")):
        of = {f: cost_optim.bytes_per_parameter(getattr(cost_optim, f)(s), s) for f in FORMS}
        assert of["direct_update"] == 24 and of["fused_adam"] == 44 and of["official_optimizer"] == 92
        assert of["sparc_adam"] == pytest.approx(28, rel=2e-3)  # biases are moved too
    assert cost_optim.bytes_per_parameter(cost_optim.direct_update(LARGE), LARGE) == 20  # bfloat16 weights


FORMS = ("direct_update", "sparc_adam", "fused_adam", "official_optimizer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("auxk", [0, 16])
def test_launches_are_those_of_the_traced_step(dtype, auxk):
    for widths in ((64, 48), (64, 48, 32), (64,)):
        shape = Shape(256, 2048, 16, widths, len(widths), dtype)
        s = replace(cost_report.of_trace(shape), auxk=auxk, dead=300 if auxk else 0)
        for op, update in ((cost_optim.direct_step(s), "direct"), (cost_optim.dense_gradient_step(s), "dense")):
            modelled = sum(p.launches for p in op.parts if not p.library)
            assert modelled == len(trace(shape, auxk=auxk or False, update=update).launches), (widths, update)


def test_a_shadow_takes_the_place_of_casts():
    """Traced: with float32 parameters and a bfloat16 shadow the step launches what the bfloat16 step does, and makes no
    copy of a matrix besides. Modelled: the update writes 2 bytes a parameter more."""
    shape = Shape(256, 2048, 16, (64, 48), 2, "float32")
    step = trace(shape, update="direct", shadow=torch.bfloat16)
    half = trace(replace(shape, dtype="bfloat16"), update="direct")
    assert [x.kernel for x in step.launches] == [x.kernel for x in half.launches]
    assert step.peak_bytes < half.peak_bytes + 2048 * 48 * 2, "a copy of a matrix"
    s = replace(LARGE, autocast=True)
    plain, rounded = (
        sum(p.streamed for p in cost_optim.direct_update(x).parts) for x in (replace(s, autocast=False), s)
    )
    assert rounded - plain == pytest.approx((8 - 4 + 2) * cost_optim.weights(s), rel=1e-3)


def ratios(s):
    official = cost_model.step_seconds(cost_optim.official_loop(s), H200, graph=False)
    ours = cost_model.step_seconds(cost_optim.direct_step(s), H200, graph=True)
    return official / ours, ours / cost_optim.roofline_seconds(s, H200)


def test_goals_as_modelled():
    """Whole steps with AuxK, in a CUDA graph, on an H200, over the official loop as shipped."""
    speed, _ = ratios(OFFICIAL)
    # the goal of 20 is not met: launches are a third of the step, and the official loop's waits are not counted
    assert 10 < speed < 20
    speed, over = ratios(LARGE)
    assert speed > 30 and over < 1.5
    assert ratios(replace(LARGE, auxk=0, dead=0))[1] < 1.5
    for s in (OFFICIAL, LARGE):
        assert cost_optim.direct_step(s).seconds(H200) < cost_optim.dense_gradient_step(s).seconds(H200)


def test_table_says_that_it_is_modelled():
    text = cost_optim.table(LARGE, H200)
    assert text.startswith("modelled, nothing measured") and "update without gradients" in text
