"""GPUs of the cost model: ceilings from data sheets, and the assumed achievable share of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.validation import require

MIB = 2**20


@dataclass(frozen=True)
class GPU:
    """Ceilings of one GPU. Every `*_fraction`, `*_us` and `l2_gb_s` is an assumption."""

    name: str
    match: tuple[str, ...]  # words that torch's name of the device contains, all of them
    hbm_gb_s: float  # data sheet
    l2_gb_s: float  # achievable, reads of rows of 1 kB and more
    l2_bytes: float
    tflop_s: dict[str, float]  # data sheet, dense, by unit; half precision accumulating in fp32
    sms: int
    clock_ghz: float
    arch: int = 90  # as `launch.device.capability` gives it: the launch settings that are modelled
    without: tuple[str, ...] = ()  # words that the name must not contain
    hbm_fraction: float = 0.9
    gemm_fraction: float = 0.8  # of a library GEMM of thousands of rows
    issue_fraction: float = 0.5  # of 4 instructions a clock and multiprocessor, for code full of barriers
    launch_us: float = 2.0  # device time of a kernel beyond its work: ramp, tail, gap to the next
    memory_gb: float = 0.0  # data sheet; 0: unknown
    link_gb_s: float = 0.0  # data sheet, each way: NVLink or Infinity Fabric to all GPUs of a node, else PCIe
    link_fraction: float = 0.8  # of what collectives reach, of the network between nodes too

    def bytes_per_s(self, level: str) -> float:
        """Return the achievable bandwidth of "HBM" or "L2"."""
        return 1e9 * (self.hbm_gb_s * self.hbm_fraction if level == "HBM" else self.l2_gb_s)

    def flop_per_s(self, unit: str) -> float:
        """Return the achievable FLOP/s of a unit of `tflop_s`, or of "tf32x3"."""
        rate = self.tflop_s["tf32"] / 3 if unit == "tf32x3" else self.tflop_s[unit]  # three tf32 products each
        return 1e12 * rate * self.gemm_fraction

    def instructions_per_s(self) -> float:
        """Return the achievable warp instructions a second of the whole GPU."""
        return 4e9 * self.sms * self.clock_ghz * self.issue_fraction


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "tf32": tf32, "float32": fp32}


# Data sheets: NVIDIA A100 (2021), H100 (2023), H200 (2024), HGX B200, L40S; whitepapers "NVIDIA Ada GPU Architecture"
# and "NVIDIA RTX Blackwell GPU Architecture", appendix A; AMD Instinct MI300X (2023). Tensor rates are dense (half of
# those quoted with sparsity); GeForce rates accumulate in fp32. The L40S has the whole L2 of its die, as the L40.
# Achievable L2: 5.5 TB/s on H100 and H200 (the same die), from the study of these kernels; A100 the same share of its
# 5,120 B a clock. RTX 4090 and MI300X (its Infinity Cache) are near figures of Chips and Cheese, RTX 5090 and L40S are
# scaled from the 4090. B200 is a guess above its HBM.
_TABLE = (
    GPU("A100", ("a100", "80gb"), 2039, 4200, 40 * MIB, _rates(312, 156, 19.5), 108, 1.41, 80, ("pcie",)),
    GPU("H100", ("h100", "hbm3"), 3350, 5500, 50 * MIB, _rates(989, 494, 67), 132, 1.75, 90, ("nvl", "pcie")),
    GPU("H200", ("h200",), 4800, 5500, 60 * MIB, _rates(989, 494, 67), 132, 1.75, 90, ("nvl", "gh200")),
    GPU("B200", ("b200",), 8000, 10000, 126 * MIB, _rates(2250, 1125, 75), 148, 1.85, 100, ("gb200",)),
    GPU("RTX4090", ("rtx", "4090"), 1008, 5000, 72 * MIB, _rates(165, 82.6, 82.6), 128, 2.52, 89, ("4090 d",)),
    GPU("RTX5090", ("rtx", "5090"), 1792, 6000, 96 * MIB, _rates(209, 105, 105), 170, 2.41, 120, ("5090 d",)),
    GPU("L40S", ("l40s",), 864, 5000, 96 * MIB, _rates(362, 183, 91.6), 142, 2.52, 89),
    GPU("MI300X", ("mi300x",), 5300, 11900, 256 * MIB, _rates(1307, 654, 163), 304, 2.1, 0x942),
)
# Memory, and the link of a GPU each way: NVLink 3, 4 and 5 are quoted as 600, 900 and 1,800 GB/s of both directions,
# Infinity Fabric as 896; 16 lanes of PCIe 4 and 5 have 32 and 64. A B200's memory is an eighth of HGX's.
_MEMORY_AND_LINK = {
    "A100": (80, 300), "H100": (80, 450), "H200": (141, 450), "B200": (180, 900), "RTX4090": (24, 32),
    "RTX5090": (32, 64), "L40S": (48, 32), "MI300X": (192, 448),
}  # fmt: skip
GPUS = {
    gpu.name: replace(gpu, memory_gb=memory, link_gb_s=link)
    for gpu in _TABLE
    for memory, link in [_MEMORY_AND_LINK[gpu.name]]
}
DEFAULT_GPU = "H200"

# Between nodes of NODE_GPUS: one port of 400 Gb/s InfiniBand a GPU (NVIDIA ConnectX-7; DGX H100 and H200 have eight).
NODE_GPUS, NETWORK_GB_S = 8, 50.0
# Assumptions: a collective's own launch and synchronisation; each of its steps inside a node, and between nodes.
COLLECTIVE_US, LINK_STEP_US, NETWORK_STEP_US = 10.0, 1.0, 3.0
PARTIAL_DEVICE = ("mig ", "laptop", "max-q")  # words in the name of a device that is not the data sheet's


def gpu_named(name: str) -> GPU:
    """Return a GPU of the table by its key, in upper or lower case.

    Raises:
        ValueError: a name not in the table.
    """
    key = next((key for key in GPUS if key.lower() == str(name).lower()), None)
    require(key is not None, "gpu", f"one of {', '.join(GPUS)}", repr(name))
    return GPUS[key]


def gpu_of_device(name: str) -> GPU | None:
    """Return the GPU that torch's name of a device denotes ("NVIDIA H200" is H200); None if it is not in the table."""
    name = name.lower()
    for gpu in GPUS.values():
        if all(w in name for w in gpu.match) and not any(w in name for w in (*gpu.without, *PARTIAL_DEVICE)):
            return gpu
    return None
