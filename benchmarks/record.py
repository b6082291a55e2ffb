"""The JSON of a run: its schema, atomic writing, validation, and what reports and plots read off it.

docs/benchmarks.md describes every field.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20
SCHEMA = "sparc_kernels.benchmark/2"  # 1 was gpu_report's and official_cpu's
STATUS = ("ok", "wrong", "failed", "out of memory", "skipped", "running")
NUMBER, MAYBE = (int, float), (int, float, None)
ROW = {  # name -> types, None where "absent" is an answer
    **dict.fromkeys(("provider", "op", "case", "data", "sweep"), (str,)), "shape": (dict,), "mode": (str,),
    "dtype": (str,), "status": (str,), "reason": (str, None), "verified": (bool, None), "verification": (dict, None),
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "noise"), MAYBE), "n": (int, None), "rounds": (int, None),
    "round_ms": (list, None), "peak_bytes": (int, None), "gradient_bytes": (int, None),
    **dict.fromkeys(("bytes", "flops", "gb_s", "tflop_s", "roofline_ms", "roofline_fraction", "energy_j"), MAYBE),
    "clocks": (dict, None), "interleaved": (bool, None), "others_cpu": MAYBE,
}  # fmt: skip
LATER = dict.fromkeys(("predicted_ms", "host_ms", "ours_ms"), MAYBE)  # rows of this schema may lack them
TOP = {
    "schema": (str,), "complete": (bool,), "stopped": (str, None), "started": (str,), "finished": (str, None),
    "seconds": MAYBE, "settings": (dict,), "environment": (dict,), "providers": (list,), "results": (list,),
    "profiles": (list,), "roofline": (dict, None),
}  # fmt: skip
PARTS = {
    "settings": ("device", "threads", "seed", "method", "clock", "quick", "minutes", "filter"),
    "environment": (
        "device", "device_name", "date", "commit", "dirty", "versions", "cores", "threads", "load_before", "nvml",
    ),
}  # fmt: skip
KEY = ("op", "case", "data", "provider", "mode", "dtype")


class SchemaError(ValueError):
    """Not a record: says where, what was expected and what came."""


def key(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def key_beside(row: dict) -> dict:
    """What rows of other providers beside this one have in common with it."""
    return {name: row[name] for name in KEY if name != "provider"}


def of_job(data: dict, row: dict) -> list[dict]:
    """The rows of all modes of what a row is of."""
    return [r for r in data["results"] if all(r[name] == row[name] for name in KEY if name != "mode")]


def bury(data: dict, reason: str) -> None:
    """Marks what was at work when its process ended, so that the next does not try it again."""
    active, data["active"] = data.get("active"), None
    for row in active["rows"] if active else ():
        if not of_job(data, row):
            data["results"].append({**row, "status": "failed", "reason": reason})


def empty_row(**known) -> dict:
    return {**dict.fromkeys((*ROW, *LATER)), "sweep": "", "status": "running", "reason": "the run ended in it", **known}


# ------------------------------------------------------------------------------------------------------------- checking


def _check(where: str, value, types) -> None:
    kinds = tuple(t for t in types if t is not None)
    fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not (fits or (value is None and None in types)):
        names = " or ".join("null" if t is None else t.__name__ for t in types)
        raise SchemaError(f"{where}: expected {names}, got {value!r}"[:300])


def _check_fields(where: str, entry: dict, fields: dict) -> None:
    for name, types in fields.items():
        if name not in entry:
            raise SchemaError(f"{where}.{name}: missing")
        if types:
            _check(f"{where}.{name}", entry[name], types)


def validate(data, where: str = "record") -> dict:
    """The record itself; SchemaError names the field that is wrong."""
    _check(where, data, (dict,))
    if data.get("schema") != SCHEMA:
        raise SchemaError(f"{where}.schema: expected {SCHEMA!r}, got {data.get('schema')!r}")
    _check_fields(where, data, TOP)
    for part, names in PARTS.items():
        _check_fields(f"{where}.{part}", data[part], dict.fromkeys(names))
    seen = set()
    for i, row in enumerate(data["results"]):
        at = f"{where}.results[{i}]"
        _check(at, row, (dict,))
        _check_fields(at, {**dict.fromkeys(LATER), **row}, ROW | LATER)
        _check_row(at, row)
        if key(row) in seen:
            raise SchemaError(f"{at}: a second row for {' | '.join(key(row))}")
        seen.add(key(row))
    return data


def _check_row(at: str, row: dict) -> None:
    status, times = row["status"], (row["p20_ms"], row["median_ms"], row["p80_ms"])
    if status not in STATUS:
        raise SchemaError(f"{at}.status: expected one of {', '.join(STATUS)}, got {status!r}")
    if status == "ok":
        if row["verified"] is False:
            raise SchemaError(f"{at}: status ok with verified false")
        if None in times or not 0 <= times[0] <= times[1] <= times[2]:
            raise SchemaError(f"{at}: expected p20_ms <= median_ms <= p80_ms, got {', '.join(map(str, times))}")
    elif not row["reason"]:
        raise SchemaError(f"{at}.reason: expected one with status {status!r}, got {row['reason']!r}")
    elif row["median_ms"] is not None:
        raise SchemaError(f"{at}.median_ms: expected null with status {status!r}, got {row['median_ms']}")


# ------------------------------------------------------------------------------------------------- reading and writing


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


# ------------------------------------------------------------------------------------------------ for reports and plots


def ok(data: dict, /, **wanted) -> list[dict]:
    """Measured rows with these values."""
    return [r for r in data["results"] if r["status"] == "ok" and all(r[n] == value for n, value in wanted.items())]


def ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mib(size: int | None) -> str:
    return f"{size / MIB:,.0f} MiB" if size else "-"


def case_of(row: dict, form: str = ", {}") -> str:
    """The case's name, with its data where that is not Gaussian."""
    return row["case"] + ("" if row["data"] == "gaussian" else form.format(row["data"]))


def widths_of(row: dict) -> str:
    return "/".join(map(str, row["shape"]["d_streams"]))


def commit_of(env: dict) -> str:
    return f"{str(env['commit'])[:7]}{' with changes' if env['dirty'] else ''}"


def where(data: dict) -> str:
    """Device, versions, commit and date in one line."""
    env, s = data["environment"], data["settings"]
    parts = [env["device_name"]]
    if env["device"] == "cpu":
        parts += [f"{env['cores']} cores", f"{s['threads']} thread{'s' if s['threads'] > 1 else ''}"]
        parts += ["times are CPU time of the process"] if s["clock"] == "cpu" else []
    return ", ".join([*parts, f"torch {env['versions'].get('torch')}", env["date"][:10], f"commit {commit_of(env)}"])


def load_of(data: dict) -> str:
    """Load averages, and the share of the cores that others had."""
    before, after = (data["environment"].get(f"load_{when}") for when in ("before", "after"))
    if before is None:
        return "load not known"
    others = [r["others_cpu"] for r in ok(data) if r["others_cpu"] is not None]
    busy = f"; other processes had up to {100 * max(others):.0f} % of the cores while rows were timed" if others else ""
    return f"load average {before} before" + ("" if after is None else f", {after} after (its own included)") + busy
