"""Two records row by row: faster, slower, or the same within the noise that both runs state.

That noise has two parts: what each run saw within itself, and what changed between the runs for code that is not this
package's (another placement in memory, a virtual machine's neighbours, heat). Peers and ceilings are controls: rows of
the same case, timed in turns with ours, whose change in either direction is the machine's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .record import commit_of, key

Key = tuple[str, ...]
FLOOR = {"cpu": 0.05, "cuda": 0.02}  # change that is ignored whatever the noise: clocks, placement, heat
# providers whose change is this package's
OURS = ("ours", "ours, CUDA graph", "ours, training_step", "SparcAdam", "unit norm, projection")
VERDICTS = ("faster", "slower", "same", "too noisy", "machine", "new", "missing", "not comparable", "not measured")
SAME = {"environment": ("device", "device_name", "cores", "threads"), "settings": ("method", "clock", "seed", "tiny")}


@dataclass(frozen=True)
class Row:
    key: Key
    verdict: str
    old_ms: float | None = None
    new_ms: float | None = None
    noise: float | None = None  # relative change that both runs' spreads and the machine's own change explain
    reason: str | None = None

    @property
    def change(self) -> float | None:
        """new / old - 1."""
        return None if self.old_ms is None or self.new_ms is None else self.new_ms / self.old_ms - 1

    def __str__(self):
        if self.change is None:
            return f"{self.verdict:15} {_name(self.key)}" + (f": {self.reason}" if self.reason else "")
        return (
            f"{self.verdict:15} {_name(self.key)}: {self.old_ms:.4g} -> {self.new_ms:.4g} ms, {100 * self.change:+.1f} "
            f"% (noise {100 * self.noise:.1f} %)"
        )


def _name(key: Key) -> str:
    return " | ".join(part for part in key if part != "gaussian")


def why_not(old: dict, new: dict) -> str | None:
    """Why times of the two records are not comparable; None when they are."""
    for part, names in SAME.items():
        for name in names:
            a, b = old[part].get(name), new[part].get(name)
            if a != b:
                return f"{name} differs: {a!r} then, {b!r} now"
    return None


def _by_key(data: dict) -> dict[Key, dict]:
    return {key(r): r for r in data["results"]}


def compare(old: dict, new: dict) -> list[Row]:
    """A verdict for every row of either record.

    Noise: both runs' own (half of p20 to p80 over the median), FLOOR, and the largest change of a control. A change
    counts when it is larger; where the noise is half of the time or more, when it is a factor of 1.8 between spreads
    that do not overlap, and a smaller one above 1.25 is too noisy to tell. A ceiling that changed says `machine`.
    """
    reason, before, after = why_not(old, new), _by_key(old), _by_key(new)
    changes = controls(before, after)
    rows = []
    for k in [*after, *(k for k in before if k not in after)]:
        a, b = before.get(k), after.get(k)
        if a is None or b is None:
            rows.append(Row(k, "new" if a is None else "missing"))
        elif reason or a["shape"] != b["shape"]:
            rows.append(Row(k, "not comparable", reason=reason or "the shape differs"))
        elif "ok" not in (a["status"], b["status"]):
            rows.append(Row(k, "not measured", reason=f"{a['status']} then, {b['status']} now"))
        elif a["status"] != "ok":
            rows.append(Row(k, "new", reason=f"{a['status']} then"))
        elif b["status"] != "ok":
            rows.append(Row(k, "missing", reason=f"{b['status']} now: {b['reason']}"))
        else:
            full = before.get(_full(k), {}).get("median_ms")
            after_backward = 1 - full / a["median_ms"] if full and k[4] == "step" else 0.0
            rows.append(_times(k, a, b, FLOOR[new["environment"]["device"]], _drift(changes, k, after_backward)))
    return rows


def _full(key: Key) -> Key:
    return (*key[:4], "full", key[5])


def _times(k: Key, a: dict, b: dict, floor: float, drift: float) -> Row:
    old, new = a["median_ms"], b["median_ms"]
    noise = (1 + floor + a["noise"] + b["noise"]) * (1 + drift) - 1
    ratio, direction, verdict = max(new / old, old / new), "slower" if new > old else "faster", "same"
    if ratio - 1 > noise:
        verdict = direction
    elif noise >= 0.5 and ratio > 1.25:
        apart = b["p20_ms"] > a["p80_ms"] if new > old else b["p80_ms"] < a["p20_ms"]
        verdict = direction if apart and ratio >= 1.8 else "too noisy"
    return Row(k, "machine" if k[0] == "ceiling" and verdict == direction else verdict, old, new, noise)


# ------------------------------------------------------------------------------------------------------------- controls


@dataclass(frozen=True)
class Control:
    """How much a row of other code changed, in either direction, as a factor less one."""

    key: Key
    change: float

    def speaks_for(self, key: Key) -> bool:
        """Rows of the same case, data and precision by another provider; ceilings for every row of their case."""
        op, case, data, provider, _, dtype = self.key
        return (case, data) == key[1:3] and provider != key[3] and (op == "ceiling" or dtype == key[5])


def controls(before: dict[Key, dict], after: dict[Key, dict]) -> list[Control]:
    """Of peers and ceilings that both runs timed; of their steps, what follows the backward (memory alone)."""
    changes = []
    for k, b in after.items():
        a, full = before.get(k), _full(k)
        if k[3] in OURS or a is None or not a["status"] == b["status"] == "ok":
            continue
        times = [a["median_ms"], b["median_ms"]]
        if k[4] == "step":
            wholes = [rows.get(full, row) for rows, row in ((before, a), (after, b))]
            if any(row["status"] != "ok" for row in wholes):
                continue
            k, times = (*k[:4], "optimizer", k[5]), [t - w["median_ms"] for t, w in zip(times, wholes, strict=True)]
        if min(times) > 0:
            changes.append(Control(k, max(times) / min(times) - 1))
    return changes


def _drift(changes: list[Control], k: Key, after_backward: float) -> float:
    """The largest change of a row's controls; for the part of it that follows the backward, of such parts."""
    mine = [c for c in changes if c.speaks_for(k)]
    rest, tail = (
        max((c.change for c in mine if (c.key[4] == "optimizer") == tail), default=0.0) for tail in (False, True)
    )
    return (1 - after_backward) * rest + after_backward * tail


