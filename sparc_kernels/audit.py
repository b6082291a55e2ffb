"""`sparc-kernels audit`: what the compiler makes of every kernel, for GPUs that are not here.

The launchers run on meta tensors of the real shapes with their kernels replaced by recorders, so what is compiled is
what would be launched: same settings, same specialisation of every argument. Needs only the Triton wheel (ptxas and
cuobjdump travel inside it). Compiles in worker processes, where TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product

# Shared memory that one block may use, bytes (CUDA programming guide, technical specifications by compute capability).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DEFAULT_ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Shape:
    B: int
    N: int
    k: int
    d: int
    S: int
    dtype: str  # a torch dtype's name


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: everything the compiler sees."""

    kernel: str  # module:function
    signature: tuple
    constexprs: tuple
    divisible: tuple
    num_warps: int
    num_stages: int


@dataclass
class Compiled:
    arch: int
    launch: Launch
    shape: Shape  # the first shape that launches it
    registers: int = 0
    spill_bytes: int = 0
    shared: int = 0
    instructions: int = 0
    matrix: str = "-"  # wgmma, tcgen05, mma or fma
    load_bits: int = 0  # widest global load
    error: str = ""

    @property
    def fault(self) -> str:
        if self.error:
            return self.error
        if self.spill_bytes:
            return f"spills {self.spill_bytes} B"
        limit = SHARED_LIMIT[self.arch]
        return f"shared memory {self.shared} B > {limit} B" if self.shared > limit else ""


GRID = [
    Shape(B, N, k, d, S, dtype)
    for N, k, d, (B, S, dtype) in product(
        (8192, 32768, 131072, 1048576),
        (32, 64, 128, 256, 512),
        (512, 1024, 2304, 4096),
        (
            (4096, 3, "bfloat16"),
            (4096, 3, "float16"),
            (256, 3, "bfloat16"),
            (4096, 1, "bfloat16"),
            (4096, 8, "bfloat16"),
            (4096, 3, "float32"),
        ),
    )
]
QUICK = [
    Shape(4096, 32768, 64, 768, 2, "float16"),
    Shape(256, 2048, 16, 33, 1, "bfloat16"),  # a width that no wide load fits
    Shape(1, 8192, 1, 64, 1, "float32"),  # sizes of 1 are constants to the JIT
    Shape(4096, 32768, 64, 1024, 3, "bfloat16"),
    Shape(256, 8192, 64, 768, 3, "float32"),
    Shape(4096, 1048576, 512, 4096, 8, "bfloat16"),
    Shape(4096, 1048576, 512, 4096, 3, "float32"),
]


class _Recorder:
    """Stands in for a kernel in its launcher's module and notes what it is launched with."""

    def __init__(self, name, kernel, found):
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, num_warps=4, num_stages=3, **constexprs):
        signature, constants, divisible = {}, {}, []
        names = self.kernel.arg_names
        for i, (param, arg) in enumerate(zip(self.kernel.params, args, strict=False)):
            if param.do_not_specialize:
                signature[param.name] = "i32"
            else:
                signature[param.name] = _specialise(arg, (i,), constants, divisible)
        for name, value in constexprs.items():
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
        parts = tuple(signature.items()), tuple(constants.items()), tuple(divisible)
        self.found.append(Launch(self.name, *parts, num_warps, num_stages))


def _specialise(arg, path, constants, divisible):
    """The Triton type of an argument; what the JIT treats as a constant or as divisible by 16 is noted as it does."""
    if isinstance(arg, tuple):
        return tuple(_specialise(a, (*path, i), constants, divisible) for i, a in enumerate(arg))
    if arg is None or (isinstance(arg, int) and arg == 1):
        constants[path] = arg
        return "constexpr"
    if isinstance(arg, int):
        if arg % 16 == 0:
            divisible.append(path)
        return "i32" if arg < 2**31 else "i64"
    divisible.append(path)  # torch allocations are aligned
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "bool": "i1"}
    name = str(arg.dtype).removeprefix("torch.")
    return "*" + names.get(name, name.replace("int", "i"))


