"""Two records row by row: faster, slower, or the same within the noise that both runs state.

That noise has two parts: what each run saw within itself, and what changed between the runs for code that is not this
package's (another process' placement in memory, a virtual machine's neighbours, heat). Peers and ceilings show the
second: rows of the same case, timed in turns with ours, whose change in either direction is the machine's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .record import commit_of, key

FLOOR = {"cpu": 0.05, "cuda": 0.02}  # change below which nothing is said whatever the noise: clocks, placement, heat
# providers whose change is this package's
OURS = ("ours", "ours, CUDA graph", "ours, training_step", "SparcAdam", "unit norm, projection")
VERDICTS = ("faster", "slower", "same", "too noisy", "machine", "new", "missing", "not comparable", "not measured")


@dataclass(frozen=True)
class Row:
    key: tuple[str, ...]
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
        name = " | ".join(part for part in self.key if part != "gaussian")
        if self.change is None:
            return f"{self.verdict:15} {name}" + (f": {self.reason}" if self.reason else "")
        return (
            f"{self.verdict:15} {name}: {self.old_ms:.4g} -> {self.new_ms:.4g} ms, {100 * self.change:+.1f} % "
            f"(noise {100 * self.noise:.1f} %)"
        )


def why_not(old: dict, new: dict) -> str | None:
    """Why times of the two records cannot be set against each other; None when they can."""
    for part, names in (
        ("environment", ("device", "device_name", "cores", "threads")),
        ("settings", ("method", "clock", "seed", "tiny")),
    ):
        for name in names:
            a, b = old[part].get(name), new[part].get(name)
            if a != b:
                return f"{name} differs: {a!r} then, {b!r} now"
    return None


def compare(old: dict, new: dict) -> list[Row]:
    """A verdict for every row of either record. Noise: both runs' own (half of p20 to p80 over the median), FLOOR, and
    the largest change of a control (`controls`). A change counts when it is larger. Where the noise is half of the time
    and more, a factor of 1.8 between spreads that do not overlap counts still, and a smaller one above 1.25 is said to
    be too noisy to tell. A ceiling that changed says `machine`: no code of anybody's did."""
    reason = why_not(old, new)
    before = {key(r): r for r in old["results"]}
    after = {key(r): r for r in new["results"]}
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
            full = before.get((*k[:4], "full", k[5]), {}).get("median_ms")
            after_backward = 1 - full / a["median_ms"] if full and k[4] == "step" else 0.0
            rows.append(_times(k, a, b, FLOOR[new["environment"]["device"]], _drift(changes, k, after_backward)))
    return rows


@dataclass(frozen=True)
class Control:
    """How much a row of someone else's code changed, in either direction, as a factor less one."""

    key: tuple[str, ...]
    change: float

    def speaks_for(self, key: tuple[str, ...]) -> bool:
        """Rows of the same case, data and precision by another provider; ceilings for every row of their case."""
        op, case, data, provider, _, dtype = self.key
        return (case, data) == key[1:3] and provider != key[3] and (op == "ceiling" or dtype == key[5])


def _drift(changes: list[Control], k: tuple[str, ...], after_backward: float) -> float:
    """The largest change of what speaks for a row; of the part of it that follows the backward, of such parts."""
    mine = [c for c in changes if c.speaks_for(k)]
    rest, tail = (
        max((c.change for c in mine if (c.key[4] == "optimizer") == tail), default=0.0) for tail in (False, True)
    )
    return (1 - after_backward) * rest + after_backward * tail


def controls(before: dict, after: dict) -> list[Control]:
    """Of peers and ceilings that both runs timed; of their steps, what follows the backward (memory alone)."""
    found = []

    def add(k, old: float, new: float) -> None:
        if old > 0 and new > 0:
            found.append(Control(k, max(new / old, old / new) - 1))

    for k, b in after.items():
        a = before.get(k)
        if k[3] in OURS or a is None or not a["status"] == b["status"] == "ok":
            continue
        full = (*k[:4], "full", k[5])
        if k[4] != "step":
            add(k, a["median_ms"], b["median_ms"])
        elif all(rows.get(full, a)["status"] == "ok" for rows in (before, after)):
            tails = (rows[k]["median_ms"] - rows[full]["median_ms"] for rows in (before, after))
            add((*k[:4], "optimizer", k[5]), *tails)
    return found


def _times(k, a: dict, b: dict, floor: float, drift: float) -> Row:
    old, new = a["median_ms"], b["median_ms"]
    noise = (1 + floor + a["noise"] + b["noise"]) * (1 + drift) - 1
    ratio = max(new / old, old / new)
    change = ratio - 1
    verdict = "same"
    if change > noise:
        verdict = "slower" if new > old else "faster"
    elif noise >= 0.5 and ratio > 1.25:
        apart = b["p20_ms"] > a["p80_ms"] if new > old else b["p80_ms"] < a["p20_ms"]
        verdict = ("slower" if new > old else "faster") if apart and ratio >= 1.8 else "too noisy"
    if k[0] == "ceiling" and verdict in ("faster", "slower"):
        verdict = "machine"
    return Row(k, verdict, old, new, noise)


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
        env = data["environment"]
        head.append(
            f"{word}: {env['device_name']}, torch {env['versions'].get('torch')}, commit {commit_of(env)}, "
            f"{env['date'][:16]}, load {env.get('load_before')} before"
            + ("" if data["complete"] else f", incomplete ({data['stopped']})")
        )
    before, after = ({key(r): r for r in data["results"]} for data in (old, new))
    if moved := sorted(controls(before, after), key=lambda c: -c.change):
        worst = " | ".join(part for part in moved[0].key if part != "gaussian")
        head.append(
            f"machine: {len(moved)} controls (peers, ceilings) changed by {100 * moved[len(moved) // 2].change:.0f} % "
            f"(median), at most {100 * moved[0].change:.0f} % ({worst}); part of the noise of their cases"
        )
    head.append(", ".join(f"{n} {v}" for v, n in counts.items() if n))
    order = sorted(rows, key=lambda r: (r.verdict == "same", -abs(r.change or 0)))
    return "\n".join([*head, *map(str, order)])
