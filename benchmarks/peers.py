"""Other people's code as providers: the official SPARC class, OpenAI's kernels as it ships them, sparsify, FlashInfer.

Each is loaded when first used, from what is installed or from the given clone; where that fails the peer is absent,
with the reason. None of their code is copied.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

from sparc_kernels import reference
from sparc_kernels.tools import cost

from .cases import DEAD_THRESHOLD, PRECISIONS, Case, Problem, groups
from .provider import (
    Context,
    Provider,
    check_selection,
    check_training,
    forward_job,
    needs_cuda,
    torch_adam,
    training_job,
    wide_gemm,
)
from .timing import Job


def _error_of(load: Callable) -> str | None:
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _no_package(module: str, package: str, load: Callable) -> Callable[[Context], str | None]:
    """Why a package that needs a GPU is absent."""

    def reason(context: Context) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed (pip install {package})"
        return needs_cuda(context) or _error_of(load)

    return reason


# ------------------------------------------------------------------------------------------------------ official SPARC

FILES = {"sparc.kernels": "kernels.py", "sparc.loss": "loss.py", "sparc.model.utils": "model/utils.py",
         "sparc.model.model_global": "model/model_global.py"}  # fmt: skip


class _Ordered(dict):
    """As much of `set` as the official classes use, in insertion order: a set's order varies by process."""

    def __init__(self, items):
        super().__init__(dict.fromkeys(items))

    def issubset(self, other) -> bool:
        return self.keys() <= other.keys()


@functools.cache
def load_official(root: Path, kernels: bool) -> types.ModuleType:
    """The official model file without its package's __init__, which imports data and evaluation libraries.

    Args:
        root: a clone of the official repository.
        kernels: load its Triton decoder too.

    Returns:
        The module with the class; `helpers` is the module of its training loop's functions.
    """
    names = ["sparc", "sparc.model", *FILES]
    before = {name: sys.modules.pop(name, None) for name in names}
    try:
        sys.modules.update({name: types.ModuleType(name) for name in names[:3]})
        sys.modules["sparc.kernels"].TritonDecoderAutograd = None
        for name, file in FILES.items():
            path = root / "sparc" / file
            if name == "sparc.kernels" and not kernels:
                continue
            if not path.exists():
                raise FileNotFoundError(f"--official: expected a clone of the official repository, {path} is missing")
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            if file == "model/model_global.py":
                module.set, module.helpers = _Ordered, sys.modules["sparc.model.utils"]
            spec.loader.exec_module(module)
        return module
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def no_official(context: Context, kernels: bool = False) -> str | None:
    if context.official is None:
        return "needs --official CLONE of github.com/AtlasAnalyticsLab/SPARC"
    return (needs_cuda(context) if kernels else None) or _error_of(lambda: load_official(context.official, kernels))


def official(sparse: bool):
    """Forward, compute_loss, backward; then its training loop's unit norm, projection and torch.optim.Adam."""

    def build(context: Context, problem: Problem, dtype: str) -> Job:
        module, c = load_official(context.official, kernels=sparse), problem.case
        kind = PRECISIONS[dtype][0]
        with torch.device(problem.device):
            model = module.MultiStreamSparseAutoencoder(
                c.streams, c.shape.N, c.shape.k, auxk=c.shape.auxk or None, dead_steps_threshold=DEAD_THRESHOLD,
                use_sparse_decoder=sparse,
            ).to(kind)  # fmt: skip
        problem.fill(model)
        if sparse:  # its kernels need a latent's decoder row contiguous
            for decoder in model.decoders.values():
                decoder.weight.data = decoder.weight.data.t().contiguous().t()
        inputs = problem.inputs(kind)
        adam = torch.optim.Adam(model.parameters(), lr=0.0)

        def loss():
            return model.compute_loss(model(inputs), inputs)[0]

        def finish():
            for s in model.streams:
                module.helpers.unit_norm_decoder_(model.decoders[s])
                module.helpers.unit_norm_decoder_grad_adjustment_(model.decoders[s])
            adam.step()

        return training_job(problem, model, dtype, loss, finish)

    return build


# ------------------------------------------------------------------------------------------------------------- sparsify


@functools.cache
def _sparsify():
    with contextlib.redirect_stdout(io.StringIO()):  # it prints when it is imported
        encoder = importlib.import_module("sparsify.fused_encoder")
        utils = importlib.import_module("sparsify.utils")
    return encoder.fused_encoder, utils.decoder_impl


def sparsify_fits(case: Case) -> str | None:
    s = case.shape
    if s.S > 1:
        return "one stream only"
    if s.auxk:
        return "its AuxK gives the encoder no gradient"
    return None if s.N % 8 == 0 else "N must be a multiple of 8"


def _sparsify_step(context: Context, problem: Problem, dtype: str) -> Job:
    """Its encoder and decoder under the loss of this package (theirs is centred)."""
    encode, decode = _sparsify()
    kind, k = PRECISIONS[dtype][0], problem.case.shape.k
    model, (x,) = problem.model(kind), problem.xs(kind)
    adam = torch_adam(model)
    (w_enc,), (w_dec,), (pre_bias,), (latent_bias,) = groups(model).values()

    def loss():
        acts, ids, _ = encode(x - pre_bias, w_enc, latent_bias, k, "topk")
        return reference.nmse(decode(ids, acts.to(w_dec.dtype), w_dec) + pre_bias, x)

    def finish():
        model.unit_norm_decoder_().project_decoder_grad_()
        adam.step()

    return training_job(problem, model, dtype, loss, finish)


# ----------------------------------------------------------------------------------------------------------- FlashInfer


def _top_k() -> Callable:
    return importlib.import_module("flashinfer").top_k


def _flashinfer(context: Context, problem: Problem, dtype: str) -> Job:
    top_k = _top_k()
    gemm, k = wide_gemm(problem, dtype), problem.case.shape.k
    return forward_job(problem, dtype, lambda: top_k(gemm(), k)[1], lambda ids: ids.long())


# ------------------------------------------------------------------------------------------------------------------ all


def peers() -> list[Provider]:
    return [
        Provider("official SPARC", "training", "the official class and its training loop, as shipped; also with TF32 "
                 "and under autocast", official(False), check_training, ("float32", "tf32", "bfloat16 autocast"),
                 absent=no_official, model=cost.official_step),
        Provider("official SPARC, OpenAI's kernels", "training", "use_sparse_decoder=True", official(True),
                 check_training, ("float32",), absent=functools.partial(no_official, kernels=True), setup_s=8),
        Provider("sparsify", "training", "eai-sparsify's fused encoder and Triton decoder under our loss",
                 _sparsify_step, check_training, ("float32", "tf32", "bfloat16"),
                 absent=_no_package("sparsify", "eai-sparsify", _sparsify), fits=sparsify_fits, setup_s=8),
        Provider("FlashInfer", "select", "one library GEMM over all streams, flashinfer.top_k", _flashinfer,
                 check_selection, ("float32", "bfloat16", "float16"),
                 absent=_no_package("flashinfer", "flashinfer-python", _top_k), setup_s=30),
    ]  # fmt: skip
