"""The package's own providers, and what torch alone can do. Other people's code is in peers.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from sparc_kernels import AlignedSAE, SparcAdam, decode_nmse, encode_topk, reference
from sparc_kernels.tools import cost

from .cases import PRECISIONS, Problem, groups
from .provider import (
    Context,
    Provider,
    check_decode,
    check_direct,
    check_selection,
    check_training,
    decode_job,
    encode_operands,
    forward_job,
    needs_cuda,
    torch_adam,
    training_job,
    wide_gemm,
)
from .timing import Job
from .verification import library_topk, precision

Tensor = torch.Tensor

# --------------------------------------------------------------------------------------------------- the training step


def _ours(context: Context, problem: Problem, dtype: str, model: AlignedSAE | None = None) -> Job:
    model, inputs = model or problem.model(PRECISIONS[dtype][0]), problem.inputs(PRECISIONS[dtype][0])
    adam = SparcAdam(model, 0.0)  # with unit norm and projection

    def loss():
        return model.compute_loss(model(inputs), inputs)[0]

    return training_job(problem, model, dtype, loss, adam.step)


def _ours_graph(context: Context, problem: Problem, dtype: str) -> Job:
    """Forward, loss and backward in one CUDA graph: warm-up on a side stream, capture, replays."""
    model = problem.model(PRECISIONS[dtype][0])
    job = _ours(context, problem, dtype, model)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job.again("full")
    torch.cuda.current_stream().wait_stream(side)
    job.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job.execute("full")
    peak = torch.cuda.max_memory_allocated() - base
    kept = job.result()  # gradients live in the graph's pool
    phases = {"forward": graph.replay, "backward": lambda: None}
    return Job(
        phases, lambda: problem.reset(model), lambda: kept, ("full",), queued=False,
        gradient_bytes=job.gradient_bytes, captured_peak=peak,
    )  # fmt: skip


def _ours_direct(context: Context, problem: Problem, dtype: str) -> Job:
    """`AlignedSAE.training_step`, which makes no gradients: they are read off its first step's moments."""
    kind, _, autocast, _ = PRECISIONS[dtype]
    model, inputs = problem.model(kind), problem.inputs(kind)
    adam, held = SparcAdam(model, 0.0, shadow=autocast, graph=False), {}

    def step():
        with precision(dtype, problem.device):
            held["loss"] = model.training_step(inputs, adam)[0]

    def reset():
        held.pop("loss", None)
        problem.reset(model)

    reset()
    step()
    share = 1 - adam.param_groups[0]["betas"][0]
    moments = {name: [adam.state[p]["exp_avg"] / share for p in ps] for name, ps in groups(model).items()}
    held["result"] = {"loss": held["loss"], **moments}
    phases = {"forward": lambda: None, "backward": lambda: None, "optimizer": step}
    return Job(phases, reset, lambda: held.pop("result"), ("step",), queued=False)


def _reference(compiled: str | None = None):
    def build(context: Context, problem: Problem, dtype: str) -> Job:
        kind, s = PRECISIONS[dtype][0], problem.case.shape
        model, xs = problem.model(kind), problem.xs(kind)
        parameters, adam, dead = groups(model), torch_adam(model), problem.dead

        def whole():
            return reference.training_loss(xs, *parameters.values(), s.k, auxk_k=s.auxk or None, dead=dead)

        if compiled:
            torch._dynamo.reset()
            whole = torch.compile(whole, dynamic=False, mode=None if compiled == "default" else compiled)

        def loss():
            with library_topk():
                return whole()

        @torch.no_grad()
        def finish():
            for name in model.streams:
                w = model.decoders[name].weight
                w.copy_(reference.unit_norm_decoder(w))
                w.grad.copy_(reference.project_decoder_grad(w, w.grad))
            adam.step()

        return training_job(problem, model, dtype, loss, finish)

    return build


# --------------------------------------------------------------------------------------------------------------- parts


def _encode(encode):
    def build(context: Context, problem: Problem, dtype: str) -> Job:
        operands, k = encode_operands(problem, dtype), problem.case.shape.k
        return forward_job(problem, dtype, lambda: encode(*operands, k), lambda out: out[0])

    return build


def _encode_dense(*operands) -> tuple[Tensor, Tensor]:
    with library_topk():
        return reference.encode_topk(*operands)


def _select_ours(context: Context, problem: Problem, dtype: str) -> Job:
    from sparc_kernels.core.registry import resolve_impl
    from sparc_kernels.ops.encode import centre_for, select_latents

    xs, w_encs, pre_biases, latent_biases = encode_operands(problem, dtype)
    impl, k = resolve_impl("auto", xs[0]), problem.case.shape.k
    centred = centre_for(xs, w_encs, pre_biases, impl)
    return forward_job(problem, dtype, lambda: select_latents(centred, w_encs, latent_biases, k, "global", impl=impl))


def _select_torch(context: Context, problem: Problem, dtype: str) -> Job:
    gemm, k = wide_gemm(problem, dtype), problem.case.shape.k
    return forward_job(problem, dtype, lambda: gemm().topk(k).indices)


def _decode(losses):
    return lambda context, problem, dtype: decode_job(problem, dtype, losses)


def _dense_losses(ids, values, weights, biases, xs) -> Tensor:
    return reference.decode_nmse(ids, values.to(weights[0].dtype), weights, biases, xs)


def _bag_losses(ids, values, weights, biases, xs) -> Tensor:
    values = values.to(weights[0].dtype)
    return torch.stack([
        reference.nmse(F.embedding_bag(ids, w.t(), mode="sum", per_sample_weights=v) + b, x)
        for w, b, x in zip(weights, biases, xs, strict=True) for v in values
    ])  # fmt: skip


