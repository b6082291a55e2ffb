"""Modelled claims, tables, and `sparc-kernels cost`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import NamedTuple

from ..shape import Shape, parse_shape
from . import dense, ours
from .gpus import DEFAULT_GPU, GPU, GPUS, gpu_named
from .host import FITTED, host_seconds, step_seconds
from .parts import Op, total
from .scaling import SIZES, mesh_of, scaling_report

CASES = {
    "A": Shape(256, 8192, 64, (1024, 768, 768)),  # the official configuration
    "B": Shape(4096, 32768, 64, (1024, 768, 768)),
    "C": Shape(4096, 131072, 64, (1536, 1152, 1152)),  # DINOv2 giant with the two SigLIP so400m towers
    "D": Shape(8192, 65536, 100, (2304,) * 8),  # a crosscoder over eight layers
    "E": Shape(4096, 2**20, 32, (2688,)),
}
PASS, DECODE = ("losses + dv",), ("losses + dv", "dW_dec")  # ops whose share of the gather bandwidth is given


def over_gemm(op: Op, s: Shape, gpu: GPU) -> float:
    """Return the time of a variant of selection as a multiple of the bare library GEMM's."""
    return op.seconds(gpu) / ours.gemm(s).seconds(gpu)


def gather_share(s: Shape, gpu: GPU, names: tuple[str, ...]) -> float:
    """Return the share of the named ops' time that L2 needs for what they gather: decoder rows, errors of entries."""
    op = total("", [ours.ops_of(s)[name] for name in names])
    return sum(p.reuse.used for p in op.parts) / gpu.bytes_per_s("L2") / op.seconds(gpu)


def dense_seconds(s: Shape, gpu: GPU) -> dict[str, float]:
    """Return the seconds of the dense reference's step by variant of DENSE_VARIANTS."""
    plain = replace(s, auxk=0, dead=0, tf32=False, autocast=False, compiled=False)
    return {
        name: step_seconds(dense.dense_step(replace(plain, **how)), gpu, graph)
        for name, (how, graph) in dense.DENSE_VARIANTS.items()
    }


def official_seconds(s: Shape, gpu: GPU) -> float:
    """Return the seconds of the official step as shipped: eager, fp32 without tf32."""
    return step_seconds(dense.official_step(dense.as_shipped(s)), gpu, graph=False)


# --------------------------------------------------------------------------------------------------------------- claims


