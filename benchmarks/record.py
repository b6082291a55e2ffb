"""The JSON of a run: its schema, written atomically, validated when it is read. docs/benchmarks.md describes it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

SCHEMA = "sparc_kernels.benchmark/2"  # 1 was gpu_report's and official_cpu's
STATUS = ("ok", "wrong", "failed", "out of memory", "skipped", "running")
NUMBER = (int, float)
ROW = {  # name -> types, None where "absent" is an answer
    "provider": (str,), "op": (str,), "case": (str,), "data": (str,), "sweep": (str,), "shape": (dict,), "mode": (str,),
    "dtype": (str,), "status": (str,), "reason": (str, None), "verified": (bool, None), "verification": (dict, None),
    "median_ms": (*NUMBER, None), "p20_ms": (*NUMBER, None), "p80_ms": (*NUMBER, None), "noise": (*NUMBER, None),
    "n": (int, None), "rounds": (int, None), "round_ms": (list, None), "peak_bytes": (int, None),
    "gradient_bytes": (int, None), "bytes": (*NUMBER, None), "flops": (*NUMBER, None), "gb_s": (*NUMBER, None),
    "tflop_s": (*NUMBER, None), "roofline_ms": (*NUMBER, None), "roofline_fraction": (*NUMBER, None),
    "energy_j": (*NUMBER, None), "clocks": (dict, None), "interleaved": (bool, None),
    "others_cpu": (*NUMBER, None),
}  # fmt: skip
# fields that rows of this schema may lack: they came after it
LATER = {"predicted_ms": (*NUMBER, None), "host_ms": (*NUMBER, None), "ours_ms": (*NUMBER, None)}
TOP = {
    "schema": (str,), "complete": (bool,), "stopped": (str, None), "started": (str,), "finished": (str, None),
    "seconds": (*NUMBER, None), "settings": (dict,), "environment": (dict,), "providers": (list,), "results": (list,),
    "profiles": (list,), "roofline": (dict, None),
}  # fmt: skip
SETTINGS = ("device", "threads", "seed", "method", "clock", "quick", "minutes", "filter")
ENVIRONMENT = (
    "device",
    "device_name",
    "date",
    "commit",
    "dirty",
    "versions",
    "cores",
    "threads",
    "load_before",
    "nvml",
)
KEY = ("op", "case", "data", "provider", "mode", "dtype")


class SchemaError(ValueError):
    """A record that is not what it should be: says where, what was expected and what came."""


def key(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def of_provider(data: dict, group, provider: str) -> list[dict]:
    """The rows of one provider in a `plan.Group`."""
    mine = (group.op, group.case.name, group.case.data, provider, group.dtype)
    return [r for r in data["results"] if (r["op"], r["case"], r["data"], r["provider"], r["dtype"]) == mine]


def empty_row(**known) -> dict:
    return {**dict.fromkeys((*ROW, *LATER)), "sweep": "", "status": "running", "reason": "the run ended in it", **known}


def _check(where: str, value, types) -> None:
    if value is None and None in types:
        return
    kinds = tuple(t for t in types if t is not None)
    is_bool = isinstance(value, bool)
    if value is None or not isinstance(value, kinds) or (is_bool and bool not in kinds):
        names = " or ".join("null" if t is None else t.__name__ for t in types)
        raise SchemaError(f"{where}: expected {names}, got {value!r}"[:300])


def validate(data, where: str = "record") -> dict:
    """The record itself; SchemaError names the field that is wrong."""
    if not isinstance(data, dict):
        raise SchemaError(f"{where}: expected an object, got {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise SchemaError(f"{where}.schema: expected {SCHEMA!r}, got {data.get('schema')!r}")
    for name, types in TOP.items():
        if name not in data:
            raise SchemaError(f"{where}.{name}: missing")
        _check(f"{where}.{name}", data[name], types)
    for part, names in (("settings", SETTINGS), ("environment", ENVIRONMENT)):
        for name in names:
            if name not in data[part]:
                raise SchemaError(f"{where}.{part}.{name}: missing")
    seen = set()
    for i, row in enumerate(data["results"]):
        at = f"{where}.results[{i}]"
        _check(at, row, (dict,))
        for name, types in ROW.items():
            if name not in row:
                raise SchemaError(f"{at}.{name}: missing")
            _check(f"{at}.{name}", row[name], types)
        for name, types in LATER.items():
            _check(f"{at}.{name}", row.get(name), types)
        if row["status"] not in STATUS:
            raise SchemaError(f"{at}.status: expected one of {', '.join(STATUS)}, got {row['status']!r}")
        if row["status"] == "ok":
            if row["verified"] is False:
                raise SchemaError(f"{at}: status ok with verified false")
            if row["median_ms"] is None or not 0 <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]:
                raise SchemaError(f"{at}: expected p20_ms <= median_ms <= p80_ms, got {row['p20_ms']}, "
                                  f"{row['median_ms']}, {row['p80_ms']}")  # fmt: skip
        elif not row["reason"]:
            raise SchemaError(f"{at}.reason: expected one with status {row['status']!r}, got {row['reason']!r}")
        elif row["median_ms"] is not None:
            raise SchemaError(f"{at}.median_ms: expected null with status {row['status']!r}, got {row['median_ms']}")
        if key(row) in seen:
            raise SchemaError(f"{at}: a second row for {' | '.join(key(row))}")
        seen.add(key(row))
    return data


def load(path: Path) -> dict:
    """Read and validated. SchemaError for what is not a record, OSError where there is no file."""
    text = Path(path).read_text()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(f"{Path(path).name}: not JSON: {error}") from error
    return validate(data, Path(path).name)


def save(path: Path, data: dict) -> None:
    """To a temporary file that then takes the name: a reader, or a kill, never meets half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(_text(_plain(data)))
    os.replace(part, path)


def _text(data: dict) -> str:
    """One line for each entry of a list: a row is a line."""
    fields = []
    for name, value in data.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
        fields.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _plain(value):
    """JSON knows no NaN: such numbers become strings. Numbers are cut to six digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
