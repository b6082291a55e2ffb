"""The options of a run, its providers, and the groups that it consists of, in their order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from . import peers, providers
from .cases import CASES, SMALL, TINY, Case, sweep
from .provider import Provider

AXES = ("N", "B", "k", "S", "d")
MAIN_MODE = {"training": "full", "decode": "full"}  # of the row of a failure; else forward


def everyone() -> list[Provider]:
    return [*providers.own(), *peers.peers()]


@dataclass(frozen=True)
class Options:
    """Of the command line, by their names there."""

    device: str = "cpu"
    quick: bool = False
    minutes: float = 20.0
    filter: str = ""
    official: Path | None = None
    threads: int = 1
    seed: int = 0
    tiny: bool = False  # shapes for tests: the same code in seconds
    sweeps: list[str] | None = None  # None: all that the device and `quick` have
    seconds: float | None = None  # of timing for each provider; None: by device
    resume: bool = False
    patience: float = 0.0  # seconds of waiting for quiet cores
    clock: str = "wall"  # or "cpu"


@dataclass(frozen=True)
class Group:
    """Providers of one operation on one case in one precision: they take turns. Slow ones have a group of their own,
    in which each takes turns with ours once more."""

    case: Case
    op: str
    dtype: str
    profiled: bool = False
    slow: bool = False

    def __str__(self):
        data = "" if self.case.data == "gaussian" else f" ({self.case.data})"
        return f"{self.op}, {self.case.name}{data}, {self.dtype}{', slow providers' if self.slow else ''}"


def plan(options: Options) -> list[Group]:
    """Groups in the order in which they are worth most, should time run out: nothing slow before the first ones are
    through, and of the others each behind what is ready."""
    first, rest = _groups(options)
    return [*first, *map(_slow, first), *(g for group in rest for g in (group, _slow(group)))]


def _slow(group: Group) -> Group:
    return replace(group, slow=True, profiled=False)


def _groups(options: Options) -> tuple[list[Group], list[Group]]:
    """Those that say most, and the others."""
    cuda, quick = options.device == "cuda", options.quick
    cases = TINY if options.tiny else CASES
    official, half = cases["open-images"], "bfloat16"
    first, rest = [], []
    if options.tiny:
        first += [Group(official, "training", "float32", True)]
        first += [Group(official, op, "float32") for op in ("select", "ceiling", "encode", "decode", "optimizer")]
        first += [Group(c, "training", "float32") for c in cases.values() if c is not official]
        first += [Group(official, "training", half)]
    elif cuda:
        batch, real = cases["batch"], replace(cases["batch"], data="real")
        first += [Group(official, "training", t, t != "tf32") for t in ("float32", half, "bfloat16 autocast", "tf32")]
        first += [Group(official, op, t) for op in ("select", "ceiling") for t in ("float32", half)]
        first += [Group(batch, op, half, op == "training") for op in ("training", "select", "ceiling")]
        first += [Group(batch, "training", t) for t in ("float32", "bfloat16 autocast")]
        first += [Group(real, "training", half, True)]
        # in the precision in which their authors' figures are, as far as that can be told
        first += [Group(cases["bionemo-21k"], "training", "tf32"), Group(cases["flash-sae"], "training", half)]
        first += [Group(cases["flexsae"], "decode", "float32"), Group(cases["bionemo-86k"], "training", "tf32")]
        first += [Group(cases["FlashSAE"], "training", "float32"), Group(cases["stress"], "training", "tf32")]
        first += [Group(batch, op, half) for op in ("decode", "encode")]
        if not quick:
            rest += [Group(batch, "training", "tf32"), Group(real, "select", half)]
            rest += [Group(case, "optimizer", "float32") for case in (batch, official)]
            rest += [Group(cases["coco"], "training", t) for t in ("float32", half)]
            large = ("giant", "openai", "sparsify", "crosscoder", "stress", "crosscoder-8", "stress-1M")
            rest += [Group(cases[name], op, half) for name in large for op in ("training", "select")]
            rest += [Group(replace(official, data="real"), "training", "float32")]
            rest += [Group(official, op, half) for op in ("decode", "encode")]
            rest += [Group(cases["giant"], "training", t) for t in ("tf32", "float32")]
    else:
        rest += [Group(official, "ceiling", "float32"), Group(official, "training", "float32", True)]
        rest += [Group(official, "select", "float32"), Group(replace(SMALL, data="real"), "training", "float32")]
    sweeps = options.sweeps or (() if quick or options.tiny else AXES)
    dtype = half if cuda else "float32"
    rest += [Group(case, "training", dtype) for axis in sweeps[:1] for case in sweep(options.device, axis)]
    if not (quick or cuda or options.tiny):
        rest.append(Group(replace(official, data="real"), "training", "float32", True))
        rest += [Group(official, op, "float32") for op in ("encode", "decode", "optimizer")]
        rest.append(Group(cases["coco"], "training", "float32"))
        rest += [Group(SMALL, "training", "float32"), Group(replace(SMALL, data="real"), "select", "float32")]
    rest += [Group(case, "training", dtype) for axis in sweeps[1:] for case in sweep(options.device, axis)]
    if not (quick or cuda or options.tiny):
        rest.append(Group(cases["open-images-32k"], "training", "float32", True))
        rest.append(Group(cases["open-images-32k-B1024"], "training", "float32"))
        rest += [Group(official, op, half) for op in ("ceiling", "training")]
    return first, rest
