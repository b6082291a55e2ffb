"""What a run is asked for, and which groups it consists of, in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .cases import CASES, SMALL, TINY, Case, sweep

AXES = ("N", "B", "k", "S", "d")


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    quick: bool = False
    minutes: float = 20.0
    filter: str = ""
    official: Path | None = None
    threads: int = 1
    seed: int = 0
    tiny: bool = False  # shapes for tests: the same code in seconds
    sweeps: tuple[str, ...] = ()
    seconds: float | None = None  # of timing for each provider; None: by device
    resume: bool = False
    patience: float = 0.0  # seconds of waiting for quiet cores
    clock: str = "wall"  # or "cpu"


@dataclass(frozen=True)
class Group:
    """Providers of one operation on one case in one precision: they take turns."""

    case: Case
    op: str
    dtype: str
    profiled: bool = False

    def __str__(self):
        data = "" if self.case.data == "gaussian" else f" ({self.case.data})"
        return f"{self.op}, {self.case.name}{data}, {self.dtype}"


def plan(options: Options) -> list[Group]:
    """Groups in the order in which they are worth most, should time run out."""
    cuda, quick = options.device == "cuda", options.quick
    cases = TINY if options.tiny else CASES
    half = "bfloat16"
    if options.tiny:
        case = cases["open-images"]
        found = [Group(case, "ceiling", "float32"), Group(case, "training", "float32", True)]
        found += [Group(case, op, "float32") for op in ("select", "encode", "decode", "optimizer")]
        found += [Group(c, "training", "float32") for name, c in cases.items() if c is not case]
        found.append(Group(case, "training", half))
    elif cuda:
        batch, official = cases["batch"], cases["open-images"]
        found = [Group(batch, "ceiling", half), Group(batch, "training", half, True)]
        found += [Group(official, "training", t) for t in ("float32", half, "bfloat16 autocast", "tf32")]
        found += [Group(batch, "training", t) for t in ("bfloat16 autocast", "tf32", "float32")]
        found += [Group(batch, op, half) for op in ("select", "decode", "encode")]
        found.append(Group(replace(batch, data="real"), "training", half, True))
        if not quick:
            found.append(Group(replace(batch, data="real"), "select", half))
            found += [Group(batch, "optimizer", "float32"), Group(official, "optimizer", "float32")]
            found += [Group(cases["coco"], "training", t) for t in ("float32", half)]
            large = ("giant", "openai", "sparsify", "crosscoder", "stress", "crosscoder-8", "stress-1M")
            found += [Group(cases[name], op, half) for name in large for op in ("training", "select")]
            found.append(Group(replace(official, data="real"), "training", "float32"))
            found += [Group(official, op, half) for op in ("select", "decode", "encode")]
            found += [Group(cases["giant"], "training", t) for t in ("tf32", "float32")]
    else:
        official = cases["open-images"]
        found = [Group(official, "ceiling", "float32"), Group(official, "training", "float32", True)]
        found += [Group(official, "select", "float32"), Group(replace(SMALL, data="real"), "training", "float32")]
    sweeps = options.sweeps or (() if quick or options.tiny else AXES)
    dtype = half if cuda else "float32"
    found += [Group(case, "training", dtype) for axis in sweeps[:1] for case in sweep(options.device, axis)]
    if not (quick or cuda or options.tiny):
        found.append(Group(replace(official, data="real"), "training", "float32", True))
        found += [Group(official, op, "float32") for op in ("encode", "decode", "optimizer")]
        found.append(Group(cases["coco"], "training", "float32"))
        found += [Group(SMALL, "training", "float32"), Group(replace(SMALL, data="real"), "select", "float32")]
    found += [Group(case, "training", dtype) for axis in sweeps[1:] for case in sweep(options.device, axis)]
    if not (quick or cuda or options.tiny):
        found.append(Group(cases["open-images-32k"], "training", "float32", True))
        found.append(Group(cases["open-images-32k-B1024"], "training", "float32"))
        found += [Group(official, op, half) for op in ("ceiling", "training")]
    return found
