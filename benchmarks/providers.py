"""Who computes what: each provider is one way to compute one operation, with the reason where it is not to be had.

Operations: `training` (forward and loss, backward, and the optimizer with unit norm and projection), `encode`
(selection and values), `select` (ids alone), `decode` (losses of all reconstructions), `optimizer`, `ceiling` (what
the device can do at most). Peers that are somebody else's code are in peers.py; `everyone` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from sparc_kernels import SparcAdam, decode_nmse, encode_topk, reference
from sparc_kernels.tools import cost

from .cases import PRECISIONS, Case, Problem, groups
from .timing import Job
from .verification import Truth, distances, library_topk, precision

SLOW = 30.0  # seconds of setup from which a provider's turn comes last


@dataclass(frozen=True)
class Context:
    """Where a run takes place."""

    device: torch.device
    official: Path | None = None  # a clone of the official repository
    quick: bool = False


def always(_: Context) -> None:
    return None


def needs_cuda(context: Context) -> str | None:
    return None if context.device.type == "cuda" else "needs a CUDA device"


@dataclass(frozen=True)
class Provider:
    name: str
    op: str
    what: str
    build: Callable[[Context, Problem, str], Job]  # of one precision
    check: Callable[[Truth, str, object], tuple[dict, dict]] | None  # (errors, PyTorch's); None: nothing to verify
    dtypes: tuple[str, ...] = tuple(PRECISIONS)
    absent: Callable[[Context], str | None] = always  # the reason, when it is not to be had
    fits: Callable[[Case], str | None] = lambda case: None  # the reason, when it cannot do this shape
    # bytes and FLOPs of what it does, with the optimizer apart, and of what follows the backward in a step
    model: Callable[[cost.Shape], cost.Op] | None = None
    after: Callable[[cost.Shape], list[cost.Op]] = lambda s: [cost.unit_norm(s), cost.adam(s)]
    ops: Callable[[cost.Shape], list[cost.Op]] | None = None  # of its profile, which this one has
    how: dict = field(default_factory=dict)  # of cost.Shape
    graph: bool = False
    setup_s: float = 1.0  # what it takes before it can be timed, compilation included: on a GPU, at a large shape

    @property
    def slow(self) -> bool:
        return self.setup_s >= SLOW


# --------------------------------------------------------------------------------------------------- the training step


def _training(problem: Problem, model, loss_fn, dtype: str, parameters: dict, finish, **how) -> Job:
    """Phases of a step whose loss comes from loss_fn; `parameters` by name as the truth has them."""
    leaves = [p for group in parameters.values() for p in group]
    held: dict = {}

    def forward():
        with precision(dtype, problem.device):
            held["loss"] = loss_fn()

    def backward():
        with precision(dtype, problem.device):
            held["loss"].backward()

    def reset():
        held.clear()
        problem.reset(model, leaves)

    def result():
        return {"loss": held["loss"].detach(), **{name: [p.grad for p in ps] for name, ps in parameters.items()}}

    size = sum(p.numel() * p.element_size() for p in leaves)
    phases = {"forward": forward, "backward": backward}
    if finish:
        phases["optimizer"] = finish
    return Job(phases, reset, result, queued=False, gradient_bytes=size, close=held.clear, **how)


def check_training(truth: Truth, dtype: str, found) -> tuple[dict, dict]:
    return truth.training(dtype, found)


def _ours(context: Context, problem: Problem, dtype: str) -> Job:
    kind = PRECISIONS[dtype][0]
    model, inputs = problem.model(kind), problem.inputs(kind)

    def loss():
        return model.compute_loss(model(inputs), inputs)[0]

    def finish():
        problem.adam(ours=True).step()  # unit norm and projection are in it

    return _training(problem, model, loss, dtype, groups(model), finish)


def _ours_graph(context: Context, problem: Problem, dtype: str) -> Job:
    """Forward, loss and backward in one CUDA graph: warm-up on a side stream, capture, replays."""
    job = _ours(context, problem, dtype)

    def run():
        job.phases["forward"]()
        job.phases["backward"]()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job.reset()
            run()
    torch.cuda.current_stream().wait_stream(side)
    job.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    peak = torch.cuda.max_memory_allocated() - base
    kept = job.result()  # gradients live in the graph's pool
    model = problem.model(PRECISIONS[dtype][0])

    def reset():
        for s in problem.case.streams:
            getattr(model, f"stats_last_nonzero_{s}").copy_(problem.counters)

    def close():
        job.reset()
        kept.clear()

    phases = {"forward": graph.replay, "backward": lambda: None}
    return Job(
        phases, reset, lambda: kept, ("full",), False, job.gradient_bytes, captured_peak=peak, close=close
    )  # fmt: skip


def _ours_direct(context: Context, problem: Problem, dtype: str) -> Job:
    """`AlignedSAE.training_step`, which makes no gradients: its first step's moments hold what it took of them."""
    kind, _, autocast, _ = PRECISIONS[dtype]
    model, inputs = problem.model(kind), problem.inputs(kind)
    adam, held = SparcAdam(model, 0.0, shadow=autocast), {}

    def step():
        with precision(dtype, problem.device):
            held["loss"] = model.training_step(inputs, adam)[0]

    def reset():
        held.pop("loss", None)
        problem.reset(model, model.parameters())  # gradients that others left are refused

    reset()
    step()
    share = 1 - adam.param_groups[0]["betas"][0]
    found = {"loss": held["loss"]}
    for name, parameters in groups(model).items():
        found[name] = [adam.state[p]["exp_avg"] / share for p in parameters]
    problem.restore()
    adam.refresh_shadow()
    held["found"] = found
    phases = {"forward": lambda: None, "backward": lambda: None, "optimizer": step}
    return Job(phases, reset, lambda: held.pop("found"), ("step",), False, close=held.clear)


