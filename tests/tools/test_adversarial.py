"""`sparc-kernels verify --adversarial`: ours passes, and every set finds the faulty selectors that it is made for."""

import json
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from conftest import CUDA

from sparc_kernels import cli, reference
from sparc_kernels.core._triton import HAS_TRITON
from sparc_kernels.ops import selection
from sparc_kernels.tools.verify import adversarial
from sparc_kernels.tools.verify import run as verify

CPU = torch.device("cpu")
QUICK = adversarial.plan_of("cpu", quick=True)


def best(scores, k):
    return reference.topk_indices(scores.double(), k)


def among(columns, row, k):
    """The best k of some columns of a row, the first column where there are too few."""
    selected = columns[best(row[columns][None], min(k, len(columns)))[0]]
    return torch.cat([selected, selected.new_zeros(k - len(selected))])


def by_row(fn):
    return wraps(fn)(lambda h, k: torch.stack([fn(row, k) for row in h]))


def bits(h):
    """Integers in the order of the values, -0 below +0."""
    raw = h.float().view(torch.int32)
    return raw ^ ((raw >> 31) & 0x7FFFFFFF)


@by_row
def bucket_of_4096(row, k):
    """Radix selection: the first 4,096 columns of the threshold's bucket, by sign and 7 bits, are kept."""
    bucket = bits(row) >> 24
    at = bucket[best(row[None], k)[0, -1]]
    return among(torch.cat([(bucket > at).nonzero(), (bucket == at).nonzero()[:4096]]).squeeze(1).sort().values, row, k)


