"""A CUDA driver library whose functions do nothing, to time the host's side of launches on a machine without a GPU.

Inside `stub_driver` a launch is Triton's from end to end: its JIT, kernels compiled for the architecture, its driver
module and its launcher in C. Only libcuda.so.1 is replaced, by a library that counts launches and returns. (`stand_in`
checks what CUDA would refuse; it replaces Triton's driver too, so its times mean nothing.)
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..core._triton import HAS_TRITON, INTERPRETED
from ..core.target import Target, as_target
from ..core.validation import require
from ..launch.device import AMD, shared_limit
from .stand_in import launchers_on_meta

_LIBRARY = "libcuda.so.1"
# What Triton 3.6 to 3.9 look up. Attributes of a device: 10 warp size, 75 and 76 capability, 97 shared memory of a
# block; of a function: 0 threads of a block, else registers, spills, shared memory.
_SOURCE = r"""
static int major = 9, minor = 0, shared = 232448;
static long launches;
void stub_device(int a, int b, int bytes) { major = a, minor = b, shared = bytes; }
long stub_launches(void) { return launches; }
#define NOTHING(name) int name() { return 0; }
NOTHING(cuInit) NOTHING(cuModuleUnload) NOTHING(cuFuncSetCacheConfig) NOTHING(cuFuncSetAttribute)
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuOccupancyMaxActiveClusters)
int cuDriverGetVersion(int *out) { *out = 13000; return 0; }
int cuDeviceGetCount(int *out) { *out = 0; return 0; } // for others than Triton, which does not ask
int cuDeviceGet(int *out, int number) { *out = number; return 0; }
int cuDeviceGetAttribute(int *out, int what, int device) {
  *out = what == 10 ? 32 : what == 75 ? major : what == 76 ? minor : what == 97 ? shared : 132;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = (void *)1; return 0; }
int cuCtxGetCurrent(void **out) { *out = (void *)1; return 0; }
int cuCtxGetDevice(int *out) { *out = 0; return 0; }
int cuCtxGetLimit(unsigned long *out, int what) { *out = 0; return 0; }
int cuModuleLoadData(void **out, const void *image) { *out = (void *)1; return 0; }
int cuModuleGetFunction(void **out, void *module, const char *name) { *out = (void *)1; return 0; }
int cuFuncGetAttribute(int *out, int what, void *function) { *out = what == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *out, int what, unsigned long long at) { *(unsigned long long *)out = at; return 0; }
int cuPointerGetAttributes(unsigned n, int *what, void **out, unsigned long long at) { return 0; }
int cuStreamIsCapturing(void *stream, int *out) { *out = 0; return 0; }
int cuGetErrorString(int error, const char **out) { *out = "a driver that does nothing"; return 0; }
int cuLaunchKernelEx() { launches++; return 0; }
int cuLaunchKernel() { launches++; return 0; }
"""
_devices = itertools.count(5000)  # Triton caches kernels by device


class Stub:
    """The library that stands for CUDA's driver."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_launches.restype = ctypes.c_long

    @property
    def launches(self) -> int:
        """Launches of this process so far."""
        return self._library.stub_launches()

    def become(self, arch: int) -> None:
        """Answer as a GPU of this compute capability."""
        self._library.stub_device(*divmod(arch, 10), shared_limit(arch))


def build() -> Path:
    """Compile the library into Triton's cache, where it is not there yet.

    Returns:
        Its path.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(_SOURCE.encode()).hexdigest())
    if found := cache.get_file(_LIBRARY):
        return Path(found)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler: expected gcc or clang, or the variable CC, as Triton itself needs one")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stub.c", Path(folder) / _LIBRARY
        source.write_text(_SOURCE)
        flags = ["-O2", "-w", "-std=gnu11", "-shared", "-fPIC", f"-Wl,-soname,{_LIBRARY}"]
        command = [compiler, *flags, "-o", str(library), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(f"no C compiler: {compiler}: {error}") from error
        if done.returncode:
            raise RuntimeError(f"the C compiler {compiler} fails: {done.stderr.strip()[-500:]}")
        return Path(cache.put(library.read_bytes(), _LIBRARY, binary=True))


@contextmanager
def stub_driver(arch: int = 90) -> Iterator[Stub]:
    """Run the package's operators on meta tensors by Triton's own JIT and launcher, over a driver that does nothing.

    Kernels are compiled to the end, into Triton's cache, at their first launch. A process that has used it cannot use
    a real driver.

    Args:
        arch: compute capability as 90.

    Yields:
        The Stub, which counts launches.

    Raises:
        RuntimeError: Triton is not installed or interprets kernels, there is no C compiler, or the process has a real
            driver.
        ValueError: arch is not NVIDIA's.
    """
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed here: its launches cannot be timed")
    if INTERPRETED:
        raise RuntimeError("Triton interprets kernels here: expected TRITON_INTERPRET unset, got 1")
    require(arch < AMD, "arch", "an NVIDIA architecture such as 90", hex(arch))
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: expected to be timed with its own driver")
    import triton
    from triton.backends.nvidia import driver as nvidia

    path = build()
    stub = Stub(path)
    if not hasattr(ctypes.CDLL(_LIBRARY), "stub_launches"):  # found by its name among the loaded ones
        raise RuntimeError(f"another {_LIBRARY} is loaded in this process")
    stub.become(arch)
    driver, device = _driver(nvidia, path.parent), next(_devices)
    driver.get_current_device = lambda: device
    driver.set_current_device = lambda device: None
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=device: divmod(arch, 10)
    active = triton.runtime.driver._active
    with ExitStack() as stack:
        stack.enter_context(as_target(Target(arch)))
        stack.enter_context(launchers_on_meta())
        triton.runtime.driver.set_active(driver)
        stack.callback(triton.runtime.driver.set_active, active)
        yield stub


def _driver(nvidia, folder: Path):
    """Triton's driver, without what it asks torch.cuda; its C module is linked with the library in the folder."""
    before = os.environ.get("TRITON_LIBCUDA_PATH")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    for cached in (nvidia.libcuda_dirs, nvidia.library_dirs):
        cached.cache_clear()
    try:
        driver = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
        driver.utils, driver.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        nvidia.library_dirs()  # Triton 3.6 links every launcher
    finally:
        if before is None:
            del os.environ["TRITON_LIBCUDA_PATH"]
        else:
            os.environ["TRITON_LIBCUDA_PATH"] = before
    return driver