def check_direct(truth: Truth, dtype: str, found: dict) -> tuple[dict, dict]:
    """As `check_training`, but what reaches the decoders' moments is their gradient without its part along each row."""
    exact, along = truth.exact(), []
    for trio in zip(found["w_dec"], truth.problem.tensors.w_decs, exact["w_dec"], strict=True):
        parts = []
        for got, w, g in zip(*(t.t().split(16384) for t in trio), strict=True):  # no float64 copy of a whole matrix
            w = reference.unit_norm_decoder(w.to(g.dtype).t()).t()
            parts.append(got + ((w * g).sum(1, keepdim=True) * w).to(got.dtype))
        along.append(torch.cat(parts).t())
    return distances({**found, "w_dec": along}, exact), truth.plain(dtype)


def _reference(compiled: str | None = None):
    def build(context: Context, problem: Problem, dtype: str) -> Job:
        kind, s = PRECISIONS[dtype][0], problem.case.shape
        model, xs = problem.model(kind), problem.xs(kind)
        parameters = groups(model)

        def whole(*counters):
            return reference.training_loss(xs, *parameters.values(), s.k, auxk_k=s.auxk or None, dead=dead(counters))

        def dead(counters):
            return [c > model.dead_steps_threshold for c in counters] if s.auxk else None

        if compiled:
            torch._dynamo.reset()
            mode = None if compiled == "default" else compiled
            whole = torch.compile(whole, dynamic=False, mode=mode)
        # the reference has no counters of its own: the masks of this batch, as ours has them, are given
        moved = after_this_batch(model, problem, kind) if s.auxk else []

        def loss():
            with library_topk():
                return whole(*moved)

        def finish():
            with torch.no_grad():
                for name in model.streams:
                    w = model.decoders[name].weight
                    w.copy_(reference.unit_norm_decoder(w))
                    w.grad.copy_(reference.project_decoder_grad(w, w.grad))
            problem.adam().step()

        return _training(problem, model, loss, dtype, parameters, finish)

    return build


@torch.no_grad()
def after_this_batch(model, problem: Problem, kind: torch.dtype) -> list[torch.Tensor]:
    """The counters as a forward of the batch leaves them."""
    model(problem.inputs(kind))
    counters = [getattr(model, f"stats_last_nonzero_{s}").clone() for s in model.streams]
    problem.reset(model, [])
    return counters


# --------------------------------------------------------------------------------------------------------------- parts