class Claim(NamedTuple):
    """One modelled figure and its goal (None: no goal); `at_most`: the goal is an upper bound."""

    what: str
    case: str
    shape: str
    value: float
    goal: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the figure meets its goal; None without one."""
        return None if self.goal is None else (self.value <= self.goal if self.at_most else self.value >= self.goal)

    def __str__(self):
        text = f"{self.what:<52} {self.case:<2} {self.value:>7.2f}"
        if self.goal is None:
            return text
        return f"{text}  {'<=' if self.at_most else '>='} {self.goal:g} {'holds' if self.holds else 'DOES NOT HOLD'}"


def claims(gpu: GPU = GPUS[DEFAULT_GPU]) -> list[Claim]:
    """Model the project's goals on one GPU at the benchmarks' shapes.

    Case A is the official configuration, its step in a CUDA graph like the compiled dense ones in every case; "B8" is B
    with N 8192. Encode + TopK is the operator `select` on centred inputs, as for the GEMM. AuxK: a tenth of the latents
    is dead.
    """
    results, cases = [], {name: replace(s, arch=gpu.arch) for name, s in CASES.items()}
    for name, s in {**cases, "B8": replace(cases["B"], N=8192)}.items():
        goal, value = None if s.B < 4096 else 1.15 if s.N >= 32768 else 1.25, over_gemm(ours.select(s), s, gpu)
        results.append(Claim("encode + TopK over the bare GEMM", name, str(s), value, goal, True))
    for name, s in cases.items():
        for ops in (PASS, DECODE):
            what = f"gather bandwidth: {' + '.join(ops)}"
            results.append(Claim(what, name, str(s), gather_share(s, gpu, ops)))
    for name, s in cases.items():
        official, baselines, with_auxk = name == "A", dense_seconds(s, gpu), replace(s, auxk=64, dead=s.N // 10)
        goal, best_goal = (10, None) if official else (20, 5)
        step, rounded, auxiliary = (
            step_seconds(ours.step(how), gpu, graph=official) for how in (s, replace(s, autocast=True), with_auxk)
        )
        in_fp32 = min(t for variant, t in baselines.items() if dense.DENSE_VARIANTS[variant][0].get("autocast", True))
        for what, value, wanted in (
            ("official step over ours in bf16", official_seconds(s, gpu) / step, goal),
            ("official step with AuxK over ours", official_seconds(with_auxk, gpu) / auxiliary, goal),
            ("eager fp32 reference over ours in bf16", baselines["eager fp32"] / step, None),
            ("best dense step over ours in bf16", min(baselines.values()) / step, best_goal),
            ("best dense step over ours under autocast", in_fp32 / rounded, None),
        ):
            results.append(Claim(what, name, str(s), value, wanted))
    return results


# --------------------------------------------------------------------------------------------------------------- tables


def _row(op: Op, gpu: GPU) -> dict:
    return {
        "op": op.name, "hbm_mb": op.hbm(gpu) / 1e6, "l2_mb": op.l2 / 1e6, "gflop": op.flops / 1e9,
        "launches": op.launches, "predicted_us": 1e6 * op.seconds(gpu), "bound_by": op.bound(gpu),
    }  # fmt: skip


def summary(s: Shape, gpu: GPU) -> dict:
    """Return the numbers that `table` prints."""
    s = replace(s, arch=gpu.arch)
    ops, whole = ours.ops_of(s).values(), ours.step(s)
    graph, eager = (step_seconds(whole, gpu, graph) for graph in (True, False))
    baselines = {"official, fp32 as shipped": official_seconds(s, gpu), **dense_seconds(s, gpu)}
    selections = ours.select_fused(s), ours.select_library(s), ours.mm_topk(s)
    return {
        "modelled": True, "gpu": gpu.name, "shape": str(s),
        "rows": [_row(op, gpu) for op in (*ops, whole)],
        "apart": [_row(op, gpu) for op in (dense.adam(s), dense.unit_norm(s))],
        "step_us": {"CUDA graph": 1e6 * graph, "eager": 1e6 * eager, "host": 1e6 * host_seconds(whole)},
        "host_fitted": FITTED,
        "dense_us": {name: 1e6 * seconds for name, seconds in baselines.items()},
        "triton_launches": sum(p.launches for p in whole.parts if not p.library),
        "dense_over_ours": {name: seconds / eager for name, seconds in baselines.items()},
        "dense_over_ours_in_graph": {name: seconds / graph for name, seconds in baselines.items()},
        "select_over_gemm": {op.name: over_gemm(op, s, gpu) for op in selections},
        "even_gemm_share": ours.even_gemm_share(s, gpu), "gather_fraction": gather_share(s, gpu, PASS),
        "decode_fraction": gather_share(s, gpu, DECODE),
    }  # fmt: skip


def table(s: Shape, gpu: GPU) -> str:
    """Format the modelled step: op by op, then against the dense reference."""
    model = summary(s, gpu)
    times = model["step_us"]
    launches = gpu.launch_us * model["rows"][-1]["launches"]
    lines = [
        f"modelled, nothing measured: {s} on {gpu.name}",
        f"{'op':<22} {'HBM MB':>10} {'L2 MB':>10} {'GFLOP':>10} {'launches':>8} {'predicted us':>12}  bound by",
    ]
    lines += [
        f"{r['op']:<22} {r['hbm_mb']:>10.1f} {r['l2_mb']:>10.1f} {r['gflop']:>10.1f} {r['launches']:>8} "
        f"{r['predicted_us']:>12.1f}  {r['bound_by']}"
        for r in model["rows"] + model["apart"]
    ]
    lines += [
        f"step {times['eager']:.0f} us, of the host {times['host']:.0f} ({model['host_fitted']})",
        f"in a CUDA graph {times['CUDA graph']:.0f} us, of it launches "
        f"{launches:.0f} us ({model['triton_launches']} of Triton; the last two rows are apart)",
        "over the bare GEMM: " + ", ".join(f"{name} x{ratio:.2f}" for name, ratio in model["select_over_gemm"].items()),
        f"fused selection wins where its GEMM reaches {model['even_gemm_share']:.2f} of the library's rate "
        f"(assumed: {ours.TRITON_GEMM:g})",
        f"share of the gather bandwidth: losses + dv {model['gather_fraction']:.2f}, with dW_dec "
        f"{model['decode_fraction']:.2f}",
    ]
    lines += [
        f"dense {name:<28} {us:>10.0f} us, x{model['dense_over_ours'][name]:.1f} ours, "
        f"x{model['dense_over_ours_in_graph'][name]:.1f} ours in a graph"
        for name, us in model["dense_us"].items()
    ]
    return "\n".join(lines)


def bytes_per_parameter(op: Op, s: Shape) -> float:
    """Return an optimizer's bytes a parameter: weights, gradients and moments.

    Half precision copies and data of the batch do not count.
    """
    if any(p.reuse.used for p in op.parts):  # computed from lists, without gradients
        return float(2 * ours.parameter_bytes(s) + 4 * ours.MOMENT)
    return sum(p.streamed for p in op.parts if p.name != "scalars") / ours.weights(s)


def optimizer_table(s: Shape, gpu: GPU) -> str:
    """Format bytes a parameter and microseconds of each optimizer, and whole steps beside the official loop."""
    s = replace(s, arch=gpu.arch)
    official = step_seconds(dense.official_loop(s), gpu, graph=False)
    least, direct, adam = ours.roofline_seconds(s, gpu), ours.step(s, direct=True), ours.sparc_adam(s)
    update = ours.ops_of(s, direct=True)["update without gradients"]
    lines = [
        f"modelled, nothing measured: optimizer of {s}{', autocast' if s.autocast else ''} on {gpu.name}",
        f"{'optimizer':<28} {'B / parameter':>13} {'launches':>8} {'predicted us':>12}",
    ]
    for op in (update, adam, dense.fused_adam(s), dense.official_optimizer(s)):
        moved, us = bytes_per_parameter(op, s), 1e6 * op.seconds(gpu)
        lines.append(f"{op.name:<28} {moved:>13.1f} {op.launches:>8} {us:>12.1f}")
    lines.append(f"{'whole step':<28} {'eager us':>13} {'graph us':>8}   official loop over it: eager, in a graph")
    for op in (direct, total("step + SparcAdam", [ours.step(s), adam])):
        eager, graph = (step_seconds(op, gpu, how) for how in (False, True))
        times = f"{1e6 * eager:>13.1f} {1e6 * graph:>8.1f}"
        lines.append(f"{op.name:<28} {times} {official / eager:>21.1f} {official / graph:>12.1f}")
    lines.append(
        f"official loop {1e6 * official:.1f} us; roofline {1e6 * least:.1f} us, "
        f"training_step {step_seconds(direct, gpu, True) / least:.2f} times it"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- subcommand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--shape", action="append", metavar="B,N,k,d,S[,PRECISION]",
        help="PRECISION bf16 (default), fp16 or fp32; repeatable; default: the five of the benchmarks, and the goals",
    )  # fmt: skip
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(GPUS)} (default {DEFAULT_GPU})")
    parser.add_argument(
        "--gpus", type=_numbers, metavar="P[,P...]",
        help="model `training_step` on that many GPUs instead: memory of a rank, bytes sent, time; half precision of "
        "--shape then keeps float32 parameters; with one shape and one P also what is held and sent, item by item",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="T", help="GPUs that share the latents (with --gpus; default: fastest)"
    )
    parser.add_argument("--auxk", type=int, metavar="A", help="AuxK's latents a row, a tenth dead (with --gpus)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def _numbers(text: str) -> list[int]:
    """Parse "1,8,64"."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive integers such as 1,8,64, got {text!r}")
    return [int(part) for part in parts]


