"""`sparc-kernels audit`: compile every kernel for any GPU and report registers, spills, shared memory, instructions.

Compiles the launches of a training step traced on meta tensors of the real shapes (`trace.py`), with the same settings
and the same specialisation of every argument. Needs only the Triton wheel, which contains ptxas, cuobjdump and AMD's
LLVM. Compiles in worker processes, where TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product

from ..launch.device import AMD, SHARED_LIMIT
from .compiler import ask_jit, reason
from .cost import DEFAULT_GPU, GPU, GPUS, gpu_named, table
from .shape import Shape, parse_shape
from .trace import Launch, Trace, launches, reference_peak_bytes, trace

__all__ = [
    "Compiled",
    "Launch",
    "Shape",
    "Trace",
    "audit",
    "compile_launch",
    "launches",
    "reference_peak_bytes",
    "trace",
]

DEFAULT_ARCHS = (80, 90, 100)


def arch_name(arch: int) -> str:
    """Return the name of an architecture: 80 -> "sm_80", 0x942 -> "gfx942"."""
    return f"gfx{arch:x}" if arch >= AMD else f"sm_{arch}"


@dataclass
class Compiled:
    """Resources of one kernel compiled for one architecture."""

    arch: int
    launch: Launch
    shape: Shape  # the first shape that launches it
    registers: int = 0  # of a thread; on AMD vector registers, accumulation registers included
    spill_bytes: int = 0
    shared: int = 0
    instructions: int = 0
    matrix: str = "-"  # wgmma, tcgen05, mma (NVIDIA), mfma, wmma (AMD) or fma
    load_bits: int = 0  # widest global load
    error: str = ""

    @property
    def fault(self) -> str:
        """Error, spill or excess of shared memory as text; "" if there is none."""
        if self.error:
            return self.error
        if self.spill_bytes:
            return f"spills {self.spill_bytes} B"
        limit = SHARED_LIMIT[self.arch]
        return f"shared memory {self.shared} B > {limit} B" if self.shared > limit else ""


# Settings depend on N and k (selection), on k, S and dtype (gather) and on d (sums): these are crossed. The last row
# is the largest supported shape. Other shapes launch the same kernels.
_NS, _KS, _DS = (8192, 32768, 65536, 131072, 1048576), (32, 64, 100, 128, 256, 512), (512, 1024, 2304, 4096, 8192)
_DTYPES = ("bfloat16", "float16", "float32")
GRID = [
    *(Shape(4096, N, k, (1024,) * S, dtype) for N, k, (S, dtype) in product(_NS, _KS, product((1, 3), _DTYPES))),
    *(Shape(4096, 32768, k, (d,) * S, dtype) for k, d, S, dtype in product((64, 512), _DS, (1, 2, 3, 4, 8), _DTYPES)),
    *(Shape(4096, 131072, k, (1024,) * S, dtype) for k, S, dtype in product(_KS, (2, 4, 8), _DTYPES)),
    *(Shape(B, N, 64, (768,) * 3, dtype) for B, N, dtype in product((1, 256, 65536), (8192, 131072), _DTYPES)),
    *(Shape(65536, 1048576, k, (8192,) * 8, dtype) for k, dtype in product((32, 512), _DTYPES)),
]
# Each shape for a few architectures: less than three minutes on two cores.
QUICK = {
    Shape(4096, 32768, 64, (1024,) * 3, "bfloat16"): (90, 100, 120, 0x942),
    Shape(256, 8192, 64, (768,) * 3, "float32"): (90,),
    Shape(4096, 32768, 64, (768,) * 2, "float16"): (90,),
    Shape(256, 2048, 16, (33,), "bfloat16"): (90,),  # a width that rules out wide loads
    Shape(1, 8192, 1, (64,), "float32"): (90,),  # the JIT makes sizes of 1 constants
    Shape(4096, 1048576, 512, (4096,) * 8, "bfloat16"): (90,),
    Shape(4096, 1048576, 512, (4096,) * 3, "float32"): (80,),
}


def compile_launch(launch: Launch, arch: int, shape: Shape) -> Compiled:
    """Compile one launch and read the result. Runs in a worker process.

    Args:
        launch: as `trace` records it.
        arch: as `launch.device.capability` gives it.
        shape: noted in the result.

    Returns:
        A Compiled; a failed compilation is its `error`.
    """
    result = Compiled(arch, launch, shape)
    try:
        compiled = ask_jit(launch, arch)
    except Exception as error:  # a kernel that does not compile is a finding, not a crash
        result.error = reason(error)
        return result
    result.shared = compiled.metadata.shared
    (_read_amdgcn if arch >= AMD else _read_cubin)(compiled.asm, result)
    return result


_INSTRUCTION = 16  # bytes of one of SASS
_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)")


def _read_cubin(asm, result: Compiled) -> None:
    """Read registers and spills from ptxas's report, code size from the ELF, load widths from the PTX (kept by ptxas).

    Disassembling would take as long as compiling.
    """
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    result.registers, result.spill_bytes = int(registers), int(stack) + int(local)
    result.instructions = _text_size(asm["cubin"]) // _INSTRUCTION
    result.matrix = next((m for m in ("tcgen05", "wgmma", "mma") if f"{m}." in asm["ptx"]), "fma")
    widths = [int(lanes or 1) * int(bits) for lanes, bits in _LOAD.findall(asm["ptx"])]
    widths += [8 * int(size, 0) for size in _COPY.findall(asm["ptx"])]
    result.load_bits = max(widths, default=0)


def _text_size(elf: bytes) -> int:
    """Bytes of the executable sections of a 64-bit little-endian ELF object."""
    table, entry, count = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + entry * i) for i in range(count)]
    return sum(size for _, _, flags, _, _, size in sections if flags & 4)


def _read_amdgcn(asm, result: Compiled) -> None:
    text = asm["amdgcn"]

    def number(key):
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(match.group(1)) if match else 0

    result.registers = number("vgpr_count")  # on gfx9 accumulation registers included
    # scratch memory of a lane holds spills, like CUDA's local memory
    result.spill_bytes = number("private_segment_fixed_size")
    codes = re.findall(r"^\t([a-z][a-z0-9_]+)", text, re.MULTILINE)
    result.instructions = len(codes)
    result.matrix = next((m for m in ("mfma", "wmma") if any(c.startswith(f"v_{m}") for c in codes)), "fma")
    loads = [c for c in codes if c.startswith(("global_load", "buffer_load", "flat_load"))]
    widths = [32 * int(m.group(1)) if (m := re.search(r"(?:dwordx|_b)(\d+)$", c)) else 32 for c in loads]
    result.load_bits = max((w if w <= 128 else w // 32 for w in widths), default=0)  # gfx11 says b128 for dwordx4


def audit(
    wanted: list[tuple[Shape, int]], workers: int | None = None, progress=None, kernels: str = ""
) -> list[Compiled]:
    """Compile every distinct launch of the given shapes and architectures.

    Args:
        wanted: (shape, architecture) pairs.
        workers: processes; None: one for each core, at most 8.
        progress: called after each kernel with how many are done and how many there are.
        kernels: regular expression searched in the kernels' names.

    Returns:
        One Compiled for each distinct (architecture, launch), with the first shape that needs it.
    """
    tasks, done = {}, []
    with ProcessPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        for (shape, arch), shape_launches in zip(wanted, pool.map(launches, *zip(*wanted, strict=True)), strict=True):
            for launch in shape_launches:
                if re.search(kernels, launch.kernel.split(":")[1]):
                    tasks.setdefault((arch, launch), shape)
        futures = [pool.submit(compile_launch, launch, arch, shape) for (arch, launch), shape in tasks.items()]
        for i, future in enumerate(futures):
            done.append(future.result())
            if progress:
                progress(i + 1, len(futures))
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--shape",
        action="append",
        metavar="B,N,k,d,S[,PRECISION]",
        help="audit this shape instead of the grid; PRECISION bf16 (default), fp16 or fp32; repeatable",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help="80, 86, 89, 90, 100, 120, gfx90a, gfx942, gfx1100; repeatable; default: 80 90 100",
    )
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels in whose name this is found")
    parser.add_argument("--quick", action="store_true", help="a few shapes instead of the whole grid")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"of the modelled times: {', '.join(GPUS)}")
    parser.add_argument("--workers", type=int, help="compiling processes (default: one per core, at most 8)")
    parser.add_argument("--verbose", action="store_true", help="a line for every compiled kernel, not for every name")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")


def _refuse(message: str) -> None:
    print(f"sparc-kernels audit: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        return _refuse(str(error))


def _gpu(text: str) -> GPU:
    try:
        return gpu_named(text)
    except ValueError as error:
        return _refuse(f"--{error}")


def _parse_arch(text: str) -> int:
    names = {arch_name(arch).removeprefix("sm_"): arch for arch in SHARED_LIMIT}
    if text.removeprefix("sm_") not in names:
        _refuse(f"--arch: expected one of {', '.join(names)}, got {text!r}")
    return names[text.removeprefix("sm_")]


def _flags(launch: Launch) -> str:
    """The compile-time constants that distinguish variants of a kernel."""
    module, name = launch.kernel.split(":")
    from importlib import import_module

    names = getattr(import_module(module), name).arg_names
    flags = []
    for path, value in launch.constexprs:
        arg = names[path[0]]
        if not arg.isupper() or arg in ("ACC", "STAGES", "GROUP_M", "K"):
            continue
        if isinstance(value, bool):
            flags += [arg] if value else []
        else:
            flags.append(f"{arg}={value}")
    return " ".join(flags)


def _name(result: Compiled) -> str:
    return result.launch.kernel.split(":")[1].strip("_").removesuffix("_kernel")


def _table(results: list[Compiled]) -> str:
    """One line for each compiled kernel."""
    lines = [
        f"{'kernel':<22} {'arch':>7} {'warps':>5} {'regs':>5} {'spill':>6} {'shared':>7} {'sass':>6} {'matrix':>8} "
        f"{'load':>5}"
    ]
    for r in sorted(results, key=lambda r: (r.launch.kernel, r.arch, _flags(r.launch))):
        lines.append(
            f"{_name(r):<22} {arch_name(r.arch):>7} {r.launch.num_warps:>5} {r.registers:>5} {r.spill_bytes:>6} "
            f"{r.shared:>7} {r.instructions:>6} {r.matrix:>8} {r.load_bits:>5}  {_flags(r.launch)}"
            + (f"  FAULT: {r.fault}" if r.fault else "")
        )
    return "\n".join(lines)


def _summary(results: list[Compiled]) -> str:
    """One line for each kernel's name: number of variants compiled and the maximum of each resource."""
    lines = [f"{'kernel, the most of':<22} {'compiled':>8} {'regs':>5} {'spill':>6} {'shared':>7} {'sass':>6}  matrix"]
    for name in sorted({_name(r) for r in results}):
        variants = [r for r in results if _name(r) == name]
        fields = "registers", "spill_bytes", "shared", "instructions"
        registers, spill, shared, sass = (max(getattr(r, field) for r in variants) for field in fields)
        matrix = " ".join(sorted({r.matrix for r in variants}))
        lines.append(f"{name:<22} {len(variants):>8} {registers:>5} {spill:>6} {shared:>7} {sass:>6}  {matrix}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Compile, print tables and write --json.

    Args:
        args: as `add_arguments` declares them.

    Returns:
        Exit code: 0; 1 where a kernel has a fault; 2 without Triton.

    Raises:
        SystemExit: with code 2, for invalid arguments.
    """
    from ..core._triton import HAS_TRITON, INTERPRETED

    if not HAS_TRITON:
        print("audit: Triton is not installed here, nothing can be compiled", file=sys.stderr)
        return 2

    def progress(i, n):
        if sys.stderr.isatty():
            print(f"\rcompiled {i}/{n}", end="" if i < n else "\n", file=sys.stderr, flush=True)
        elif n >= 200 and 10 * i // n > 10 * (i - 1) // n:
            print(f"compiled {i}/{n}", file=sys.stderr, flush=True)

    shapes = [_shape(s) for s in args.shape] if args.shape else list(QUICK) if args.quick else GRID
    archs = [_parse_arch(a) for a in args.arch or ()]
    gpu = _gpu(args.gpu)
    try:
        re.compile(args.kernel)
    except re.error as error:
        _refuse(f"--kernel: expected a regular expression, got {args.kernel!r} ({error})")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of every release so far
    if INTERPRETED:  # interpreted kernels cannot be compiled: restart without TRITON_INTERPRET
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "sparc_kernels", *sys.argv[1:]], env=env, check=False).returncode
    if args.quick and not args.shape and not archs:
        wanted = [(shape, arch) for shape in shapes for arch in QUICK[shape]]
    else:
        wanted = [(shape, arch) for arch in archs or DEFAULT_ARCHS for shape in shapes]
    results = audit(wanted, args.workers, progress, args.kernel)
    faults = [r for r in results if r.fault]
    if not args.verbose:
        print(_summary(results))
    if args.verbose or faults:
        print(_table(results if args.verbose else faults))
    print(
        f"{len(results)} kernels compiled for {len({r.arch for r in results})} architectures, "
        f"{len(faults)} with a fault"
    )
    if args.shape:
        for shape in shapes:
            print(f"\n{table(shape, gpu)}")
    if args.json:
        rows = [{**asdict(r), "shape": r.shape.record(), "fault": r.fault} for r in results]
        with open(args.json, "w") as file:
            json.dump({"rows": rows}, file, indent=1, default=str)
    return 1 if faults else 0