def launches(shape: Shape, arch: int) -> list[Launch]:
    """Every kernel launch of a training step at this shape on this architecture."""
    import torch

    from . import encode, gather, latent_grads

    found: list[Launch] = []
    patched = []
    for module in (encode, gather, latent_grads):
        for name in [n for n in vars(module) if n.startswith("_") and n.endswith("_kernel")]:
            kernel = getattr(module, name)
            patched.append((module, name, kernel))
            setattr(module, name, _Recorder(f"{module.__name__}:{name}", kernel, found))
    patched.append((encode, "_allow_tf32", encode._allow_tf32))
    for module in (encode, gather):
        patched.append((module, "capability", module.capability))
        module.capability = lambda _: arch
    try:
        dtype = getattr(torch, shape.dtype)
        B, N, k, d, S = shape.B, shape.N, shape.k, shape.d, shape.S

        def meta(*size, dtype=dtype):
            return torch.empty(*size, dtype=dtype, device="meta")

        x, w, bias = meta(B, d), meta(N, d), meta(d)
        indices, values = meta(B, k, dtype=torch.int64), meta(S, B, k, dtype=torch.float32)
        latent_bias = meta(N, dtype=torch.float32)
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            encode._allow_tf32 = lambda tf32=tf32: tf32
            encode._select_triton([x] * S, [w] * S, latent_bias, k, None, None)
        ids, count = meta(N, dtype=torch.int32), meta((), dtype=torch.int32)
        encode._select_triton([x], [w], latent_bias, k, ids, count)  # AuxK
        gather._gather_dot_triton(indices, w, x[None])  # values
        gather._gather_dot_triton(indices, w, meta(S, B, d))  # decode, backward
        gather._gather_sum_triton(indices, values, w, bias)  # decode
        gather._gather_sum_triton(indices, values[:1], w, None)  # encode, gradient of x
        for keep, dot in ((gather.KEEP_NONE, False), (0, False), (gather.KEEP_ALL, True)):  # loss, its backward
            gather._gather_error_triton(indices, values, w, bias, x, keep, dot)
        order, offsets = meta(B * k, dtype=torch.int32), meta(N + 1, dtype=torch.int32)
        for sources in (1, S):  # encoder, decoder
            mat = meta(sources, B, d)
            latent_grads._latent_reduce_triton(order, offsets, meta(sources, B * k), mat, k, dtype)
    finally:
        for module, name, original in patched:
            setattr(module, name, original)
    return found