def check_selection(truth: Truth, dtype: str, found) -> tuple[dict, dict]:
    return truth.selection(dtype, found)


def _operands(problem: Problem, dtype: str):
    kind, t = PRECISIONS[dtype][0], problem.tensors
    return [[x.to(kind) for x in group] for group in (t.xs, t.w_encs, t.pre_biases, t.latent_biases)]


def _forward_only(problem: Problem, dtype: str, run, result=None) -> Job:
    held: dict = {}

    def forward():
        with torch.no_grad(), precision(dtype, problem.device):
            held["out"] = run()

    return Job({"forward": forward}, held.clear, lambda: (result or (lambda x: x))(held["out"]), close=held.clear)


def _encode_ours(context, problem, dtype) -> Job:
    operands, k = _operands(problem, dtype), problem.case.shape.k
    return _forward_only(problem, dtype, lambda: encode_topk(*operands, k), lambda out: out[0])


def _encode_reference(context, problem, dtype) -> Job:
    operands, k = _operands(problem, dtype), problem.case.shape.k

    def run():
        with library_topk():
            return reference.encode_topk(*operands, k)

    return _forward_only(problem, dtype, run, lambda out: out[0])


def wide_gemm(problem: Problem, dtype: str) -> Callable[[], torch.Tensor]:
    """One library GEMM over all streams side by side, with the biases: float [B, N], in a buffer that is used again."""
    xs, w_encs, pre_biases, latent_biases = _operands(problem, dtype)
    x = torch.cat([x - b for x, b in zip(xs, pre_biases, strict=True)], 1)
    w, bias = torch.cat(w_encs, 1), torch.stack(latent_biases).float().sum(0).to(x.dtype)
    out = x.new_empty(x.shape[0], w.shape[0])
    return lambda: torch.addmm(bias, x, w.T, out=out)


def _select_ours(context, problem, dtype) -> Job:
    from sparc_kernels.core.registry import resolve_impl
    from sparc_kernels.ops.encode import centre_for, select_latents

    xs, w_encs, pre_biases, latent_biases = _operands(problem, dtype)
    impl = resolve_impl("auto", xs[0])
    centred = centre_for(xs, w_encs, pre_biases, impl)
    k = problem.case.shape.k
    return _forward_only(problem, dtype, lambda: select_latents(centred, w_encs, latent_biases, k, "global", impl))


def _select_torch(context, problem, dtype) -> Job:
    gemm, k = wide_gemm(problem, dtype), problem.case.shape.k
    return _forward_only(problem, dtype, lambda: gemm().topk(k).indices)


def _decode_operands(problem: Problem, dtype: str):
    """Selected ids and values of the float64 selection, and the decoder's side of the model, with gradients."""
    kind, t, s = PRECISIONS[dtype][0], problem.tensors, problem.case.shape
    ids, values = reference_selection(problem)
    values = values.float() if kind != torch.float64 else values
    weights = [w.t().to(kind).t().detach().requires_grad_() for w in t.w_decs]
    biases = [b.to(kind).detach().requires_grad_() for b in t.pre_biases]
    return ids, values.detach().requires_grad_(), weights, biases, [x.to(kind) for x in t.xs], s


