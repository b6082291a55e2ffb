"""Where a run takes place: versions, commit, processor, GPU, and NVML's clocks, power and throttle reasons.

On a CPU there is no NVML; the record says so.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sparc_kernels.core import provenance

from .record import MIB

VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_", "PYTORCH_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_")
NO_NVML = "no NVIDIA GPU: NVML gives no energy, clocks or throttle reasons on a CPU"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> dict:
    """The commit measured, by git, else by the variable SPARC_KERNELS_COMMIT (a copy without .git)."""
    if head := provenance.commit():
        # what is measured, not the records and texts beside it
        return {
            "commit": head, "dirty": provenance.changed("sparc_kernels", "benchmarks/*.py"), "commit_source": "git",
        }  # fmt: skip
    given = os.environ.get("SPARC_KERNELS_COMMIT")
    return {"commit": given, "dirty": None, "commit_source": "SPARC_KERNELS_COMMIT" if given else None}


def versions() -> dict:
    import numpy
    import torch

    from sparc_kernels import __version__

    known = {
        "sparc_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
    }  # fmt: skip
    return known | provenance.versions_of(("triton", "eai-sparsify", "flashinfer-python", "nvidia-ml-py"))


def gpu() -> dict | None:
    """The first CUDA device, by torch."""
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
        if name := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return name[1].strip()
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
    device_info = gpu() if device == "cuda" else None
    return {
        "date": now(), "device": device, "device_name": device_info["name"] if device_info else processor(),
        **commit(), "versions": versions(), "platform": platform.platform(), "cpu": processor(),
        "cores": os.cpu_count(), "threads": threads, "memory_mib": memory_mib(), "load_before": load_average(),
        "gpu": device_info,
        "command": ["python", "-m", "benchmarks", *(Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:])],
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "nvml": gpu_state(device_info["uuid"]) if device_info else {"source": None, "reason": NO_NVML},
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- NVML

# bits of nvmlDeviceGetCurrentClocksEventReasons
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal", 0x40: "hardware thermal", 0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip
NOW = {  # field -> question to NVML about a device
    "sm_mhz": lambda nv, h: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_SM),
    "memory_mhz": lambda nv, h: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_MEM),
    "power_w": lambda nv, h: nv.nvmlDeviceGetPowerUsage(h) / 1000,
    "temperature_c": lambda nv, h: nv.nvmlDeviceGetTemperature(h, nv.NVML_TEMPERATURE_GPU),
    "throttle": lambda nv, h: reasons(nv.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
}
STATE = {
    "name": lambda nv, h: nv.nvmlDeviceGetName(h),
    "driver": lambda nv, h: nv.nvmlSystemGetDriverVersion(),
    "sm_max_mhz": lambda nv, h: nv.nvmlDeviceGetMaxClockInfo(h, nv.NVML_CLOCK_SM),
    "memory_max_mhz": lambda nv, h: nv.nvmlDeviceGetMaxClockInfo(h, nv.NVML_CLOCK_MEM),
    "power_limit_w": lambda nv, h: nv.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
    **NOW,
    "memory_used_mib": lambda nv, h: nv.nvmlDeviceGetMemoryInfo(h).used // MIB,
}


def reasons(bits: int) -> list[str]:
    return [name for bit, name in REASONS.items() if bits & bit]


def _answers(nv, handle, questions: dict) -> dict:
    def ask(question):
        try:
            value = question(nv, handle)
        except Exception as error:  # the driver does not answer this one
            return f"unknown: {error}"
        return value.decode() if isinstance(value, bytes) else value

    return {name: ask(question) for name, question in questions.items()}


class Monitor:
    """NVML of one GPU while a run lasts. `reason` says why where there is none; then every answer is None."""

    def __init__(self, uuid: str | None = None):
        self.nv = self.reason = None
        try:
            import pynvml as nv

            nv.nvmlInit()
            self.handle = nv.nvmlDeviceGetHandleByIndex(0)
            if uuid:
                with contextlib.suppress(Exception):
                    full = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
                    self.handle = nv.nvmlDeviceGetHandleByUUID(full.encode())
            self.nv = nv
        except Exception as error:
            self.reason = f"pynvml: {type(error).__name__}: {error}"

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; the counter moves about every 20 to 100 ms."""
        try:
            return self.nv.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3 if self.nv else None
        except Exception as error:
            self.reason = f"energy: {error}"
            return None

    def joules(self, run: Callable[[], object], n: int, sync: Callable[[], object]) -> float | None:
        """Of one of n executions."""
        sync()
        before = self.energy_j()
        if before is None:
            return None
        for _ in range(n):
            run()
        sync()
        after = self.energy_j()
        return (after - before) / n if after and after > before else None

    def clocks(self) -> dict | None:
        return _answers(self.nv, self.handle, NOW) if self.nv else None


def gpu_state(uuid: str | None = None) -> dict:
    """Clocks, power, temperature, throttle reasons and driver, now: from NVML, else from nvidia-smi."""
    monitor = Monitor(uuid)
    if monitor.nv:
        return {"source": "pynvml", **_answers(monitor.nv, monitor.handle, STATE)}
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"source": None, "reason": f"{monitor.reason}; nvidia-smi: not found"}
    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,temperature.gpu,"
        "clocks_throttle_reasons.active"
    )
    try:
        query = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"source": None, "reason": f"{monitor.reason}; nvidia-smi: {error}"}
    values = [v.strip() for v in text.strip().splitlines()[0].split(",")]
    return {"source": "nvidia-smi", **dict(zip(fields.split(","), values, strict=False))}
