"""The shape of one training step, for traces, the audit, tuning, the cost model and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.validation import TORCH_NAMES, check_int, precision_name, require
from ..launch.budgets import MAX_K, MAX_STREAMS

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """One training step: sizes, arithmetic and the GPU architecture it is modelled for.

    Args:
        B: rows of each stream.
        N: latents.
        k: active latents a row.
        d_streams: width of each stream.
        dtype: of the arithmetic, and of the parameters unless `autocast`.
        auxk: dead latents selected for AuxK in each row; 0 without AuxK.
        dead: dead latents of each stream.
        tf32: whether torch's float32 matmul precision allows tf32.
        autocast: whether parameters are float32 and rounded to `dtype` in every step.
        compiled: under torch.compile, where gradients are not computed in the forward.
        arch: architecture whose launch settings the cost model uses, as `launch.device.capability` gives it; traces
            take their own argument.

    Raises:
        ValueError: a field out of its range.
    """

    B: int
    N: int
    k: int
    d_streams: tuple[int, ...]
    dtype: str = "bfloat16"
    auxk: int = 0
    dead: int = 0
    tf32: bool = False
    autocast: bool = False
    compiled: bool = False
    arch: int = 90

    def __post_init__(self):
        values = {name: check_int(name, getattr(self, name), 1) for name in ("B", "N")}
        limit = f"at most N and {MAX_K}"
        values["k"] = check_int("k", self.k, 1, min(self.N, MAX_K), limit)
        values["auxk"] = check_int("auxk", self.auxk, 0, min(self.N, MAX_K), limit)
        values["dead"] = check_int("dead", self.dead, 0, self.N, "N")
        ok = isinstance(self.d_streams, tuple) and 1 <= len(self.d_streams) <= MAX_STREAMS
        require(ok, "d_streams", f"a tuple of 1..{MAX_STREAMS} widths", repr(self.d_streams))
        values["d_streams"] = tuple(check_int(f"d_streams[{s}]", d, 1) for s, d in enumerate(self.d_streams))
        for name, value in values.items():
            object.__setattr__(self, name, value)  # NumPy's and torch's ints become Python's
        require(self.dtype in ITEMSIZE, "dtype", f"one of {', '.join(ITEMSIZE)}", repr(self.dtype))
        require(not (self.autocast and self.dtype == "float32"), "autocast", "a half precision dtype", self.dtype)

    @property
    def S(self) -> int:
        """Number of streams."""
        return len(self.d_streams)

    @property
    def D(self) -> int:
        """Sum of the widths."""
        return sum(self.d_streams)

    @property
    def M(self) -> int:
        """Entries of the index matrix, B k."""
        return self.B * self.k

    @property
    def e(self) -> int:
        """Bytes of a weight in the arithmetic."""
        return ITEMSIZE[self.dtype]

    def record(self) -> dict:
        """Return the shape for JSON; `d` is one width if all streams share it, else one for each."""
        d = self.d_streams[0] if len(set(self.d_streams)) == 1 else self.d_streams
        return {"B": self.B, "N": self.N, "k": self.k, "d": d, "S": self.S, "dtype": self.dtype}

    def __str__(self):
        same = len(set(self.d_streams)) == 1
        widths = f"{self.S} x {self.d_streams[0]}" if same else "/".join(map(str, self.d_streams))
        return f"B {self.B}, N {self.N}, k {self.k}, d {widths}, {self.dtype}"


def parse_shape(text: str) -> Shape:
    """Parse "B,N,k,d,S", optionally with ",PRECISION"; widths that differ are given as 1024/768/768.

    Args:
        text: for example "4096,32768,64,1024,3" or "256,8192,64,1024/768/768,3,fp32"; PRECISION is bf16 (default),
            fp16 or fp32.

    Raises:
        ValueError: another form, or sizes out of range.
    """
    parts = text.split(",")
    widths = parts[3].split("/") if len(parts) > 3 else []
    numbers = [*parts[:3], *widths, *parts[4:5]]
    if len(parts) not in (5, 6) or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in numbers):
        raise ValueError(f"--shape: expected B,N,k,d,S[,PRECISION] with positive integers, got {text!r}")
    precision = precision_name(parts[5]) if len(parts) == 6 else "bf16"
    if precision not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"--shape: expected PRECISION bf16, fp16 or fp32, got {parts[5]!r}")
    B, N, k, S = (int(parts[i]) for i in (0, 1, 2, 4))
    if k > min(N, MAX_K) or S > MAX_STREAMS or len(widths) not in (1, S):
        raise ValueError(
            f"--shape: expected k <= min(N, {MAX_K}), S <= {MAX_STREAMS} and one width or S of them, got {text!r}"
        )
    return Shape(B, N, k, tuple(map(int, widths)) * (S if len(widths) == 1 else 1), TORCH_NAMES[precision])