def _scaling(args: argparse.Namespace, gpu: GPU, shapes: list[Shape]) -> list[dict]:
    """Print the tables of several GPUs and return their numbers."""
    shapes = [replace(s, autocast=s.dtype != "float32") for s in shapes]
    if args.auxk:
        shapes = [replace(s, auxk=args.auxk, dead=s.N // 10) for s in shapes]
    if args.tensor_parallel is not None:
        for p in args.gpus:
            mesh_of(p, args.tensor_parallel)
    text, rows = scaling_report(shapes, args.gpus, args.tensor_parallel, gpu)
    print(text)
    return rows


def run(args: argparse.Namespace) -> int:
    """Print the tables and, without --shape, the goals.

    Args:
        args: as `add_arguments` declares them.

    Returns:
        Exit code: 0; 2 for invalid arguments.
    """
    try:
        gpu = gpu_named(args.gpu)
        shapes = [parse_shape(text) for text in args.shape] if args.shape else list(CASES.values())
        if args.gpus:
            rows = _scaling(args, gpu, shapes if args.shape else list(SIZES))
    except ValueError as error:
        print(f"sparc-kernels cost: error: --{str(error).removeprefix('--')}", file=sys.stderr)
        return 2
    if args.gpus:
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"scaling": rows}, file, indent=1)
        return 0
    print("\n\n".join(f"{table(s, gpu)}\n\n{optimizer_table(s, gpu)}" for s in shapes))
    goals = [] if args.shape else claims(gpu)
    if goals:
        print(f"\nmodelled goals on {gpu.name}", *goals, sep="\n")
    if args.json:
        rows = [{**c._asdict(), "holds": c.holds} for c in goals]
        with open(args.json, "w") as file:
            json.dump({"shapes": [summary(s, gpu) for s in shapes], "claims": rows}, file, indent=1)
    return 0
