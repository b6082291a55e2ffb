"""The cost model beside what was measured: fields of a row, and the operations of a profile."""

from __future__ import annotations

from collections import defaultdict

from sparc_kernels.tools import cost

from .plan import MAIN_MODE, Group
from .provider import Provider

# the model's operations -> the package's operators that do them; AuxK also uses those of the main loss
DOING = {
    "centre": ("centre",), "select": ("select",), "values": ("gather_values", "inverse_index"),
    "inverse index": ("gather_values", "inverse_index"), "counters": ("count_fired_",),
    "losses + dv": ("decode_grads",), "dW_dec": ("decode_grads",), "dW_enc": ("latent_reduce_",),
    "weights, terms": ("target_weights", "loss_terms", "scale_"),
    "AuxK": ("dead_first", "select_each", "gather_errors", "residuals", "add_auxk"), "d pre_bias": ("pre_bias_grads",),
    "casts": ("torch",), "update without gradients": ("latent_adam_", "adam_scalars_"),
}  # fmt: skip


def roofline_seconds(op: cost.Op, gpu: cost.GPU) -> float:
    """The least time of its parts one after the other: bytes through memory and cache, FLOPs; no launches, no padding,
    no instructions."""
    return sum(
        max(
            p.hbm(gpu) / gpu.bytes_per_s("HBM"), p.l2 / gpu.bytes_per_s("L2"),
            p.flops / gpu.flop_per_s(p.unit if p.unit in gpu.tflop_s else "float32"),
        )
        for p in op.parts
    )  # fmt: skip


def row_fields(group: Group, p: Provider, mode: str, median: float, gpu: cost.GPU | None) -> dict:
    """Fields of a row by the cost model; none for a mode or a provider that it does not know."""
    if p.model is None or mode not in (MAIN_MODE.get(group.op, "forward"), "step"):
        return {}
    op = p.model(s := group.case.cost_shape(group.dtype, gpu))
    if op is None:
        return {}
    if mode == "step":
        op = cost.total("step", [op, *p.after(s)])
    bound = 1e3 * roofline_seconds(op, gpu) if gpu else None
    predicted = None
    if gpu and gpu.name in cost.GPUS:  # launches and padding included; there is no such model of a CPU
        training = group.op == "training"
        predicted = 1e3 * (cost.step_seconds(op, gpu, p.graph) if training else op.seconds(gpu))
    return {
        "bytes": op.l2, "flops": op.flops, "gb_s": op.l2 / median / 1e6,
        "tflop_s": op.flops / median / 1e9 or None, "roofline_ms": bound,
        "roofline_fraction": bound / median if bound else None, "predicted_ms": predicted,
    }  # fmt: skip


def profile_ops(ops: dict[str, cost.Op], parts: list[dict], gpu: cost.GPU | None) -> dict | None:
    """The model's operations with the measured time of the operators that do them; None for an unknown device."""
    if gpu is None or gpu.name not in cost.GPUS:
        return None
    measured, shared = {part["name"]: part["ms"] for part in parts}, defaultdict(list)
    for op in ops.values():
        shared[DOING.get(op.name.split(" (")[0]) or (op.name,)].append(op)
    rows = []
    for doing, some in shared.items():
        times = [measured[name] for name in doing if name in measured]
        rows.append({
            "name": ", ".join(op.name for op in some), "operators": list(doing),
            "measured_ms": sum(times) if times else None,
            "modelled_ms": 1e3 * sum(op.seconds(gpu) for op in some), "launches": sum(op.launches for op in some),
            "bound": cost.total("", some).bound(gpu),
        })  # fmt: skip
    return {"gpu": gpu.name, "modelled_ms": sum(row["modelled_ms"] for row in rows), "ops": rows}


# ------------------------------------------------------------------------------------------------------- device's rates


def roofline_of(data: dict) -> dict | None:
    """The record's `roofline` from the ceilings that this run measured; None until there are enough."""
    rates: dict[str, float] = {}
    for row in data["results"]:
        if row["op"] == "ceiling" and row["status"] == "ok":
            name = f"{row['provider']} {row['dtype']}"
            rates[name] = max((row["tflop_s"] if row["provider"] == "GEMM" else row["gb_s"]) or 0.0, rates.get(name, 0))
    if not all(any(name.startswith(ceiling) for name in rates) for ceiling in ("GEMM", "copy")):
        return None
    source = "bytes and FLOPs of sparc_kernels.cost over the ceilings that this run measured"
    return {"modelled": True, "rates": rates, "source": source}


def sheet_of(gpu: cost.GPU) -> dict:
    return {"modelled": True, "source": f"data sheet of {gpu.name}, fractions of sparc_kernels.cost"}


def measured_gpu(name: str, rates: dict[str, float]) -> cost.GPU:
    """A device with measured rates, for the roofline alone."""
    gemm, copy, gather = (
        {n.split(" ", 1)[1]: rate for n, rate in rates.items() if n.startswith(ceiling)}
        for ceiling in ("GEMM", "copy", "gather")
    )
    full = gemm.get("float32") or max(gemm.values())
    half = gemm.get("bfloat16") or full
    hbm = max(copy.values())
    units = {"float32": full, "tf32": gemm.get("tf32") or full, "bfloat16": half, "float16": half}
    cache = max(hbm, *gather.values()) if gather else hbm
    return cost.GPU(name, (), hbm, cache, 32 * 2**20, units, 1, 1.0, hbm_fraction=1, gemm_fraction=1)
