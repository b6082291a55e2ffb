"""A Triton driver that launches nothing, to run Triton's own JIT on a machine without a GPU.

Inside `stand_in` the operators run their launchers on meta tensors, and `kernel[grid](...)` is Triton's: it binds and
specialises arguments, parses options, compiles and caches. Only loading a binary and launching it are replaced, by
checks of what CUDA would refuse. (`trace.py` records the same launches without Triton; a test compares the kernels.)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..core._triton import INTERPRETED
from ..core.registry import NAMESPACE, OPERATORS
from ..launch.device import shared_limit
from ..tools import trace
from .compiler import reason, target_of

# Stages of Triton's compiler, from the JIT's specialised source on. Shared memory is known from llir on.
STAGES = ("source", "ttir", "ttgir", "llir", "ptx", "cubin")
# Limits of a block and of a grid: CUDA programming guide, technical specifications
THREADS = 1024
GRID = 2**31 - 1, 2**16 - 1, 2**16 - 1


class Refused(RuntimeError):
    """A launch that Triton or CUDA would refuse."""


class Launched(NamedTuple):
    """One launch."""

    kernel: str  # module:function
    grid: tuple[int, int, int]
    key: str  # of the compiled kernel in Triton's cache


class Kernel(NamedTuple):
    """One compiled kernel."""

    name: str  # module:function
    stage: str  # the last one that ran
    shared: int | None  # bytes of a block; None before llir


class Driver:
    """The driver that Triton sees; its methods have the names that Triton calls.

    `launched` has every launch in order, `kernels` the compiled kernels by cache key.

    Args:
        arch: as `launch.device.capability` gives it.
        stage: how far to compile an ASTSource, one of STAGES.
    """

    _numbers = itertools.count(1000)  # device ids; unique, because Triton caches by device

    def __init__(self, arch: int, stage: Callable[[object], str]):
        self.target, self.stage, self.device = target_of(arch), stage, next(self._numbers)
        self.launched: list[Launched] = []
        self.kernels: dict[str, Kernel] = {}
        self.utils = self

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_properties(self, device) -> dict[str, int]:
        return {"max_shared_mem": shared_limit(self.target.arch)}

    def load_binary(self, name, binary, shared, device):
        return None, 0, 0, 0, THREADS  # module, function, registers, spills, threads of a block

    def launcher_cls(self, source, metadata):
        return _Launcher(self, source, metadata)

    def compile(self, source, target, options, **named):
        """Compile like triton.compile, up to the stage chosen for this kernel.

        Args:
            source: ASTSource.
            target: GPUTarget.
            options: compiler options by name.
            named: further arguments of triton.compile.

        Returns:
            A compiled kernel, or its stand-in where compiling ended early.

        Raises:
            OutOfResources: too many threads or too much shared memory.
        """
        from triton.compiler import compile, make_backend
        from triton.runtime.autotuner import OutOfResources

        name, stage, backend = _name(source.fn), self.stage(source), make_backend(target)
        if stage == STAGES[-1]:
            compiled = compile(source, target=target, options=options, **named)
            self.kernels[compiled.hash] = Kernel(name, stage, compiled.metadata.shared)
            return compiled
        options = backend.parse_options(dict(options))
        key = cache_key(source, target, options.__dict__)
        metadata = {"hash": key, "target": target, **options.__dict__}
        _lower(backend, source, options, metadata, stage)
        shared = metadata.get("shared")
        for wanted, limit, what in (
            (shared or 0, shared_limit(target.arch), "shared memory"),
            (options.num_warps * target.warp_size, THREADS, "threads"),
        ):
            if wanted > limit:
                raise OutOfResources(wanted, limit, what)
        self.kernels[key] = Kernel(name, stage, shared)
        launcher = self.launcher_cls(source, SimpleNamespace(**metadata))
        return SimpleNamespace(run=launcher, function=0, packed_metadata=None, launch_metadata=lambda *_: None)


def _lower(backend, source, options, metadata, stage) -> None:
    """Run the compiler's stages up to `stage`."""
    from triton._C.libtriton import ir

    if stage == "source":
        return
    stages, context = {}, ir.context()
    backend.add_stages(stages, options, source.language)
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        metadata["target"], options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    for name in STAGES[1 : STAGES.index(stage) + 1]:
        module = stages[name](module, metadata)