# -------------------------------------------------------------------------------------------------------------- results


def regressions(rows: list[Row], percent: float) -> list[Row]:
    """Rows slower beyond noise and by more than `percent`, and rows that worked before and do not now."""
    return [
        r for r in rows
        if (r.verdict == "slower" and 100 * r.change > percent) or (r.verdict == "missing" and r.reason)
    ]  # fmt: skip


def report(old: dict, new: dict, rows: list[Row]) -> str:
    """As text: machine and versions, verdicts counted, then every row that is not `same`, then those."""
    counts = {v: sum(r.verdict == v for r in rows) for v in VERDICTS}
    head = []
    for word, data in (("then", old), ("now", new)):
        env, cut = data["environment"], "" if data["complete"] else f", incomplete ({data['stopped']})"
        head.append(
            f"{word}: {env['device_name']}, torch {env['versions'].get('torch')}, commit {commit_of(env)}, "
            f"{env['date'][:16]}, load {env.get('load_before')} before{cut}"
        )
    if moved := sorted(controls(_by_key(old), _by_key(new)), key=lambda c: -c.change):
        head.append(
            f"machine: {len(moved)} controls (peers, ceilings) changed by {100 * moved[len(moved) // 2].change:.0f} % "
            f"(median), at most {100 * moved[0].change:.0f} % ({_name(moved[0].key)}); part of the noise of their cases"
        )
    head.append(", ".join(f"{n} {v}" for v, n in counts.items() if n))
    order = sorted(rows, key=lambda r: (r.verdict == "same", -abs(r.change or 0)))
    return "\n".join([*head, *map(str, order)])
