"""Several problems in one launch give the bits of one launch each."""

import pytest
import torch
from conftest import DEVICE, KERNEL_DTYPE

from sparc_kernels.core.numerics import acc_dtype
from sparc_kernels.launch.device import cdiv
from sparc_kernels.launch.gather import GatherConfig
from sparc_kernels.ops import gather
from sparc_kernels.ops.gather import launch_gathers
from sparc_kernels.ops.latent_reduce import latent_reduce_
from sparc_kernels.ops.selection import select, select_each

OUTPUTS = ("err_outs", "error_outs", "dbias_rows", "h_outs")


def gathers(T, S, B, k, n, widths, dtype, own):
    """Arguments of `launch_gathers`, by name; `own`: indices, values, count and list positions for each problem."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    lead = (T,) if own else ()
    order = torch.stack([torch.randperm(B * k, generator=g) for _ in range(T)]).int().to(DEVICE)
    return dict(
        indices=torch.randint(0, n, (*lead, B, k), generator=g).to(DEVICE),
        values=randn(*lead, S, B, k).to(acc_dtype(dtype)), ws=[randn(n, d) for d in widths],
        biases=[randn(d) for d in widths], xs=[randn(B, d) for d in widths],
        count=torch.tensor([k - t for t in range(T)], dtype=torch.int32, device=DEVICE) if own else None,
        coef=torch.rand(T, S, B, generator=g).to(DEVICE, acc_dtype(dtype)), list_position=order if own else order[0],
        error_sources=[t % S for t in range(T)], sq_err=True, dot=True,
    )  # fmt: skip


def outputs(S, B, k, widths, dtype):
    rows = (S, B), (B,), (B,), (B * k,)
    acc = acc_dtype(dtype)
    return {
        name: [torch.zeros(*lead, d, dtype=acc if name == "dbias_rows" else dtype, device=DEVICE) for d in widths]
        for name, lead in zip(OUTPUTS, rows, strict=True)
    }


def alone(t, own, arguments):
    """The arguments of problem t."""
    part = slice(t, t + 1)
    whole = {"sq_err", "dot"} | (set() if own else {"indices", "values", "count", "list_position"})
    return {name: value if name in whole or value is None else value[part] for name, value in arguments.items()}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [KERNEL_DTYPE, torch.bfloat16])
@pytest.mark.parametrize("tiles", [1, 2])
def test_gathers_of_several_problems(dtype, own, tiles, monkeypatch):
    T, S, B, k, widths = 3, 2, 2, 5, (40, 8, 33)
    monkeypatch.setattr(gather, "gather_config", lambda *_: GatherConfig(16, 16, tiles, 4, 1))
    arguments = gathers(T, S, B, k, 29, widths, dtype, own)
    together = outputs(S, B, k, widths, dtype)
    sq, dots, slabs = launch_gathers(**arguments, **together)
    assert slabs == tuple(cdiv(cdiv(d, 16), tiles) for d in widths)
    first = 0
    for t in range(T):
        apart = outputs(S, B, k, widths[t : t + 1], dtype)
        sq_t, dots_t, _ = launch_gathers(**alone(t, own, arguments), **apart)
        last = first + slabs[t]
        assert torch.equal(sq[first:last], sq_t) and torch.equal(dots[first:last], dots_t)
        assert all(torch.equal(together[name][t], apart[name][0]) for name in OUTPUTS)
        first = last


def test_gathers_of_too_many_problems_or_rows_run_apart(monkeypatch):
    S, B, k, widths = 2, 2, 5, (9,) * 9
    arguments = gathers(9, S, B, k, 29, widths, KERNEL_DTYPE, False)
    together = outputs(S, B, k, widths, KERNEL_DTYPE)
    sq, dots, slabs = launch_gathers(**arguments, **together)
    assert slabs == (1,) * 9
    del arguments["list_position"]
    monkeypatch.setattr(gather, "gather_chunk", lambda *_: 4)
    chunked = {name: out for name, out in outputs(S, B, k, widths, KERNEL_DTYPE).items() if name != "h_outs"}
    sq_chunked, dots_chunked, slabs = launch_gathers(**arguments, **chunked)
    assert slabs == (1,) * 9
    torch.testing.assert_close(sq_chunked, sq)
    torch.testing.assert_close(dots_chunked, dots)
    for name, out in chunked.items():
        torch.testing.assert_close(out, together[name])


@pytest.mark.parametrize("own, add", [(False, True), (True, False)])
def test_sums_of_several_problems(impl, own, add):
    from sparc_kernels.ops.inverse_index import inverse_index_op

    T, S, rows, k, n, widths = 3, 2, 6, 4, 5, (20, 7, 9)
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, KERNEL_DTYPE)

    ids = torch.randint(0, n, (T if own else 1, rows, k), generator=g).to(DEVICE)
    inverse = inverse_index_op(ids, len(ids), n, None, impl)
    inverse = inverse if own else [part[0] for part in inverse]
    lead = (T,) if own else ()
    coef, gate, scale = randn(*lead, S, rows, k), randn(*lead, S, rows, k), randn(T, S, rows)
    mats = [randn(S, rows, d) for d in widths]
    start = [randn(n, d) for d in widths]
    outs, sums = [x.clone() for x in start], [x[:, 0].clone() for x in start]
    latent_reduce_(outs, sums, *inverse, coef, scale, gate, mats, k, add, impl)
    for t in range(T):
        out, total = start[t].clone(), start[t][:, 0].clone()
        lists = [part[t] if own else part for part in inverse]
        c, gates = (x[t] if own else x for x in (coef, gate))
        latent_reduce_([out], [total], *lists, c, scale[t : t + 1], gates, [mats[t]], k, add, impl)
        assert torch.equal(outs[t], out) and torch.equal(sums[t], total)


@pytest.mark.parametrize("dead", [False, True])
def test_selection_in_each_stream(impl, dead):
    B, n, k, widths = 5, 40, 5, (20, 13, 7)
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, KERNEL_DTYPE)  # noqa: E731
    xs, ws, cs = [randn(B, d) for d in widths], [randn(n, d) for d in widths], [randn(n) for _ in widths]
    ids = count = None
    if dead:
        ids = torch.stack([torch.randperm(n, generator=g) for _ in widths]).int().to(DEVICE)
        count = torch.tensor([0, 3, 31], dtype=torch.int32, device=DEVICE)
    got = select_each(xs, ws, cs, k, ids, count, impl)
    for s in range(len(widths)):
        some = (ids[s], count[s]) if dead else (None, None)
        assert torch.equal(got[s], select(xs[s : s + 1], ws[s : s + 1], cs[s : s + 1], k, *some, impl))