def compile_launch(launch: Launch, arch: int, shape: Shape) -> Compiled:
    """Compile for `sm_{arch}` and read the result. Runs in a worker."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    result = Compiled(arch, launch, shape)
    module, name = launch.kernel.split(":")
    kernel = getattr(import_module(module), name)
    constants = dict(launch.constexprs)
    signature = {arg: dict(launch.signature).get(arg, "constexpr") for arg in kernel.arg_names}
    attrs = {path: [["tt.divisibility", 16]] for path in launch.divisible}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    try:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # a kernel that does not compile is a finding, not a crash
        cause = error.__cause__ or error  # Triton chains its errors, the reason stands in the innermost
        result.error = f"{type(cause).__name__}: {' '.join(str(cause).split())[-200:]}"
        return result
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], **run).stdout
        sass = subprocess.run([tool, "-sass", file.name], **run).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    result.registers, result.spill_bytes = int(registers), int(stack) + int(local)
    result.shared, result.instructions = compiled.metadata.shared, len(codes)
    ptx = compiled.asm["ptx"]
    result.matrix = next((m for m in ("tcgen05", "wgmma", "mma") if f"{m}." in ptx), "fma")
    loads = [c for c in codes if c.startswith(("LDG", "LDGSTS"))]
    widths = [int(m.group(1)) if (m := re.search(r"\.(128|64)\b", c)) else 32 for c in loads]
    result.load_bits = max(widths, default=0)
    return result


def audit(shapes: list[Shape], archs=DEFAULT_ARCHS, workers: int | None = None, progress=None) -> list[Compiled]:
    """Compile every distinct launch of the shapes for every architecture.

    Returns: one Compiled for each distinct (architecture, launch), with the first shape that needs it.
    """
    tasks = {}
    for arch, shape in product(archs, shapes):
        for launch in launches(shape, arch):
            tasks.setdefault((arch, launch), shape)
    done = []
    with ProcessPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        futures = [pool.submit(compile_launch, launch, arch, shape) for (arch, launch), shape in tasks.items()]
        for i, future in enumerate(futures):
            done.append(future.result())
            if progress:
                progress(i + 1, len(futures))
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", action="append", metavar="B,N,k,d,S[,DTYPE]", help="audit this shape instead of the grid; repeatable"
    )
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="default: 80 90 100")
    parser.add_argument("--quick", action="store_true", help="a few shapes instead of the whole grid")
    parser.add_argument("--workers", type=int, help="compiling processes (default: one per core, at most 8)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")


def _refuse(message: str) -> None:
    print(f"sparc-kernels audit: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _parse_shape(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) not in (5, 6) or not all(p.isdigit() and int(p) > 0 for p in parts[:5]):
        _refuse(f"--shape: expected B,N,k,d,S[,DTYPE] with positive integers, got {text!r}")
    dtype = parts[5] if len(parts) == 6 else "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        _refuse(f"--shape: expected DTYPE bfloat16, float16 or float32, got {dtype!r}")
    shape = Shape(*map(int, parts[:5]), dtype)
    if shape.k > min(shape.N, 512) or shape.S > 8:
        _refuse(f"--shape: expected k <= min(N, 512) and S <= 8, got {text!r}")
    return shape


def _flags(launch: Launch) -> str:
    """The constants that tell variants of a kernel apart."""
    module, name = launch.kernel.split(":")
    from importlib import import_module

    names = getattr(import_module(module), name).arg_names
    shown = []
    for path, value in launch.constexprs:
        arg = names[path[0]]
        if not arg.isupper() or arg in ("ACC", "STAGES", "GROUP_M", "K"):
            continue
        if isinstance(value, bool):
            shown += [arg] if value else []
        else:
            shown.append(f"{arg}={value}")
    return " ".join(shown)


def run(args: argparse.Namespace) -> int:
    from ._triton import HAS_TRITON, INTERPRETED

    if not HAS_TRITON:
        print("audit: Triton is not installed here, nothing can be compiled", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every release so far does
    if INTERPRETED:  # interpreted kernels cannot be compiled: start over without
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "sparc_kernels", *sys.argv[1:]], env=env, check=False).returncode
    shapes = [_parse_shape(s) for s in args.shape] if args.shape else QUICK if args.quick else GRID

    def progress(i, n):
        if sys.stderr.isatty():
            print(f"\rcompiled {i}/{n}", end="" if i < n else "\n", file=sys.stderr, flush=True)

    results = audit(shapes, tuple(args.arch or DEFAULT_ARCHS), args.workers, progress)
    print(
        f"{'kernel':<22} {'sm':>4} {'warps':>5} {'regs':>5} {'spill':>6} {'shared':>7} {'sass':>6} {'matrix':>8} "
        f"{'load':>5}"
    )
    for r in sorted(results, key=lambda r: (r.launch.kernel, r.arch, _flags(r.launch))):
        name = r.launch.kernel.split(":")[1].strip("_").removesuffix("_kernel")
        print(
            f"{name:<22} {r.arch:>4} {r.launch.num_warps:>5} {r.registers:>5} {r.spill_bytes:>6} {r.shared:>7} "
            f"{r.instructions:>6} {r.matrix:>8} {r.load_bits:>5}  {_flags(r.launch)}"
            + (f"  FAULT: {r.fault}" if r.fault else "")
        )
    faults = [r for r in results if r.fault]
    print(
        f"{len(results)} kernels compiled for {len({r.arch for r in results})} architectures, "
        f"{len(faults)} with a fault"
    )
    if args.json:
        rows = [{**asdict(r), "fault": r.fault} for r in results]
        with open(args.json, "w") as file:
            json.dump({"rows": rows}, file, indent=1, default=str)
    return 1 if faults else 0