@by_row
def ties_of_2048(row, k):
    """The list of ties starts anew after 2,048."""
    threshold = row[best(row[None], k)[0, -1]]
    ties = (row == threshold).nonzero()
    ties = ties[(len(ties) - 1) // 2048 * 2048 :] if len(ties) else ties
    above = (row > threshold) | row.isnan()
    return among(torch.cat([above.nonzero(), ties]).squeeze(1).sort().values, row, k)


def sampled(part):
    """A threshold from a sixteenth of the row, and room for 16 k columns above it."""

    @by_row
    @wraps(part)
    def select(row, k):
        sample = part(row, max(len(row) // 16, 1))
        threshold = sample[best(sample[None], min(k // 16 + 4, len(sample)))[0, -1]]
        return among((~(row < threshold)).nonzero().squeeze(1)[: 16 * k], row, k)

    return select


def at_the_end(row, n):
    return row[-n:]


def at_the_start(row, n):
    return row[:n]


@by_row
def ring_of_1024(row, k):
    """Columns at or above the k-th largest maximum of 32, the last 1,024 of them."""
    groups = torch.cat([row, row.new_full((-len(row) % 32,), -torch.inf)]).view(-1, 32).amax(1)
    floor = groups[best(groups[None], k)[0, -1]] if len(groups) >= k else -torch.inf
    return among((~(row < floor)).nonzero().squeeze(1)[-1024:], row, k)


def one_of_each_group(h, k):
    """Groups of 4 whose second best is never looked at, as long as there are k groups."""
    width = 4 if h.shape[1] >= 4 * k else 1
    groups = torch.nn.functional.pad(h, (0, -h.shape[1] % width), value=-torch.inf).view(len(h), -1, width)
    firsts = best(groups, 1).squeeze(2) + torch.arange(groups.shape[1]) * width
    return firsts.gather(1, best(h.gather(1, firsts.clamp(max=h.shape[1] - 1)), k))


@by_row
def whole_groups(row, k):
    """Columns behind the last whole group of 16 are not read."""
    return among(torch.arange(len(row) // 16 * 16), row, k)


def padded_with_zero(h, k):
    return best(torch.nn.functional.pad(h, (0, -h.shape[1] % 128)), k)


def infinity_as_padding(h, k):
    return best(torch.where(h.isinf(), -torch.inf, h), k)


def minus_infinity_as_taken(h, k):
    """Marks what is taken by -inf and finds column 0 once nothing else is left."""
    indices = best(h, k)
    return torch.where(h.gather(1, indices) == -torch.inf, 0, indices)


def nan_last(h, k):
    return best(h.nan_to_num(-torch.inf, torch.inf, -torch.inf), k)


def compared_in_half(h, k):
    return best(h.bfloat16(), k)


def keys_of_29_bits(h, k):
    return best(torch.where(h.isnan(), 2**31 - 1, bits(h + 0.0)) >> 3, k)


def zeros_by_sign(h, k):
    return best(torch.where(h.isnan(), 2**31 - 1, bits(h)), k)


def flushed(h, k):
    return best(torch.where(h.abs() < torch.finfo(h.dtype).smallest_normal, 0, h), k)


def keys_that_overflow(h, k):
    return best(torch.where(h.isfinite(), h.clamp(-6e4, 6e4), h), k)


def order_of_the_row_before(h, k):
    """Behind a row that ascends only the last sixteenth is looked at."""
    indices = best(h, k)
    for r in range(1, len(h)):
        if h.shape[1] > 1000 and (h[r - 1].diff() >= 0).all() and h[r - 1, 0] < h[r - 1, -1]:
            first = h.shape[1] * 15 // 16
            indices[r] = first + best(h[r : r + 1, first:], k)[0]
    return indices


def half_for_large_batches(h, k):
    return best(h.bfloat16() if len(h) >= 64 else h, k)


def one_more_read(h, k):
    h.topk(k + 1)
    return best(h, k)


def squeezed(h, k):
    return best(h, k).squeeze(1)


def at_most_256(h, k):
    return best(h, min(k, 256))


def provider(fn):
    def select(logits, batch, k):
        h = logits if batch is None else logits[batch]
        indices = fn(h, k)
        inside = indices.clamp(0, h.shape[1] - 1)
        return h.gather(1, inside) if indices.dim() == 2 else h, indices

    return adversarial.Provider("planted", select, ordered=True)


def failed(outcomes):
    return {o.set for o in outcomes if o.verdict != "exact"}


MANY_TIES = (
    "ties, many inf, -inf, near 100, one value, last bit, equal, borders, at k, zeros, alternating, NaN, batchmates"
)
SAMPLED = (
    "ties, ascending, infinities, -inf, frequency, last bit, one a group, one group, at k, zeros, alternating, NaN, "
)
SAMPLED += "k = 1, k = N, k = 512, batchmates"
PLANTED = {
    bucket_of_4096: "bucket, -inf, near 100, one value, last bit, NaN, batchmates",
    ties_of_2048: MANY_TIES,
    ring_of_1024: f"infinities, {MANY_TIES}",
    sampled(at_the_end): f"tail, {SAMPLED}",
    sampled(at_the_start): f"descending, {SAMPLED}",
    one_of_each_group: "bucket, ties, ascending, descending, many inf, -inf, frequency, near 100, one value, last bit, "
    "equal, one group, borders, at k, tail, negative, zeros, subnormal, largest, any bits, alternating, "
    "NaN, batchmates",
    whole_groups: "ascending, infinities, -inf, frequency, one group, tail, alternating, k = 1, k = N, k = 512, N = 3, "
    "batchmates",
    padded_with_zero: "ascending, descending, infinities, -inf, last bit, equal, tail, negative, zeros, alternating, "
    "k = N, k = 512, N = 3",
    infinity_as_padding: "infinities, many inf",
    minus_infinity_as_taken: "-inf",
    nan_last: "NaN",
    compared_in_half: "bucket, ascending, -inf, frequency, near 100, one value, last bit, subnormal, largest, "
    "any bits, batchmates",
    keys_of_29_bits: "near 100, one value, last bit, subnormal, largest",
    zeros_by_sign: "zeros, k = 512",
    flushed: "subnormal",
    keys_that_overflow: "largest, any bits",
    order_of_the_row_before: "alternating, batchmates",
    half_for_large_batches: "batchmates",
    one_more_read: "k = N",
    squeezed: "k = 1",
    at_most_256: "k = 512",
}


@pytest.mark.parametrize(("fn", "sets"), PLANTED.items(), ids=lambda x: x.__name__ if callable(x) else "")
def test_a_faulty_selector_fails_the_sets_that_are_made_for_it(fn, sets):
    outcomes = adversarial.run_sets([provider(fn)], QUICK, CPU)
    assert failed(outcomes) == set(sets.split(", "))
    refusals = {"RuntimeError: selected index k out of range"} if fn is one_more_read else set()
    for note in {o.note for o in outcomes if o.verdict == "refused"} - refusals:
        assert note.startswith("ValueError: indices: expected shape"), "it raised: no answer was judged"
    assert all(o.note for o in outcomes if o.verdict != "exact")


def test_every_set_finds_a_fault_and_none_in_a_sound_selector():
    assert {name for sets in PLANTED.values() for name in sets.split(", ")} == {some.name for some in adversarial.SETS}
    assert not failed(adversarial.run_sets([provider(best)], QUICK, CPU))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(CUDA, reason="there are kernels to run")
@pytest.mark.interpreter
def test_kernels_are_exact_in_the_interpreter(monkeypatch):
    sound, levels = selection.select_config, []
    monkeypatch.setattr(selection, "select_config", lambda *a: levels.append(sound(*a)) or levels[-1])
    providers = adversarial.ours("triton", CPU, interpret=True)
    few = "^(?!k = 512)"  # a quarter of the time; `verify --interpret --adversarial` has it
    outcomes = adversarial.run_sets(providers, adversarial.plan_of("interpret", quick=True), CPU, few)
    assert {c.span > c.group for c in levels} == {True, False}
    assert not failed(outcomes), [o for o in outcomes if not o.passed]
    assert {o.set for o in outcomes} == {some.name for some in adversarial.SETS} - {"k = 512"}
    assert {o.way for o in outcomes} == set(adversarial.WAYS)


def command(capsys, *words):
    code = cli.main(["verify", "--adversarial", "--quick", "--device", "cpu", "--impl", "torch", *words])
    return code, capsys.readouterr()


def test_the_command_passes_and_writes_json(tmp_path, capsys):
    file = tmp_path / "adversarial.json"
    code, said = command(capsys, "--json", str(file))
    assert code == 0, said.out
    assert max(map(len, said.out.splitlines())) <= 110
    for some in adversarial.SETS:
        assert f"\n{some.name:<11} {some.about:<34} exact           exact  " in said.out
    report = json.loads(file.read_text())
    assert report["complete"] and report["passed"] and report["options"]["adversarial"]
    assert {r["set"] for r in report["results"]} == {some.name for some in adversarial.SETS}
    ways = {r["way"] for r in report["results"] if r["provider"] == "ours"}
    assert ways == {way for way, (_, kernels) in adversarial.WAYS.items() if not kernels}
    assert {r["dtype"] for r in report["results"]} == {"fp32", "bf16"}


def test_a_fault_of_ours_is_seen_in_every_way_and_ends_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(selection, "_topk_exact", lambda h, k: h.nan_to_num(-torch.inf).topk(k).indices)
    code, said = command(capsys, "--filter", "NaN|descending", "--json", str(tmp_path / "x.json"))
    assert code == 1 and "NaN, ours, fp32 N4999 k17 together: wrong" in said.out
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    ways = {r["way"] for r in rows if r["set"] == "NaN" and r["provider"] == "ours" and r["verdict"] == "wrong"}
    assert ways == {way for way, (_, kernels) in adversarial.WAYS.items() if not kernels}


def test_values_are_judged(capsys, monkeypatch):
    sound = adversarial.encode_topk
    monkeypatch.setattr(adversarial, "encode_topk", lambda *a: (lambda i, v: (i, v.flip(2)))(*sound(*a)))
    code, said = command(capsys, "--filter", "descending")
    assert code == 1 and "row 0: a value that is not at its index" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--filter", "no such set"), "filter: expected a pattern found in the name of a set"),
        (("--filter", "("), "unterminated"),
        (("--device", "nowhere"), "nowhere"),
    ],
)
def test_impossible_requests_exit_with_2(words, message, capsys):
    code, said = command(capsys, *words)
    assert code == 2 and message in said.err


# ---------------------------------------------------------------------------------------------------------------- peers


def installed(monkeypatch, **modules):
    """Peers as if they were installed and could run here."""
    monkeypatch.setattr(adversarial, "_absent", lambda *_: "")
    monkeypatch.setattr(adversarial.importlib, "import_module", lambda name: modules[name.split(".")[0]])
    adversarial._sparsify.cache_clear()
    return adversarial.peers(CPU)[1:]


def fused_encoder(x, w, bias, k, activation):
    """sparsify's definition: the top k behind the ReLU, in any order."""
    h = torch.relu(torch.nn.functional.linear(x, w, bias))
    return *h.topk(k, sorted=False), h


def test_peers_are_called_and_judged_by_what_they_promise(monkeypatch):
    providers = installed(
        monkeypatch,
        flashinfer=SimpleNamespace(top_k=lambda h, k: tuple(part.flip(1) for part in h.topk(k))),
        sparsify=SimpleNamespace(fused_encoder=fused_encoder),
    )
    outcomes = adversarial.run_sets(providers, QUICK, CPU, "negative|infinities|NaN|zeros|N = 3|batch")
    assert not failed(outcomes), outcomes
    assert {(o.provider, o.set) for o in outcomes if o.set == "NaN"} == set()
    adversarial._sparsify.cache_clear()


def test_a_peer_that_is_wrong_or_raises_is_no_failure_of_ours(monkeypatch):
    def top_k(h, k):
        if k == 17:
            raise ValueError("k must be a power of two")
        return h.topk(k, largest=False)

    (peer, _) = installed(monkeypatch, flashinfer=SimpleNamespace(top_k=top_k))
    outcomes = adversarial.run_sets([peer], QUICK, CPU, "descending|N = 3")
    assert all(o.passed for o in outcomes)
    lines = list(adversarial.table(outcomes, [peer]))
    assert lines[1].split()[-1] == "refused" and lines[2].endswith("wrong (8 rows)")
    assert "k must be a power of two" in "".join(lines[3:])


def test_who_is_absent_says_why():
    flashinfer, sparsify = adversarial.peers(CPU)[1:]
    for peer, package in ((flashinfer, "flashinfer-python"), (sparsify, "eai-sparsify")):
        assert peer.absent in (f"not installed (pip install {package})", "needs CUDA")
        assert list(adversarial.table([], [peer]))[-1] == f"{peer.name}: {peer.absent}"


def test_what_a_lost_device_did_not_answer_is_refused(monkeypatch):
    def crash(h, k):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(adversarial, "device_lost", lambda device: "the GPU does not answer")
    first, *rest = adversarial.run_sets([provider(crash)], QUICK, CPU, "descending|ties")
    assert "illegal memory access" in first.note and first.verdict == "refused"
    assert rest and {(o.verdict, o.note) for o in rest} == {("refused", "the GPU does not answer")}


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_are_listed_for_the_compiler(monkeypatch):
    given = []
    monkeypatch.setattr(verify, "compile_all", lambda lists, *_: given.extend(lists))
    verify.compile_checks(90, quick=True, filter="k = 1|batchmates", adversarial_sets=True)
    assert {one.args[0] for one in given} == set(adversarial.WAYS) - {"spans"}
    kernels = {one.args[0]: {x.kernel.split(":")[1] for x in one()} for one in given if one.args[3] == torch.bfloat16}
    assert all("_select_kernel" in some for some in kernels.values())
    assert {way for way, some in kernels.items() if "_row_maxima_kernel" in some} == {"library"}
    assert {way for way, some in kernels.items() if "_encode_kernel" not in some} == {"library"}
