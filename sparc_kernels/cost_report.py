"""What the cost model claims, its tables, and `sparc-kernels cost`. **Modelled**, see `cost_model.py`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import NamedTuple

from .cost import (
    TRITON_GEMM,
    decode_grads,
    decode_losses_and_gradients,
    even_gemm_share,
    gemm,
    mm_topk,
    select,
    select_fused,
    select_library,
    step,
    step_ops,
)
from .cost_dense import DENSE_VARIANTS, adam, dense_step, official_step, unit_norm
from .cost_model import DEFAULT_GPU, GPU, GPUS, Op, Shape, gpu_named, step_seconds, total

# --------------------------------------------------------------------------------------------------------------- claims

CASES = {
    "A": Shape(256, 8192, 64, (1024, 768, 768)),  # the official configuration
    "B": Shape(4096, 32768, 64, (1024, 768, 768)),
    "C": Shape(4096, 131072, 64, (1536, 1152, 1152)),  # DINOv2 giant with the two SigLIP so400m towers
    "D": Shape(8192, 65536, 100, (2304,) * 8),  # a crosscoder over eight layers
    "E": Shape(4096, 2**20, 32, (2688,)),
}


def select_over_gemm(s: Shape, gpu: GPU) -> float:
    """Encode + TopK, as the package does it, as a multiple of the bare library GEMM."""
    return select(s).seconds(gpu) / gemm(s).seconds(gpu)


def decode_fraction(s: Shape, gpu: GPU) -> float:
    """Decode, losses, dv and dW_dec: the time that L2 needs for the gathered bytes alone (decoder rows, and errors
    where they are read per entry), as a share of the whole time."""
    op = decode_grads(s)
    return sum(p.reuse.used for p in op.parts) / gpu.bytes_per_s("L2") / op.seconds(gpu)


def pass_fraction(s: Shape, gpu: GPU) -> float:
    """The same for the one gather pass: losses, dv and errors without the sums of dW_dec."""
    op = decode_losses_and_gradients(s)
    return sum(p.reuse.used for p in op.parts) / gpu.bytes_per_s("L2") / op.seconds(gpu)


def dense_seconds(s: Shape, gpu: GPU) -> dict[str, float]:
    """Seconds of the reference's step by variant."""
    plain = replace(s, auxk=0, dead=0, tf32=False, autocast=False, compiled=False)
    return {
        name: step_seconds(dense_step(replace(plain, **how)), gpu, graph)
        for name, (how, graph) in DENSE_VARIANTS.items()
    }


def official_seconds(s: Shape, gpu: GPU) -> float:
    """Seconds of the official step as shipped: eager, fp32, tf32 not allowed."""
    return step_seconds(official_step(replace(s, dtype="float32", tf32=False, autocast=False)), gpu, graph=False)


class Claim(NamedTuple):
    """One modelled figure, and the goal it is held against (None where there is none)."""

    what: str
    case: str
    shape: str
    value: float
    goal: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def __str__(self):
        verdict = ""
        if self.goal is not None:
            verdict = f"  {'<=' if self.at_most else '>='} {self.goal:g} {'holds' if self.holds else 'DOES NOT HOLD'}"
        return f"{self.what:<52} {self.case:<2} {self.value:>7.2f}{verdict}"