def _optimizer(step):
    """step: model -> what is timed."""

    def build(context: Context, problem: Problem, dtype: str) -> Job:
        model = problem.model(PRECISIONS[dtype][0])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return Job({"forward": step(model)})

    return build


def _gemm(context: Context, problem: Problem, dtype: str) -> Job:
    return forward_job(problem, dtype, wide_gemm(problem, dtype))


def _copy(context: Context, problem: Problem, dtype: str) -> Job:
    s = problem.case.shape
    source = torch.ones(s.N, s.D, device=problem.device, dtype=PRECISIONS[dtype][0])
    target = torch.empty_like(source)
    return forward_job(problem, dtype, lambda: target.copy_(source))


def _gather(context: Context, problem: Problem, dtype: str) -> Job:
    s, width = problem.case.shape, max(problem.case.shape.d_streams)
    source = torch.ones(s.N, width, device=problem.device, dtype=PRECISIONS[dtype][0])
    generator = torch.Generator(problem.device).manual_seed(0)
    rows = torch.randint(s.N, (s.M,), device=problem.device, generator=generator)
    out = source.new_empty(s.M, width)
    return forward_job(problem, dtype, lambda: torch.index_select(source, 0, rows, out=out))


# ----------------------------------------------------------------------------------------------------------------- all


def _dense_step(s: cost.Shape, compiled: bool = False) -> cost.Op | None:
    return None if s.auxk else cost.dense_step(replace(s, compiled=compiled))  # its model knows no AuxK


PLAIN = ("float32", "tf32", "bfloat16", "bfloat16 autocast")
NO_AUTOCAST = ("float32", "tf32", "bfloat16", "float16")
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def own() -> list[Provider]:
    compiled = {"dtypes": PLAIN, "model": partial(_dense_step, compiled=True)}
    one_pass = {"after": lambda s: [cost.adam(s)]}  # SparcAdam: all of it in Adam's pass over the parameters
    training = [
        Provider("ours", "training", "AlignedSAE and SparcAdam: Triton on CUDA, torch elsewhere", _ours,
                 check_training, model=cost.step, ops=cost.ops_of, setup_s=20, **one_pass),
        Provider("ours, CUDA graph", "training", "the same, replayed from a CUDA graph", _ours_graph, check_training,
                 absent=needs_cuda, model=cost.step, graph=True, setup_s=6, **one_pass),
        Provider("ours, training_step", "training", "AlignedSAE.training_step: no gradients in memory", _ours_direct,
                 check_direct, model=partial(cost.step, direct=True), after=lambda s: [],
                 ops=partial(cost.ops_of, direct=True), setup_s=6),
        Provider("reference, eager", "training", "the reference with torch.topk, torch's fused Adam", _reference(),
                 check_training, PLAIN, model=_dense_step),
        Provider("reference, compiled", "training", "the same under torch.compile", _reference("default"),
                 check_training, setup_s=45, **compiled),
        Provider("reference, max-autotune", "training", f"torch.compile(mode='{MAX_AUTOTUNE}')",
                 _reference(MAX_AUTOTUNE), check_training, setup_s=90,
                 absent=lambda c: needs_cuda(c) or ("left out by --quick" if c.quick else None), **compiled),
    ]  # fmt: skip
    parts = [
        Provider(name, op, what, build, check, NO_AUTOCAST, model=model, setup_s=setup_s)
        for op, check, name, what, build, model, setup_s in (
            ("encode", check_selection, "ours", "encode_topk: ids and values", _encode(encode_topk), None, 1),
            ("encode", check_selection, "reference, eager", "pre-activations of every stream, torch.topk",
             _encode(_encode_dense), None, 1),
            ("select", check_selection, "ours", "the GEMM and exact TopK", _select_ours, cost.select, 10),
            ("select", check_selection, "torch.topk", "one library GEMM over all streams, torch.topk", _select_torch,
             cost.mm_topk, 1),
            ("decode", check_decode, "ours", "decode_nmse: losses, gradients", _decode(decode_nmse), None, 10),
            ("decode", check_decode, "reference, eager", "dense codes and GEMMs", _decode(_dense_losses), None, 1),
            ("decode", check_decode, "embedding_bag", "torch's embedding_bag for every pair", _decode(_bag_losses),
             None, 1),
            ("ceiling", None, "GEMM", "the encoder's product by the library (cuBLAS, MKL)", _gemm, cost.gemm, 1),
            ("ceiling", None, "copy", "a buffer of the weights' size", _copy, cost.copy, 1),
            ("ceiling", None, "gather", "index_select of B k random rows", _gather, cost.gather, 1),
        )
    ]  # fmt: skip
    optimizers = [
        Provider(name, "optimizer", what, _optimizer(step), None, ("float32",), model=model)
        for name, what, step, model in (
            ("unit norm, projection", "AlignedSAE's",
             lambda model: lambda: model.unit_norm_decoder_().project_decoder_grad_(), cost.unit_norm),
            ("SparcAdam", "all of it in one pass", lambda model: SparcAdam(model, 0.0).step, None),
            ("Adam, fused", "torch's", lambda model: torch_adam(model).step, cost.adam),
            ("Adam, foreach", "torch's default",
             lambda model: torch.optim.Adam(model.parameters(), 0.0, foreach=True).step, cost.adam),
        )
    ]  # fmt: skip
    return [*training, *parts[:7], *optimizers, *parts[7:]]
