"""Where a run takes place: versions, commit, processor, GPU, and what NVML says of clocks, power and throttling.

On a CPU there is no NVML; the record says so.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_", "PYTORCH_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_")
NO_NVML = "no NVIDIA GPU: NVML gives no energy, clocks or throttle reasons on a CPU"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> dict:
    """The commit measured: git's word, else the variable SPARC_KERNELS_COMMIT (a copy without .git)."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 20}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options)
        if head.returncode == 0:
            # what is measured, not the records and texts beside it
            status = subprocess.run(["git", "status", "--porcelain", "sparc_kernels", "benchmarks/*.py"], **options)
            dirty = bool(status.stdout.strip()) if status.returncode == 0 else None
            return {"commit": head.stdout.strip(), "dirty": dirty, "commit_source": "git"}
    given = os.environ.get("SPARC_KERNELS_COMMIT")
    return {"commit": given, "dirty": None, "commit_source": "SPARC_KERNELS_COMMIT" if given else None}


def versions() -> dict:
    import numpy
    import torch

    from sparc_kernels import __version__

    found = {
        "sparc_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": None,
    }  # fmt: skip
    if torch.version.cuda:
        found["cudnn"] = torch.backends.cudnn.version()
    for name in ("triton", "eai-sparsify", "flashinfer-python", "nvidia-ml-py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu() -> dict | None:
    """What torch says of the first CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": p.name, "count": torch.cuda.device_count(), "compute_capability": f"{p.major}.{p.minor}",
        "memory_mib": total // MIB, "memory_free_mib": free // MIB, "multiprocessors": p.multi_processor_count,
        "l2_bytes": getattr(p, "L2_cache_size", None), "uuid": str(getattr(p, "uuid", "")) or None,
    }  # fmt: skip


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, this one among them."""
    with contextlib.suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def memory_mib() -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
    return None


def environment(device: str, threads: int) -> dict:
    found = gpu() if device == "cuda" else None
    entry = {
        "date": now(), "device": device, "device_name": found["name"] if found else processor(), **commit(),
        "versions": versions(), "platform": platform.platform(), "cpu": processor(), "cores": os.cpu_count(),
        "threads": threads, "memory_mib": memory_mib(), "load_before": load_average(), "gpu": found,
        "command": ["python", "-m", "benchmarks", *(Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:])],
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    }  # fmt: skip
    entry["nvml"] = gpu_state(found["uuid"]) if found else {"source": None, "reason": NO_NVML}
    return entry


# ----------------------------------------------------------------------------------------------------------------- NVML

# bits of nvmlDeviceGetCurrentClocksEventReasons
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal", 0x40: "hardware thermal", 0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip


def reasons(bits: int) -> list[str]:
    return [name for bit, name in REASONS.items() if bits & bit]


class Monitor:
    """NVML of one GPU while a run lasts. `reason` says why where there is none; then every answer is None."""

    def __init__(self, uuid: str | None = None, absent: str | None = None):
        self.nv = self.handle = None
        self.reason = absent
        if absent:
            return
        try:
            import pynvml as nv

            nv.nvmlInit()
            self.nv, self.handle = nv, _handle(nv, uuid)
        except Exception as error:
            self.reason = f"pynvml: {type(error).__name__}: {error}"

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; the counter moves about every 20 to 100 ms."""
        if self.nv is None:
            return None
        try:
            return self.nv.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except Exception as error:
            self.reason = f"energy: {error}"
            return None

    def clocks(self) -> dict | None:
        if self.nv is None:
            return None
        nv, h = self.nv, self.handle
        questions = {
            "sm_mhz": lambda: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_SM),
            "memory_mhz": lambda: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_MEM),
            "power_w": lambda: nv.nvmlDeviceGetPowerUsage(h) / 1000,
            "temperature_c": lambda: nv.nvmlDeviceGetTemperature(h, nv.NVML_TEMPERATURE_GPU),
            "throttle": lambda: reasons(nv.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
        }
        return {name: _ask(ask) for name, ask in questions.items()}


def _handle(nv, uuid: str | None):
    if uuid:
        with contextlib.suppress(Exception):
            return nv.nvmlDeviceGetHandleByUUID((uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode())
    return nv.nvmlDeviceGetHandleByIndex(0)


def _ask(question):
    try:
        value = question()
    except Exception as error:  # one question that the driver does not answer
        return f"unknown: {error}"
    return value.decode() if isinstance(value, bytes) else value


def gpu_state(uuid: str | None = None) -> dict:
    """Clocks, power, temperature, throttle reasons and driver, now: from NVML, else from nvidia-smi."""
    try:
        return _state_by_nvml(uuid)
    except Exception as error:
        first = f"pynvml: {type(error).__name__}: {error}"
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"source": None, "reason": f"{first}; nvidia-smi: not found"}
    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,temperature.gpu,"
        "clocks_throttle_reasons.active"
    )
    try:
        query = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"source": None, "reason": f"{first}; nvidia-smi: {error}"}
    values = [v.strip() for v in text.strip().splitlines()[0].split(",")]
    return {"source": "nvidia-smi", **dict(zip(fields.split(","), values, strict=False))}


def _state_by_nvml(uuid: str | None) -> dict:
    import pynvml as nv

    nv.nvmlInit()
    try:
        h = _handle(nv, uuid)
        questions = {
            "name": lambda: nv.nvmlDeviceGetName(h),
            "driver": lambda: nv.nvmlSystemGetDriverVersion(),
            "sm_mhz": lambda: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_SM),
            "sm_max_mhz": lambda: nv.nvmlDeviceGetMaxClockInfo(h, nv.NVML_CLOCK_SM),
            "memory_mhz": lambda: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_MEM),
            "memory_max_mhz": lambda: nv.nvmlDeviceGetMaxClockInfo(h, nv.NVML_CLOCK_MEM),
            "power_limit_w": lambda: nv.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
            "power_w": lambda: nv.nvmlDeviceGetPowerUsage(h) / 1000,
            "temperature_c": lambda: nv.nvmlDeviceGetTemperature(h, nv.NVML_TEMPERATURE_GPU),
            "throttle": lambda: reasons(nv.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
            "memory_used_mib": lambda: nv.nvmlDeviceGetMemoryInfo(h).used // MIB,
        }
        return {"source": "pynvml", **{name: _ask(ask) for name, ask in questions.items()}}
    finally:
        nv.nvmlShutdown()
