"""List the kernels that `verify` launches, without a GPU: its checks run on meta tensors with recorders for kernels.

The checks themselves run, so the list is complete. Values that a check reads back are replaced by ones that let it
continue, and nothing is judged.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map_only

from ..trace import InsideOperators, Launch, as_on_gpu, autocast_on_meta
from .judge import Case, Check, SelectionJudge
from .suite import CHECKS

META = torch.device("meta")


def launches_of(case: Case, dtype: torch.dtype, arch: int, name: str | None = None, tf32: bool = False) -> list[Launch]:
    """Return the distinct launches of the checks of one case in one dtype.

    Args:
        case: one of `verify`'s.
        dtype: one of the case's.
        arch: as `launch.device.capability` gives it.
        name: of one check; None: all of the case.
        tf32: whether torch's float32 matmul precision allows tf32.
    """
    recorded: list[Launch] = []
    problems: dict = {}
    with as_on_gpu(arch, tf32, recorded), autocast_on_meta(), Answers():
        for op, word, fn in CHECKS:
            if word in case.ops.split() and name in (None, op):
                fn(_Dry(op, case, dtype, META, "auto", problems=problems))
    return list(dict.fromkeys(recorded))


class _Dry(Check):
    """A check whose judgements do nothing."""

    def seeded(self, text):
        return None

    def compare(self, *args, **named):
        return None

    exact = add = compare

    def selection_judge(self):
        return _Unjudged(self.case.N)


class _Unjudged(SelectionJudge):
    """A judge of selections that judges none."""

    def judge(self, *args, **named):
        return None

    report = judge


class Answers(InsideOperators):
    """Run the package's operators by their launchers, and substitute results that depend on data."""

    def dispatch(self, func, args, kwargs):
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.is_meta:
            name = func._schema.name
            if name == "aten::_local_scalar_dense":
                return first.dtype == torch.bool if not first.is_floating_point() else 0.0
            if name == "aten::equal":
                return True
            if name == "aten::nonzero":
                return first.new_empty(first.shape[0] if first.dim() else 1, max(first.dim(), 1), dtype=torch.int64)
            if name == "aten::_unique2":
                return first.new_empty(first.numel()), torch.empty_like(first), first.new_empty(0)
            if name == "aten::index":  # a mask selects everything
                args = tree_map_only(torch.Tensor, _as_places, args)
        return func(*args, **kwargs)


def _as_places(x):
    return x.new_empty(x.numel(), dtype=torch.int64) if x.dtype == torch.bool else x