@torch.no_grad()
def reference_selection(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, k] and float64 [S, B, k], by chunks of rows."""
    s, t = problem.case.shape, problem.tensors
    rows, parts = max(1, 2**28 // (8 * s.N)), []
    for start in range(0, s.B, rows):
        xs = [x[start : start + rows].double() for x in t.xs]
        rest = [[p.double() for p in group] for group in (t.w_encs, t.pre_biases, t.latent_biases)]
        with library_topk():
            parts.append(reference.encode_topk(xs, *rest, s.k))
    return torch.cat([ids for ids, _ in parts]), torch.cat([values for _, values in parts], 1)


def _decode_job(problem: Problem, dtype: str, losses: Callable[..., torch.Tensor]) -> Job:
    """Mean of all [S, S] losses, and its gradients in values, decoder weights and biases."""
    ids, values, weights, biases, xs, _ = _decode_operands(problem, dtype)
    leaves, held = [values, *weights, *biases], {}

    def forward():
        with precision(dtype, problem.device):
            held["loss"] = losses(ids, values, weights, biases, xs).mean()

    def backward():
        held["loss"].backward()

    def reset():
        held.clear()
        for p in leaves:
            p.grad = None

    def result():
        return {
            "loss": held["loss"].detach(), "values": [values.grad],
            "w_dec": [w.grad for w in weights], "pre_bias": [b.grad for b in biases],
        }  # fmt: skip

    size = sum(p.numel() * p.element_size() for p in leaves)
    return Job({"forward": forward, "backward": backward}, reset, result, gradient_bytes=size, close=held.clear)


def check_decode(truth: Truth, dtype: str, found) -> tuple[dict, dict]:
    def of(kind: torch.dtype, mode: str) -> dict:
        ids, values, weights, biases, xs, _ = _decode_operands(truth.problem, mode)
        # values as every provider gets them (float32), computed with in `kind`; gradients in float32 at least
        wide = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [[t.detach().to(wide).requires_grad_() for t in group] for group in ([values], weights, biases)]
        with precision(mode if kind != torch.float64 else "float32", truth.problem.device):
            cast = [[t.to(kind) for t in group] for group in leaves]
            loss = reference.decode_nmse(ids, cast[0][0], cast[1], cast[2], [x.to(kind) for x in xs]).mean()
        loss.backward()
        grads = [[t.grad for t in group] for group in leaves]
        return {"loss": float(loss.detach()), "values": grads[0], "w_dec": grads[1], "pre_bias": grads[2]}

    exact = truth.remember("decode", lambda: of(torch.float64, "float32"))
    plain = truth.remember(("decode", dtype), lambda: distances(of(PRECISIONS[dtype][0], dtype), exact))
    return distances(found, exact), plain


def _decode_ours(context, problem, dtype) -> Job:
    return _decode_job(problem, dtype, decode_nmse)


def _decode_reference(context, problem, dtype) -> Job:
    def losses(ids, values, weights, biases, xs):
        return reference.decode_nmse(ids, values.to(weights[0].dtype), weights, biases, xs)

    return _decode_job(problem, dtype, losses)


def _decode_bags(context, problem, dtype) -> Job:
    def losses(ids, values, weights, biases, xs):
        values = values.to(weights[0].dtype)
        return torch.stack([
            reference.nmse(F.embedding_bag(ids, w.t(), mode="sum", per_sample_weights=v) + b, x)
            for w, b, x in zip(weights, biases, xs, strict=True) for v in values
        ])  # fmt: skip

    return _decode_job(problem, dtype, losses)


def _optimizer(kind: str):
    def build(context: Context, problem: Problem, dtype: str) -> Job:
        model = problem.model(PRECISIONS[dtype][0])
        parameters = list(model.parameters())
        for p in parameters:
            p.grad = torch.ones_like(p)

        def close():
            problem.reset(model, parameters)

        if kind == "norm":
            run = lambda: model.unit_norm_decoder_().project_decoder_grad_()  # noqa: E731
        elif kind in ("fused", "ours"):
            run = problem.adam(ours=kind == "ours").step
        else:
            run = torch.optim.Adam(parameters, lr=0.0, eps=1e-8, foreach=True).step
        return Job({"forward": run}, close=close)

    return build


def _ceiling(kind: str):
    def build(context: Context, problem: Problem, dtype: str) -> Job:
        s, wanted = problem.case.shape, PRECISIONS[dtype][0]
        if kind == "gemm":
            gemm = wide_gemm(problem, dtype)
            return _forward_only(problem, dtype, gemm)
        if kind == "copy":
            source = torch.ones(s.N, s.D, device=problem.device, dtype=wanted)
            target = torch.empty_like(source)
            return _forward_only(problem, dtype, lambda: target.copy_(source))
        width = max(s.d_streams)
        source = torch.ones(s.N, width, device=problem.device, dtype=wanted)
        g = torch.Generator(problem.device).manual_seed(0)
        rows = torch.randint(s.N, (s.M,), device=problem.device, generator=g)
        out = torch.empty(s.M, width, device=problem.device, dtype=wanted)
        return _forward_only(problem, dtype, lambda: torch.index_select(source, 0, rows, out=out))

    return build


def _dense_step(s: cost.Shape) -> cost.Op | None:
    return None if s.auxk else cost.dense_step(s)  # the model of the dense step knows no AuxK


PLAIN = ("float32", "tf32", "bfloat16", "bfloat16 autocast")
NO_AUTOCAST = ("float32", "tf32", "bfloat16", "float16")


def own() -> list[Provider]:
    """Ours, and what torch alone can do."""
    compiled = {"how": {"compiled": True}, "dtypes": PLAIN}
    one_pass = {"after": lambda s: [cost.adam(s)]}  # SparcAdam does it all in Adam's pass over the parameters
    return [
        Provider("ours", "training", "AlignedSAE and SparcAdam: Triton on CUDA, torch elsewhere", _ours,
                 check_training, model=cost.step, ops=cost.step_ops, setup_s=20, **one_pass),
        Provider("ours, CUDA graph", "training", "the same, replayed from a CUDA graph", _ours_graph, check_training,
                 absent=needs_cuda, model=cost.step, graph=True, setup_s=6, **one_pass),
        Provider("ours, training_step", "training", "AlignedSAE.training_step: no gradients in memory", _ours_direct,
                 check_direct, model=cost.direct_step, after=lambda s: [], ops=cost.direct_ops, setup_s=6),
        Provider("reference, eager", "training", "the reference with torch.topk, torch's fused Adam", _reference(),
                 check_training, PLAIN, model=_dense_step),
        Provider("reference, compiled", "training", "the same under torch.compile", _reference("default"),
                 check_training, model=_dense_step, setup_s=45, **compiled),
        Provider("reference, max-autotune", "training", "torch.compile(mode='max-autotune-no-cudagraphs')",
                 _reference("max-autotune-no-cudagraphs"), check_training, model=_dense_step, setup_s=90,
                 absent=lambda c: needs_cuda(c) or ("left out by --quick" if c.quick else None), **compiled),
        Provider("ours", "encode", "encode_topk: ids and values", _encode_ours, check_selection, NO_AUTOCAST),
        Provider("reference, eager", "encode", "pre-activations of every stream, torch.topk", _encode_reference,
                 check_selection, NO_AUTOCAST),
        Provider("ours", "select", "the GEMM and exact TopK", _select_ours, check_selection, NO_AUTOCAST,
                 model=cost.select, setup_s=10),
        Provider("torch.topk", "select", "one library GEMM over all streams, torch.topk", _select_torch,
                 check_selection, NO_AUTOCAST, model=cost.mm_topk),
        Provider("ours", "decode", "decode_nmse: losses, gradients", _decode_ours, check_decode, NO_AUTOCAST,
                 setup_s=10),
        Provider("reference, eager", "decode", "dense codes and GEMMs", _decode_reference, check_decode, NO_AUTOCAST),
        Provider("embedding_bag", "decode", "torch's embedding_bag for every pair", _decode_bags, check_decode,
                 NO_AUTOCAST),
        Provider("unit norm, projection", "optimizer", "AlignedSAE's", _optimizer("norm"), None, ("float32",),
                 model=cost.unit_norm),
        Provider("SparcAdam", "optimizer", "all of it in one pass", _optimizer("ours"), None, ("float32",)),
        Provider("Adam, fused", "optimizer", "torch's", _optimizer("fused"), None, ("float32",), model=cost.adam),
        Provider("Adam, foreach", "optimizer", "torch's default", _optimizer("foreach"), None, ("float32",),
                 model=cost.adam),
        Provider("GEMM", "ceiling", "the encoder's product by the library (cuBLAS, MKL)", _ceiling("gemm"), None,
                 NO_AUTOCAST, model=cost.gemm),
        Provider("copy", "ceiling", "a buffer of the weights' size", _ceiling("copy"), None, NO_AUTOCAST,
                 model=cost.copy),
        Provider("gather", "ceiling", "index_select of B k random rows", _ceiling("gather"), None, NO_AUTOCAST,
                 model=cost.gather),
    ]  # fmt: skip


def everyone() -> list[Provider]:
    from . import peers

    return [*own(), *peers.peers()]
