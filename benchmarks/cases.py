"""What the benchmarks run: shapes, seeded tensors, and who computes each op (the providers).

Bytes, FLOPs and the time they should take are those of `sparc_kernels.cost`. Nothing is measured in this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sparc_kernels import AlignedSAE, cost, decode_nmse, inverse_index, reference
from sparc_kernels._ops import resolve_impl
from sparc_kernels.dead import select_dead
from sparc_kernels.decoder import decode_grads
from sparc_kernels.encode import centre_for, gather_values, select_latents
from sparc_kernels.gather import KEEP_NONE
from sparc_kernels.latent_grads import latent_reduce

DEAD = 0.1  # fraction of latents that are dead where AuxK is measured
DEAD_THRESHOLD = 1000

# --------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    N: int
    k: int
    d_streams: tuple[int, ...]
    auxk: int

    @property
    def S(self) -> int:
        return len(self.d_streams)

    @property
    def D(self) -> int:
        return sum(self.d_streams)

    @property
    def streams(self) -> dict[str, int]:
        return {f"s{i}": d for i, d in enumerate(self.d_streams)}

    def shape(self, dtype: str, /, auxk: bool = False, **how) -> cost.Shape:
        """What the cost model needs to know."""
        aux = {"auxk": self.auxk, "dead": len(range(0, self.N, round(1 / DEAD)))} if auxk else {}
        return cost.Shape(self.B, self.N, self.k, self.d_streams, **{"dtype": dtype, **aux, **how})

    def __str__(self):
        return f"{self.name}: B {self.B}, N {self.N}, k {self.k}, d {'/'.join(map(str, self.d_streams))}"


# auxk as in the official configuration
CASES = {name: Case(name, s.B, s.N, s.k, s.d_streams, 64) for name, s in cost.CASES.items()}
# the same five for a CPU: each keeps what is special about it (streams, k that is no power of two, N against k)
TINY = {
    c.name: c
    for c in (
        Case("A", 16, 128, 8, (24, 16, 16), 8),
        Case("B", 64, 256, 8, (24, 16, 16), 8),
        Case("C", 64, 1024, 8, (36, 24, 24), 8),
        Case("D", 48, 256, 12, (18,) * 8, 8),
        Case("E", 64, 2048, 4, (42,), 8),
    )
}
# -------------------------------------------------------------------------------------------------------------- tensors


class Bench:
    """Seeded tensors of one case on one device, made when first asked for; the providers of a group share them.

    Rows of the inputs have unit norm, as the data has. Weights are AlignedSAE's initialisation, drawn in float32 and
    then rounded, so that every dtype computes the same problem. Only one model is kept at a time.
    """

    def __init__(self, case: Case, device: str, seed: int = 0):
        self.case, self.device, self.seed = case, torch.device(device), seed
        self._made: dict[Any, Any] = {}

    def clear(self) -> None:
        self._made.clear()

    def once(self, key, make: Callable[[], Any]):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _generator(self, offset: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def xs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """[B, d_s] for each stream, rows of unit norm."""

        def make():
            gen = self._generator(1)
            xs = [torch.randn(self.case.B, d, device=self.device, generator=gen) for d in self.case.d_streams]
            return [(x / (x.norm(dim=1, keepdim=True) + 1e-8)).to(dtype) for x in xs]

        return self.once(("xs", dtype), make)

    def model(self, dtype: torch.dtype, auxk: bool = False) -> AlignedSAE:
        """In training mode. With auxk, every tenth latent is dead and its bias keeps it out of the main selection."""

        def make():
            c = self.case
            for key in [key for key in self._made if key[0] == "model"]:
                del self._made[key]
            torch.manual_seed(self.seed)
            model = AlignedSAE(
                c.streams, c.N, c.k, c.auxk if auxk else None, dead_steps_threshold=DEAD_THRESHOLD, device=self.device
            ).to(dtype)
            if auxk:
                every = round(1 / DEAD)
                with torch.no_grad():
                    for s, d in c.streams.items():
                        # a pre-activation has standard deviation (3 d)^-1/2: still positive for some rows
                        model.latent_biases[s][::every] = -1.6 * (3 * d) ** -0.5
                        getattr(model, f"stats_last_nonzero_{s}")[::every] = 10 * DEAD_THRESHOLD
            return model

        return self.once(("model", dtype, auxk), make)

    def params(self, dtype: torch.dtype, auxk: bool = False) -> tuple[list, list, list, list]:
        """w_encs, w_decs, pre_biases, latent_biases of the model, in stream order."""
        m = self.model(dtype, auxk)
        return (
            [m.encoders[s].weight for s in m.streams],
            [m.decoders[s].weight for s in m.streams],
            [m.pre_biases[s] for s in m.streams],
            [m.latent_biases[s] for s in m.streams],
        )

    def weights(self, dtype: torch.dtype, auxk: bool = False) -> tuple[list, list, list, list]:
        """`params` without gradients, for the ops."""
        return tuple([p.detach() for p in group] for group in self.params(dtype, auxk))

    def wide(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The streams side by side: x [B, D] and W_enc [N, D], what one library GEMM wants."""
        return self.once(("wide", dtype), lambda: (torch.cat(self.xs(dtype), 1), torch.cat(self.weights(dtype)[0], 1)))

    def indices(self, dtype: torch.dtype) -> torch.Tensor:
        """int64 [B, k], a real selection made by torch alone."""

        def make():
            w_encs = self.weights(dtype)[0]
            rows = max(1, 2**30 // (8 * self.case.N))
            parts = zip(*(x.split(rows) for x in self.xs(dtype)), strict=True)
            logits = (sum(x @ w.T for x, w in zip(part, w_encs, strict=True)) for part in parts)
            return torch.cat([h.topk(self.case.k).indices for h in logits])

        return self.once(("indices", dtype), make)

    def values(self) -> torch.Tensor:
        """float32 [S, B, k], all positive, of the size that activations have."""
        shape = self.case.S, self.case.B, self.case.k
        return self.once("values", lambda: 0.1 * torch.rand(shape, device=self.device, generator=self._generator(2)))

    def errors(self, dtype: torch.dtype, t: int) -> torch.Tensor:
        """[S, B, d_t] stand-ins for the errors R - x."""
        c = self.case
        shape = (c.S, c.B, c.d_streams[t])
        return self.once(
            ("errors", dtype, t),
            lambda: torch.randn(shape, device=self.device, generator=self._generator(3 + t)).mul_(0.03).to(dtype),
        )

    def dense_codes(self, dtype: torch.dtype) -> torch.Tensor:
        """[S B, N], what a dense decoder's gradient reads."""

        def make():
            c = self.case
            dense = torch.zeros(c.S, c.B, c.N, device=self.device, dtype=dtype)
            index = self.indices(dtype).expand(c.S, -1, -1)
            return dense.scatter_(2, index, self.values().to(dtype)).view(c.S * c.B, c.N)

        return self.once(("codes", dtype), make)


# ------------------------------------------------------------------------------------------------------------ providers


@dataclass
class Job:
    """Something ready to be timed. `reset` runs before each `run`, outside the clock."""

    run: Callable[[], Any]
    reset: Callable[[], None] = lambda: None
    peak_bytes: int | None = None  # given where a measurement around `run` cannot see it
    grads: Callable[[], list] | None = None  # what `run` leaves behind, to compare


@dataclass(frozen=True)
class Provider:
    """One way to compute one op. An op's first provider is ours (or the ceiling); the others are compared with it."""

    op: str
    name: str
    dtype: str
    make: Callable[[Bench], Job]
    formula: Callable[[cost.Shape], cost.Op] | None = None  # of `sparc_kernels.cost`
    compare: str | None = None  # "ids", "tensor" or None: how outputs are set against the first provider's
    seconds: float = 8.0  # what it takes on a GPU, compilation included: decides whether it is still begun
    modelled: bool = True  # whether `formula` describes what this provider does, or only what the op is about
    graph: bool = False  # replayed from a CUDA graph
    how: dict = field(default_factory=dict)  # of cost.Shape, where not the defaults

    def op_cost(self, case: Case) -> cost.Op | None:
        return self.formula(case.shape(self.dtype, **self.how)) if self.formula else None

    def predicted_seconds(self, case: Case, gpu: cost.GPU) -> float | None:
        """Modelled seconds on that GPU; None where there is no model of what this provider does."""
        op = self.op_cost(case) if self.modelled else None
        if op is None:
            return None
        return cost.step_seconds(op, gpu, self.graph) if self.op.startswith("step") else op.seconds(gpu)


@contextlib.contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def library_topk():
    """The reference with torch.topk, as the official code selects, in place of the stable sort that defines ties."""
    before = reference.topk_indices
    reference.topk_indices = _library_topk
    try:
        yield
    finally:
        reference.topk_indices = before


def _library_topk(h, k):
    return h.topk(k, dim=-1).indices


def _clear_grads(params):
    def reset():
        for p in params:
            p.grad = None

    return reset


def _grads(params):
    return lambda: [p.grad for p in params]


def _autocast(b: Bench, enabled: bool):
    return torch.autocast(b.device.type, dtype=torch.bfloat16, enabled=enabled)


def ours_step(
    dtype: str, *, precision: str = "highest", autocast: bool = False, auxk: bool = False, graph: bool = False
):  # fmt: skip
    """Forward, loss and backward of AlignedSAE; the optimizer is measured apart."""

    def make(b: Bench) -> Job:
        dt = getattr(torch, dtype)
        model = b.model(dt, auxk)
        inputs = dict(zip(model.streams, b.xs(dt), strict=True))
        params = list(model.parameters())
        reset = _clear_grads(params)

        def run():
            with matmul_precision(precision):
                with _autocast(b, autocast):
                    loss, _ = model.compute_loss(model(inputs), inputs)
                loss.backward()
            return loss.detach()

        if graph:
            return _captured(b, run, reset, params)
        return Job(run, reset, grads=_grads(params))

    return make


def _captured(b: Bench, run, reset, params) -> Job:
    """The same in a CUDA graph: warm-up on a side stream, capture, replays. Gradients live in the graph's pool."""
    if b.device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a CUDA device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            reset()
            run()
    torch.cuda.current_stream().wait_stream(side)
    reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    peak = torch.cuda.max_memory_allocated() - base

    def replay():
        graph.replay()
        return loss

    return Job(replay, peak_bytes=peak, grads=_grads(params))


def reference_step(
    dtype: str, *, precision: str = "highest", autocast: bool = False, auxk: bool = False, compiled: bool = False,
    stable_sort: bool = False,
):  # fmt: skip
    """reference.training_loss and its backward on the parameters of the same model."""

    def make(b: Bench) -> Job:
        c, dt = b.case, getattr(torch, dtype)
        xs, params = b.xs(dt), b.params(dt, auxk)
        dead = list(b.model(dt, auxk).get_dead_neurons().values()) if auxk else None
        leaves = [p for group in params for p in group]

        def loss_fn():
            return reference.training_loss(xs, *params, c.k, auxk_k=c.auxk if auxk else None, dead=dead)

        if compiled:
            torch._dynamo.reset()
            backend = "inductor" if b.device.type == "cuda" else "aot_eager"
            loss_fn = torch.compile(loss_fn, dynamic=False, backend=backend)

        def run():
            with matmul_precision(precision):
                with _autocast(b, autocast), contextlib.nullcontext() if stable_sort else library_topk():
                    loss = loss_fn()
                loss.backward()
            return loss.detach()

        return Job(run, _clear_grads(leaves), grads=_grads(leaves))

    return make


def step_providers() -> list[Provider]:
    """The step without AuxK: ours first, then the reference, eager."""
    bf, fp = "bfloat16", "float32"
    ours, dense = cost.step, cost.dense_step
    rounded, tf32 = {"dtype": bf, "autocast": True}, {"tf32": True}
    return [
        Provider("step", "ours bf16", bf, ours_step(bf), ours, seconds=25),
        Provider("step", "ours bf16 graph", bf, ours_step(bf, graph=True), ours, graph=True),
        Provider("step", "ours bf16 autocast", fp, ours_step(fp, autocast=True), ours, how=rounded),
        Provider("step", "reference bf16 autocast", fp, reference_step(fp, autocast=True), dense, how=rounded),
        Provider("step", "reference tf32", fp, reference_step(fp, precision="high"), dense, how=tf32),
        Provider("step", "reference fp32", fp, reference_step(fp), dense),
        Provider("step", "ours tf32", fp, ours_step(fp, precision="high"), ours, seconds=20, how=tf32),
        Provider("step", "ours fp32", fp, ours_step(fp), ours, seconds=20),
        Provider("step", "reference bf16", bf, reference_step(bf), dense),
        Provider("step", "reference fp32 stable sort", fp, reference_step(fp, stable_sort=True), dense, modelled=False),
    ]


def compiled_providers() -> list[Provider]:
    """The reference under torch.compile. Compared with ours of the step group by the recorded loss."""
    bf, fp = "bfloat16", "float32"
    options = {
        "bf16 autocast": ({"autocast": True}, {"dtype": "bfloat16", "autocast": True}),
        "tf32": ({"precision": "high"}, {"tf32": True}),
        "fp32": ({}, {}),
    }
    return [
        Provider(
            "step", f"compiled {name}", fp, reference_step(fp, compiled=True, **flags), cost.dense_step, seconds=45,
            how={"compiled": True, **how},
        )
        for name, (flags, how) in options.items()
    ] + [
        Provider(
            "step", "compiled bf16", bf, reference_step(bf, compiled=True), cost.dense_step, seconds=45,
            how={"compiled": True},
        )
    ]  # fmt: skip


def auxk_step_providers() -> list[Provider]:
    """The step with AuxK over a tenth of the latents."""
    bf, fp = "bfloat16", "float32"
    ours, aux = cost.step, {"auxk": True}
    rounded = {"dtype": bf, "autocast": True, **aux}
    return [
        Provider("step+auxk", "ours bf16", bf, ours_step(bf, auxk=True), ours, seconds=20, how=aux),
        Provider("step+auxk", "ours bf16 graph", bf, ours_step(bf, auxk=True, graph=True), ours, graph=True, how=aux),
        Provider("step+auxk", "ours bf16 autocast", fp, ours_step(fp, autocast=True, auxk=True), ours, how=rounded),
        Provider("step+auxk", "reference bf16 autocast", fp, reference_step(fp, autocast=True, auxk=True)),
        Provider("step+auxk", "reference fp32", fp, reference_step(fp, auxk=True)),
        Provider("step+auxk", "ours fp32", fp, ours_step(fp, auxk=True), ours, seconds=20, how=aux),
    ]


def _op(make_run: Callable[[Bench], Callable[[], Any]]) -> Callable[[Bench], Job]:
    """An op without gradients."""

    def make(b: Bench) -> Job:
        with torch.no_grad():
            return Job(torch.no_grad()(make_run(b)))

    return make


def op_providers(dtype: str) -> list[Provider]:
    """Each op of the step: ours, then what a library does for the same."""
    dt = getattr(torch, dtype)

    def encoder(b, auxk=False):
        """w_encs, latent_biases, x - pre_bias of every stream as the step has them, impl."""
        xs, (w_encs, _, pre_biases, latent_biases) = b.xs(dt), b.weights(dt, auxk)
        impl = resolve_impl("auto", xs[0])
        return w_encs, latent_biases, centre_for(xs, w_encs, pre_biases, impl), impl

    def select_ours(b):
        w_encs, latent_biases, centred, impl = encoder(b)
        return lambda: select_latents(centred, w_encs, latent_biases, b.case.k, "global", impl)

    def mm_topk(b):
        x, w = b.wide(dt)
        out = torch.empty(b.case.B, b.case.N, device=b.device, dtype=dt)
        return lambda: torch.mm(x, w.T, out=out).topk(b.case.k).indices

    def mm_alone(b):
        x, w = b.wide(dt)
        out = torch.empty(b.case.B, b.case.N, device=b.device, dtype=dt)
        return lambda: torch.mm(x, w.T, out=out)

    def values_ours(b):
        (w_encs, latent_biases, centred, impl), indices = encoder(b), b.indices(dt)
        return lambda: list(gather_values(indices, centred, w_encs, latent_biases, None, impl))

    def values_gathered(b):
        xs, w_encs, indices = b.xs(dt), b.weights(dt)[0], b.indices(dt)
        return lambda: [torch.bmm(w[indices], x[:, :, None])[..., 0].relu() for x, w in zip(xs, w_encs, strict=True)]

    def nmse_ours(b):
        _, w_decs, pre_biases, _ = b.weights(dt)
        return lambda: decode_nmse(b.indices(dt), b.values(), w_decs, pre_biases, b.xs(dt))

    def nmse_dense(b):
        _, w_decs, pre_biases, _ = b.weights(dt)
        return lambda: reference.decode_nmse(b.indices(dt), b.values().to(dt), w_decs, pre_biases, b.xs(dt))

    def nmse_bags(b):
        rows, xs, indices = [w.T for w in b.weights(dt)[1]], b.xs(dt), b.indices(dt)
        values = b.values().to(dt)

        def run():
            errors = [
                reference.nmse(F.embedding_bag(indices, w, mode="sum", per_sample_weights=v), x)
                for w, x in zip(rows, xs, strict=True)
                for v in values
            ]
            return torch.stack(errors).view(b.case.S, b.case.S)

        return run

    def grads_ours(b):
        _, w_decs, pre_biases, _ = b.weights(dt)
        impl = resolve_impl("auto", w_decs[0])
        c, indices, values, xs = b.case, b.indices(dt), b.values(), b.xs(dt)
        lists = inverse_index(indices, c.N)
        coef = torch.full((c.S, c.B), 2 / (c.S * c.B), device=b.device)
        dvalues = torch.empty_like(values)
        targets = [
            (w.t(), bias, x, torch.empty(c.N, x.shape[1], device=b.device, dtype=dt))
            for w, bias, x in zip(w_decs, pre_biases, xs, strict=True)
        ]

        def run():  # one target after the other, as the step does
            for t, (w, bias, x, dw) in enumerate(targets):
                decode_grads(
                    indices, values, w, bias, x, coef, *lists, None, KEEP_NONE, dvalues, t > 0, dw, False, impl
                )
            return dvalues

        return run

    def reduce_dec_ours(b):
        indices, values = b.indices(dt), b.values()
        errors = [b.errors(dt, t) for t in range(b.case.S)]
        lists, impl = inverse_index(indices, b.case.N), resolve_impl("auto", errors[0])

        def run():
            for e in errors:
                out = latent_reduce(lists, values, e, b.case.k, dt, impl)
            return out[0]

        return run

    def reduce_dec_dense(b):
        codes, errors = b.dense_codes(dt), [b.errors(dt, t).flatten(0, 1) for t in range(b.case.S)]

        def run():
            for e in errors:
                out = torch.mm(codes.T, e)
            return out

        return run

    def reduce_enc_ours(b):
        indices, values, xs = b.indices(dt), b.values(), b.xs(dt)
        lists, impl = inverse_index(indices, b.case.N), resolve_impl("auto", xs[0])

        def run():
            for x, v in zip(xs, values, strict=True):
                out = latent_reduce(lists, v[None], x[None], b.case.k, dt, impl)
            return out[0]

        return run

    def reduce_enc_dense(b):
        codes, xs = b.dense_codes(dt).view(b.case.S, b.case.B, b.case.N), b.xs(dt)

        def run():
            for x, code in zip(xs, codes, strict=True):
                out = torch.mm(code.T, x)
            return out

        return run

    def lists_ours(b):
        indices = b.indices(dt)
        return lambda: inverse_index(indices, b.case.N)

    def auxk_ours(b):
        w_encs, latent_biases, centred, impl = encoder(b, True)
        dead = list(b.model(dt, True).get_dead_neurons().values())

        def run():
            chosen = select_dead(centred, w_encs, latent_biases, dead, b.case.auxk, impl)
            return gather_values(chosen.indices, centred, w_encs, latent_biases, chosen.count, impl)[-1]

        return run

    def auxk_dense(b):
        xs, (w_encs, _, pre_biases, latent_biases) = b.xs(dt), b.weights(dt, True)
        dead = b.model(dt, True).get_dead_neurons().values()
        streams = list(zip(xs, w_encs, pre_biases, latent_biases, dead, strict=True))

        def run():
            with library_topk():
                for x, w, bias, c, mask in streams:
                    out = reference.auxk(reference.preactivations(x, w, bias, c), mask, b.case.auxk)
            return out[1]

        return run

    def provider(op, name, make_run, formula, compare=None, seconds=5.0, modelled=True, **how):
        return Provider(op, name, dtype, _op(make_run), formula, compare, seconds, modelled, how=how)

    return [
        provider("select", "ours", select_ours, cost.select, "ids", 15),
        provider("select", "mm + topk", mm_topk, cost.mm_topk, "ids"),
        provider("select", "mm alone", mm_alone, cost.gemm),
        provider("values", "ours", values_ours, cost.values, "tensor", 10),
        provider("values", "index + bmm", values_gathered, cost.values, "tensor", modelled=False),
        provider("decode_nmse", "ours", nmse_ours, cost.decode_nmse, "tensor", 10),
        provider("decode_nmse", "embedding_bag", nmse_bags, cost.decode_nmse, "tensor", modelled=False),
        provider("decode_nmse", "dense", nmse_dense, cost.decode_nmse, "tensor", modelled=False),
        provider("decode_grads", "ours", grads_ours, cost.decode_grads, None, 10),
        provider("latent_reduce dec", "ours", reduce_dec_ours, cost.reduce_errors, "tensor", 10),
        provider("latent_reduce dec", "dense mm", reduce_dec_dense, cost.dense_dec, "tensor"),
        provider("latent_reduce enc", "ours", reduce_enc_ours, cost.reduce_enc, "tensor", 10),
        provider("latent_reduce enc", "dense mm", reduce_enc_dense, cost.dense_enc, "tensor"),
        provider("inverse_index", "ours", lists_ours, cost.inverse_index),
        provider("auxk", "ours", auxk_ours, cost.auxk_select, "tensor", 10, auxk=True),
        provider("auxk", "dense", auxk_dense, cost.auxk_dense, "tensor", auxk=True),
    ]


def optimizer_providers() -> list[Provider]:
    """What follows the step: unit norm and projection, then torch's Adam, on float32 parameters."""

    def with_grads(b):
        model = b.model(torch.float32)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model

    def norm(b):
        model = with_grads(b)
        return Job(lambda: model.unit_norm_decoder_().project_decoder_grad_())

    def adam(**how):
        def make(b):
            model = with_grads(b)
            # lr 0 keeps the weights as they are for whoever comes next; the work is the same
            optimizer = torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-8, **how)
            return Job(lambda: optimizer.step())

        return make

    return [
        Provider("optimizer", "unit norm + projection", "float32", norm, cost.unit_norm),
        Provider("optimizer", "Adam fused", "float32", adam(fused=True), cost.adam),
        Provider("optimizer", "Adam foreach", "float32", adam(foreach=True), cost.adam, modelled=False),
    ]


def ceiling_providers(dtype: str) -> list[Provider]:
    """What the device can do at most: a library GEMM of the encoder's shape, a copy, a gather of random rows."""
    dt = getattr(torch, dtype)

    def gemm(b):
        x, w = b.wide(dt)
        out = torch.empty(b.case.B, b.case.N, device=b.device, dtype=dt)
        return lambda: torch.mm(x, w.T, out=out)

    def copy(b):
        source = torch.randn(b.case.N, b.case.D, device=b.device).to(dt)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def gather(b):
        c = b.case
        source = torch.randn(c.N, max(c.d_streams), device=b.device).to(dt)
        rows = torch.randint(c.N, (c.B * c.k,), device=b.device)
        out = torch.empty(c.B * c.k, max(c.d_streams), device=b.device, dtype=dt)
        return lambda: torch.index_select(source, 0, rows, out=out)

    return [
        Provider("gemm", "torch.mm", dtype, _op(gemm), cost.gemm),
        Provider("copy", "copy_", dtype, _op(copy), cost.copy),
        Provider("gather", "index_select", dtype, _op(gather), cost.gather),
    ]