def cache_key(source, target, options: dict) -> str:
    """Return the key of Triton's cache for an ASTSource.

    Args:
        source: the ASTSource.
        target: a GPUTarget.
        options: compiler options by name.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def _name(kernel) -> str:
    return f"{kernel.__module__}:{kernel.__name__}"


class _Launcher:
    """Check and record the launches of one compiled kernel."""

    def __init__(self, driver, source, metadata):
        self.driver, self.kernel, self.key = driver, _name(source.fn), metadata.hash
        self.kinds, self.names = tuple(source.signature.values()), tuple(source.signature)

    def __call__(self, *launch):
        grid, args = launch[:3], launch[9:]  # between: stream, function, two pieces of metadata, two hooks
        for axis, size, limit in zip("xyz", grid, GRID, strict=True):
            if type(size) is not int or not 1 <= size <= limit:
                raise ValueError(f"grid: expected an int in 1..{limit} for {axis}, got {size!r}")
        for name, kind, arg in zip(self.names, self.kinds, args, strict=True):
            for tensor in _tensors(kind, arg):
                if not tensor.is_meta:
                    raise ValueError(f"{name}: expected a tensor on the device, got one on {tensor.device}")
        self.driver.launched.append(Launched(self.kernel, grid, self.key))


def _tensors(kind, arg):
    if isinstance(kind, tuple):
        for part in zip(kind, arg, strict=True):
            yield from _tensors(*part)
    elif kind.startswith("*"):
        yield arg


@contextmanager
def launchers_on_meta():
    """Let operators run their launchers on meta tensors instead of their fake implementations."""
    library = torch.library.Library(NAMESPACE, "IMPL", "Meta")
    try:
        for name, operator in OPERATORS.items():
            library.impl(name, operator.run, allow_override=True)
        yield
    finally:
        library._destroy()


@contextmanager
def stand_in(arch: int = 90, *, tf32: bool = False, stage: Callable[[object], str] = lambda source: STAGES[-1]):
    """Run the package's operators on meta tensors, with impl "auto" or "triton", as on an NVIDIA GPU.

    Args:
        arch: as `launch.device.capability` gives it.
        tf32: whether torch's float32 matmul precision allows tf32.
        stage: returns how far Triton compiles an ASTSource, one of STAGES; the default compiles to the end, into
            Triton's cache. Called once for each specialisation of each kernel.

    Yields:
        The Driver.

    Raises:
        RuntimeError: Triton interprets kernels.
        Refused: with the kernel's name, for a launch that Triton or CUDA would refuse or that would do nothing: an
            argument of a type unknown to Triton or on another device, an unknown option, a kernel that does not
            compile, an empty or too large grid, too many threads, too much shared memory (from stage llir on).
    """
    if INTERPRETED:
        raise RuntimeError("Triton interprets kernels here: expected TRITON_INTERPRET unset, got 1")
    with trace.as_on_gpu(arch, tf32), launchers_on_meta():
        import triton
        from triton.runtime.jit import JITFunction

        driver, launch, active, touched = Driver(arch, stage), JITFunction.run, triton.runtime.driver._active, []

        def run(kernel, *args, grid, warmup, **named):
            if driver.device not in kernel.device_caches:
                kernel.device_caches[driver.device] = kernel.create_binder()
                kernel.compile = driver.compile
                touched.append(kernel)
            try:
                return launch(kernel, *args, grid=grid, warmup=warmup, **named)
            except Exception as error:
                raise Refused(f"{_name(kernel)}: {reason(error)}") from error

        triton.runtime.driver.set_active(driver)
        JITFunction.run = run
        try:
            yield driver
        finally:
            JITFunction.run = launch
            triton.runtime.driver.set_active(active)
            for kernel in touched:
                del kernel.device_caches[driver.device]
                kernel.compile = triton.compiler.compile
