"""A driver for Triton that launches nothing: its own JIT, at work on a machine without a GPU.

Inside `stand_in` the operators run their launchers on meta tensors, and `kernel[grid](...)` is Triton's: binding and
specialisation of the arguments, parsing of the options, compiler, look-up of the next launch, driver. Only what would
load a binary and hand a launch to CUDA is replaced, by checks of what CUDA would refuse. (`_trace.py` notes the same
launches without Triton; that both come to the same kernels is tested.)
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

# Of Triton's compiler, after what the JIT makes of a launch. From llir on shared memory is known.
STAGES = ("source", "ttir", "ttgir", "llir", "ptx", "cubin")
THREADS = 1024  # of a block; this and the grid's limits: CUDA programming guide, technical specifications
GRID = 2**31 - 1, 2**16 - 1, 2**16 - 1


class Refused(RuntimeError):
    """A launch that Triton or CUDA would refuse."""


class Launched(NamedTuple):
    kernel: str  # module:function
    grid: tuple[int, int, int]
    key: str  # of the compiled kernel in Triton's cache


class Kernel(NamedTuple):
    name: str  # module:function
    stage: str  # how far it was compiled
    shared: int | None  # bytes of a block; None where that is not known yet


class Driver:
    """What Triton asks a driver for. `launched` has every launch in order, `kernels` what was compiled, by its key."""

    _numbers = itertools.count(1000)  # of devices; Triton keeps what it compiled by device, so no two share one

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
        """As triton.compile, as far as `stage` says for this kernel."""
        from triton.compiler import compile, make_backend
        from triton.runtime.autotuner import OutOfResources

        name, stage, backend = _name(source.fn), self.stage(source), make_backend(target)
        if stage == STAGES[-1]:
            made = compile(source, target=target, options=options, **named)
            self.kernels[made.hash] = Kernel(name, stage, made.metadata.shared)
            return made
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
    """The compiler's stages up to that one."""
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
    """The name under which Triton's cache keeps an ASTSource compiled for that target with those options."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def _name(kernel) -> str:
    return f"{kernel.__module__}:{kernel.__name__}"


class _Launcher:
    """Takes the launches of one compiled kernel."""

    def __init__(self, driver, source, metadata):
        self.driver, self.kernel, self.key = driver, _name(source.fn), metadata.hash
        self.kinds, self.names = tuple(source.signature.values()), tuple(source.signature)

    def __call__(self, x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *args):
        for axis, size, limit in zip("xyz", (x, y, z), GRID, strict=True):
            if type(size) is not int or not 1 <= size <= limit:
                raise ValueError(f"grid: expected an int in 1..{limit} for {axis}, got {size!r}")
        for name, kind, arg in zip(self.names, self.kinds, args, strict=True):
            for tensor in _tensors(kind, arg):
                if not tensor.is_meta:
                    raise ValueError(f"{name}: expected a tensor on the device, got one on {tensor.device}")
        self.driver.launched.append(Launched(self.kernel, (x, y, z), self.key))


def _tensors(kind, arg):
    if isinstance(kind, tuple):
        for part in zip(kind, arg, strict=True):
            yield from _tensors(*part)
    elif kind.startswith("*"):
        yield arg


@contextmanager
def launchers_on_meta():
    """Operators run their launchers on meta tensors, in place of what only gives the shapes of their results."""
    library = torch.library.Library(NAMESPACE, "IMPL", "Meta")
    try:
        for name, operator in OPERATORS.items():
            library.impl(name, operator.run, allow_override=True)
        yield
    finally:
        library._destroy()


@contextmanager
def stand_in(arch: int = 90, *, tf32: bool = False, stage: Callable[[object], str] = lambda source: STAGES[-1]):
    """The package's operators on meta tensors, with impl "auto" or "triton", as they would be on an NVIDIA GPU.

    Args:
        arch: as `_launch.capability` gives it.
        tf32: what torch's float32 matmul precision allows.
        stage: how far Triton compiles an ASTSource, one of STAGES; all the way by default, into Triton's cache. Asked
            once for each specialisation of each kernel.

    Yields: the Driver.

    Raises: RuntimeError where Triton interprets kernels; a launch raises Refused, with the kernel's name, where Triton
        or CUDA would refuse it or do nothing: an argument of a type that Triton does not know or on another device, an
        unknown option, a kernel that does not compile, a grid that is empty or too large, too many threads, too much
        shared memory (where `stage` lets Triton find out).
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