def claims(gpu: GPU | None = None) -> list[Claim]:
    """What the project promises, as modelled on one GPU (the default GPU when None), at the benchmarks' shapes.

    Case A is the official configuration, its step in a CUDA graph as the dense compiled ones are everywhere; "B8" is B
    with N 8192. Encode + TopK is the operator `select`: inputs centred already, as the GEMM's are. AuxK: a tenth dead.
    """
    gpu, found = gpu or GPUS[DEFAULT_GPU], []
    for name, s in {**CASES, "B8": replace(CASES["B"], N=8192)}.items():
        goal = None if s.B < 4096 else 1.15 if s.N >= 32768 else 1.25
        found.append(Claim("encode + TopK over the bare GEMM", name, str(s), select_over_gemm(s, gpu), goal, True))
    for name, s in CASES.items():
        found.append(Claim("gather bandwidth: losses + dv", name, str(s), pass_fraction(s, gpu)))
        found.append(Claim("gather bandwidth: losses + dv + dW_dec", name, str(s), decode_fraction(s, gpu)))
    for name, s in CASES.items():
        official = name == "A"
        dense = dense_seconds(s, gpu)
        goal, best_goal = (10, None) if official else (20, 5)
        auxiliary = replace(s, auxk=64, dead=s.N // 10)
        ours, rounded, with_auxk = (
            step_seconds(step(how), gpu, graph=official) for how in (s, replace(s, autocast=True), auxiliary)
        )
        shipped, shipped_auxk = official_seconds(s, gpu), official_seconds(auxiliary, gpu)
        fp32_parameters = (t for variant, t in dense.items() if DENSE_VARIANTS[variant][0].get("autocast", True))
        for what, value, wanted in (
            ("official step over ours in bf16", shipped / ours, goal),
            ("official step with AuxK over ours", shipped_auxk / with_auxk, goal),
            ("eager fp32 reference over ours in bf16", dense["eager fp32"] / ours, None),
            ("best dense step over ours in bf16", min(dense.values()) / ours, best_goal),
            ("best dense step over ours under autocast", min(fp32_parameters) / rounded, None),
        ):
            found.append(Claim(what, name, str(s), value, wanted))
    return found


# ------------------------------------------------------------------------------------------------------------- printing


def _row(op: Op, gpu: GPU) -> dict:
    return {
        "op": op.name, "hbm_mb": op.hbm(gpu) / 1e6, "l2_mb": op.l2 / 1e6, "gflop": op.flops / 1e9,
        "launches": op.launches, "predicted_us": 1e6 * op.seconds(gpu), "bound_by": op.bound(gpu),
    }  # fmt: skip


def summary(s: Shape, gpu: GPU) -> dict:
    """Everything `table` prints, as numbers."""
    ops = step_ops(s)
    whole = total("step", ops)
    graph, eager = (step_seconds(whole, gpu, graph) for graph in (True, False))
    dense = {"official, fp32 as shipped": official_seconds(s, gpu), **dense_seconds(s, gpu)}
    return {
        "modelled": True, "gpu": gpu.name, "shape": str(s), "rows": [_row(op, gpu) for op in [*ops, whole]],
        "apart": [_row(op, gpu) for op in (adam(s), unit_norm(s))],
        "step_us": {"CUDA graph": 1e6 * graph, "eager": 1e6 * eager},
        "dense_us": {name: 1e6 * seconds for name, seconds in dense.items()},
        "triton_launches": sum(p.launches for p in whole.parts if not p.library),
        "dense_over_ours": {name: seconds / eager for name, seconds in dense.items()},
        "dense_over_ours_in_graph": {name: seconds / graph for name, seconds in dense.items()},
        "select_over_gemm": {
            op.name: op.seconds(gpu) / gemm(s).seconds(gpu) for op in (select_fused(s), select_library(s), mm_topk(s))
        },
        "even_gemm_share": even_gemm_share(s, gpu), "gather_fraction": pass_fraction(s, gpu),
        "decode_fraction": decode_fraction(s, gpu),
    }  # fmt: skip


def table(s: Shape, gpu: GPU) -> str:
    """The modelled step as text: op by op, then against the dense reference."""
    found = summary(s, gpu)
    lines = [
        f"modelled, nothing measured: {s} on {gpu.name}",
        f"{'op':<22} {'HBM MB':>10} {'L2 MB':>10} {'GFLOP':>10} {'launches':>8} {'predicted us':>12}  bound by",
    ]
    lines += [
        f"{r['op']:<22} {r['hbm_mb']:>10.1f} {r['l2_mb']:>10.1f} {r['gflop']:>10.1f} {r['launches']:>8} "
        f"{r['predicted_us']:>12.1f}  {r['bound_by']}"
        for r in [*found["rows"], *found["apart"]]
    ]
    times = found["step_us"]
    launches = gpu.launch_us * found["rows"][-1]["launches"]
    lines.append(
        f"step {times['eager']:.0f} us, in a CUDA graph {times['CUDA graph']:.0f} us, of it launches {launches:.0f} us "
        f"({found['triton_launches']} of Triton; the last two rows are apart)"
    )
    ratios = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in found["select_over_gemm"].items())
    lines.append(f"over the bare GEMM: {ratios}")
    lines.append(
        f"fused selection wins where its GEMM reaches {found['even_gemm_share']:.2f} of the library's rate "
        f"(assumed: {TRITON_GEMM:g})"
    )
    lines.append(
        f"share of the gather bandwidth: losses + dv {found['gather_fraction']:.2f}, with dW_dec "
        f"{found['decode_fraction']:.2f}"
    )
    for name, us in found["dense_us"].items():
        ratio, in_graph = found["dense_over_ours"][name], found["dense_over_ours_in_graph"][name]
        lines.append(f"dense {name:<28} {us:>10.0f} us, x{ratio:.1f} ours, x{in_graph:.1f} ours in a graph")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- subcommand


def parse_shape(text: str) -> Shape:
    """B,N,k,d,S[,PRECISION] as the audit reads it: S streams of width d, or their widths as 1024/768/768."""
    from .tools.trace import parse_shape

    return of_trace(parse_shape(text))


def of_trace(shape) -> Shape:
    """The shape of a traced or audited step (`_trace.Shape`)."""
    return Shape(shape.B, shape.N, shape.k, shape.widths, shape.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="B,N,k,d,S[,PRECISION]",
        help="PRECISION bf16 (default), fp16 or fp32; repeatable; default: the five of the benchmarks, and the goals",
    )
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(GPUS)} (default {DEFAULT_GPU})")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def run(args: argparse.Namespace) -> int:
    try:
        gpu = gpu_named(args.gpu)
        shapes = [parse_shape(text) for text in args.shape] if args.shape else list(CASES.values())
    except ValueError as error:
        print(f"sparc-kernels cost: error: --{str(error).removeprefix('--')}", file=sys.stderr)
        return 2
    from .cost_optim import table as optimizers  # which imports this module

    print("\n\n".join(f"{table(s, gpu)}\n\n{optimizers(s, gpu)}" for s in shapes))
    goals = [] if args.shape else claims(gpu)
    if goals:
        print(f"\nmodelled goals on {gpu.name}", *goals, sep="\n")
    if args.json:
        data = {
            "shapes": [summary(s, gpu) for s in shapes], "claims": [{**c._asdict(), "holds": c.holds} for c in goals]
        }  # fmt: skip
        with open(args.json, "w") as file:
            json.dump(data, file, indent=1)
    return 0
