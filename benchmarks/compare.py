"""Two records row by row: faster, slower, or the same within the noise that both runs state."""

from __future__ import annotations

from dataclasses import dataclass

from .record import key

FLOOR = {"cpu": 0.05, "cuda": 0.02}  # change below which nothing is said whatever the noise: clocks, placement, heat
VERDICTS = ("faster", "slower", "same", "too noisy", "new", "missing", "not comparable", "not measured")


@dataclass(frozen=True)
class Row:
    key: tuple[str, ...]
    verdict: str
    old_ms: float | None = None
    new_ms: float | None = None
    noise: float | None = None  # relative change that both runs' spreads explain
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
    """A verdict for every row of either record. Noise: both runs' own (half of p20 to p80 over the median) and FLOOR.
    A change counts when it is larger. Where the noise is half of the time and more, a factor of 1.8 between spreads
    that do not overlap counts still, and a smaller one above 1.25 is said to be too noisy to tell."""
    reason = why_not(old, new)
    before = {key(r): r for r in old["results"]}
    after = {key(r): r for r in new["results"]}
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
            rows.append(_times(k, a, b, FLOOR[new["environment"]["device"]]))
    return rows


def _times(k, a: dict, b: dict, floor: float) -> Row:
    old, new = a["median_ms"], b["median_ms"]
    noise = floor + a["noise"] + b["noise"]
    ratio = max(new / old, old / new)
    change = ratio - 1
    verdict = "same"
    if change > noise:
        verdict = "slower" if new > old else "faster"
    elif noise >= 0.5 and ratio > 1.25:
        apart = b["p20_ms"] > a["p80_ms"] if new > old else b["p80_ms"] < a["p20_ms"]
        verdict = ("slower" if new > old else "faster") if apart and ratio >= 1.8 else "too noisy"
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
        commit = f"{str(env['commit'])[:7]}{' with changes' if env['dirty'] else ''}"
        load = env.get("load_before")
        head.append(
            f"{word}: {env['device_name']}, torch {env['versions'].get('torch')}, commit {commit}, {env['date'][:16]}, "
            f"load {load} before" + ("" if data["complete"] else f", incomplete ({data['stopped']})")
        )
    head.append(", ".join(f"{n} {v}" for v, n in counts.items() if n))
    order = sorted(rows, key=lambda r: (r.verdict == "same", -abs(r.change or 0)))
    return "\n".join([*head, *map(str, order)])
