"""Every launch of the package through Triton's own JIT by its stand-in driver; prints what was seen as JSON.

Run by test_stand_in.py, and by hand with --all, which takes half an hour the first time.
"""

import json
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction

from sparc_kernels import (
    AlignedSAE,
    SparcAdam,
    auxk_topk,
    decode,
    decode_nmse,
    encode_topk,
    inverse_index,
    update_counters_,
    values_at,
)
from sparc_kernels.core.registry import OPERATORS
from sparc_kernels.launch.select import EncodeConfig
from sparc_kernels.nn.fused_step import fused_step  # noqa: F401  the last operators are registered there
from sparc_kernels.ops import bias_grads, dead, selection
from sparc_kernels.tools import trace
from sparc_kernels.tools.audit import compile_launch
from sparc_kernels.tools.compiler import ask_jit
from sparc_kernels.tools.shape import Shape
from sparc_kernels.tools.stand_in import Refused, cache_key, stand_in

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (96, 64, 40)


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def model_of(N, k, widths, dtype, auxk=None, **named):
    widths = {f"s{i}": d for i, d in enumerate(widths)}
    return AlignedSAE(widths, N, k, auxk, device="meta", dtype=dtype, **named)


def inputs_of(B, widths, dtype, grad=False):
    return {f"s{i}": empty(B, d, dtype=dtype).requires_grad_(grad) for i, d in enumerate(widths)}


# ------------------------------------------------------------------------------------------------------------ scenarios


def step(B, N, k, widths=WIDTHS, dtype=BF16, auxk=None, input_grads=False, topk_type="global", **optimizer):
    """Forward, loss, backward, SparcAdam."""
    model = model_of(N, k, widths, dtype, auxk, topk_type=topk_type)
    inputs, adam = inputs_of(B, widths, dtype, input_grads), SparcAdam(model, **optimizer)
    total, _ = model.compute_loss(model(inputs), inputs)
    total.backward()
    adam.step()


def direct(B, N, k, widths=WIDTHS, dtype=BF16, auxk=None, topk_type="global", **optimizer):
    model = model_of(N, k, widths, dtype, auxk, topk_type=topk_type)
    model.training_step(inputs_of(B, widths, dtype), SparcAdam(model, **optimizer))


def operators(B, N, k, widths=WIDTHS, dtype=BF16, lay=lambda x: x, topk_type="global"):
    """The public operators, each with all of its gradients. lay: gives a tensor its strides."""

    def like(*shape):
        return lay(empty(*shape, dtype=dtype)).requires_grad_()

    xs, w_encs, w_decs = (
        [like(*shape(d)) for d in widths] for shape in (lambda d: (B, d), lambda d: (N, d), lambda d: (d, N))
    )
    biases, latent_biases = [like(d) for d in widths], [like(N) for _ in widths]
    indices, values = encode_topk(xs, w_encs, biases, latent_biases, k, topk_type)
    values.sum().backward()
    first = indices if indices.dim() == 2 else indices[0]
    inverse = inverse_index(first, N)
    for given in (None, inverse):
        values_at(xs[0], w_encs[0], biases[0], latent_biases[0], first, given).sum().backward()
    chosen, aux = auxk_topk(xs[0], w_encs[0], biases[0], latent_biases[0], empty(N, dtype=torch.bool), k)
    aux.sum().backward()
    update_counters_(empty(N, dtype=torch.int64), chosen, aux.detach())
    values = values.detach().requires_grad_()
    sum(r.sum() for r in decode(indices, values, w_decs, biases).values()).backward()
    decode(indices, values, w_decs, biases, [(0, len(widths) - 1)])
    decode_nmse(indices, values, w_decs, biases, xs).sum().backward()


def outputs(B, N, k, widths=WIDTHS, dtype=BF16, topk_type="global"):
    """Without gradients; all that can be read; a part of the streams; decoders laid out for other tools."""
    model, inputs = model_of(N, k, widths, dtype, k, topk_type=topk_type), inputs_of(B, widths, dtype)
    read = model(inputs)
    sum(read[key].float().sum() for key in read).backward()
    model.eval()
    with torch.no_grad():
        read = model({"s0": inputs["s0"]})
        read["recon_s0"]
        model.compute_loss(model(inputs), inputs)
    model.decoder_layout_("contiguous").train()
    model.compute_loss(model(inputs), inputs)[0].backward()


def unusual_step(B, N, k, widths=WIDTHS):
    """Frozen decoders, a learning rate on the device, GradScaler's tensors; then only the pre-biases are trained."""
    model, inputs = model_of(N, k, widths, FP32), inputs_of(B, widths, FP32)
    for decoder in model.decoders.values():
        decoder.weight.requires_grad_(False)
    adam = SparcAdam(model, empty(), capturable=True, weight_decay=0.1)
    adam.found_inf, adam.grad_scale = empty(), empty()
    model.compute_loss(model(inputs), inputs)[0].backward()
    adam.step()
    for name, p in model.named_parameters():
        if not name.startswith("pre_bias"):
            p.grad = None
    adam.step()


def strided(x):
    """Every second row and column of something larger, from an odd place on."""
    return torch.empty([2 * n + 1 for n in x.shape], dtype=x.dtype, device="meta")[(slice(1, None, 2),) * x.dim()]


def shifted(x):
    """Columns that lie side by side, but not at an address that wide loads want."""
    return torch.empty(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype, device="meta")[..., 1 : x.shape[-1] + 1]


def joint(B, N, k, widths, dtype):
    """encode_topk over weights that lie side by side: the library's GEMM."""
    w_encs = empty(N, sum(widths), dtype=dtype).split(widths, 1)
    xs = [empty(B, d, dtype=dtype) for d in widths]
    with torch.no_grad():
        encode_topk(xs, list(w_encs), [x[0] for x in xs], [w[:, 0].contiguous() for w in w_encs], k)


def shard(*shape):
    trace.call_shard_operators(Shape(*shape))


class Scenario:
    def __init__(self, run, *args, arch=90, tf32=False, **named):
        self.gpu, self.run = (arch, tf32), lambda: run(*args, **named)
        self.name = f"{run.__name__}{args}{named or ''} sm_{arch}{' tf32' if tf32 else ''}"


def scenarios():
    """Those of one architecture and precision follow each other."""
    small = 256, 2048, 16
    for dtype in (BF16, FP16, FP32):
        for topk_type in ("global", "local"):
            for auxk in (None, 24):
                yield Scenario(step, *small, dtype=dtype, topk_type=topk_type, auxk=auxk)
                yield Scenario(direct, *small, dtype=dtype, topk_type=topk_type, auxk=auxk)
            yield Scenario(operators, *small, dtype=dtype, topk_type=topk_type)
        yield Scenario(step, *small, dtype=dtype, auxk=24, input_grads=True, max_grad_norm=1.0)
    for topk_type in ("global", "local"):
        yield Scenario(outputs, *small, topk_type=topk_type)
    for normalize in ("before", "after", None):
        yield Scenario(step, *small, normalize=normalize, max_grad_norm=1.0)
        yield Scenario(direct, *small, normalize=normalize)
    for half in (BF16, FP16):
        yield Scenario(direct, *small, dtype=FP32, shadow=half)
    yield Scenario(unusual_step, *small)
    for lay in (strided, shifted):
        for dtype in (BF16, FP32):
            yield Scenario(operators, *small, dtype=dtype, lay=lay)
    # the edges
    for dtype in (BF16, FP32):
        for B, N, k, widths in (
            (1, 2048, 16, WIDTHS), (256, 1, 1, WIDTHS), (256, 2048, 1, WIDTHS), (256, 2048, 16, (1, 1)),
            (1, 1, 1, (1,)), (7, 33, 3, (1, 17, 5)), (256, 2048, 16, (64,) * 8), (64, 2048, 4, (12000, 8200)),
            (64, 2048, 200, WIDTHS), (64, 2048, 512, WIDTHS),
        ):  # fmt: skip
            for run in (step, direct):
                yield Scenario(run, B, N, k, widths, dtype, auxk=k)
            yield Scenario(operators, B, N, k, widths, dtype)
        yield Scenario(step, 64, 2**20, 256, (512,), dtype, auxk=64)  # three levels of selection
        yield Scenario(step, 256, 2048, 16, (64,) * 8, dtype, topk_type="local", auxk=16)
        for N, k in ((2048, 16), (2048, 1), (600, 512)):
            yield Scenario(shard, 256, N, k, WIDTHS, str(dtype).removeprefix("torch."))
    # sizes at which launchers take other ways
    yield Scenario(step, 4096, 32768, 64, (1024, 768, 768))  # two buffers of logits, H in list order
    yield Scenario(joint, 2048, 8192, 32, (2048, 2048), BF16)
    yield Scenario(joint, 2048, 8192, 32, (2048, 2048), FP32, tf32=True)
    yield Scenario(step, *small, dtype=FP32, tf32=True)
    for arch in (80, 100, 120):
        for dtype in (BF16, FP32):
            yield Scenario(step, 256, 8192, 64, (1024, 768, 768), dtype, auxk=64, arch=arch)
            yield Scenario(direct, 256, 8192, 64, (1024, 768, 768), dtype, arch=arch)


# --------------------------------------------------------------------------------------------------------- what is seen


def keys_of(noted):
    """Of the kernels that ahead-of-time compilation makes of launches (launch, architecture), in their order."""
    keys = []

    def ask(source, target, options):
        keys.append(cache_key(source, target, options))

    with mock.patch("triton.compiler.compile", ask):
        for launch, arch in noted:
            ask_jit(launch, arch)
    return keys


def both(recorder, grid):
    """A recorder that launches the kernel too."""

    def launch(*args, **named):
        recorder._launch(*args, **named)
        recorder.kernel.run(*args, grid=grid, warmup=False, **named)

    return launch


def counted(name, operator, operators):
    def run(**named):
        operators.add(name)
        return operator.triton_impl(**named)

    return operator._replace(triton_impl=run)


def refusals():
    """Planted faults by name, and what the stand-in said of each."""
    counters, indices, values = (empty(8, dtype=torch.int64),), empty(4, 4, dtype=torch.int64), empty(1, 4, 4)
    sound = counters, indices, values, 0.5, 0, 16, 8

    def launch(grid=(1, 1), args=sound, **named):
        return lambda: dead._fired_kernel[grid](*args, **{"S": 1, "BLOCK": 16, "num_warps": 4, **named})

    def other(place, arg):
        return launch(args=(*sound[:place], arg, *sound[place + 1 :]))

    def too_many_stages():
        with mock.patch.object(selection, "encode_config", lambda *_: EncodeConfig(128, 256, 64, 8, 8, 6)):
            encode_topk([empty(8, 64, dtype=BF16)], [empty(64, 64, dtype=BF16)], [empty(64, dtype=BF16)],
                        [empty(64, dtype=BF16)], 4)  # fmt: skip

    faults = {
        "empty grid": launch((0, 1)), "high grid": launch((1, 70000)), "wide grid": launch((2**31, 1)),
        "grid of floats": launch((2.0, 1)), "64 warps": launch(num_warps=64), "3 warps": launch(num_warps=3),
        "unknown option": launch(num_wraps=4), "missing argument": launch(args=sound[:-1]),
        "numpy number": other(3, np.float32(0.5)), "list": other(1, [indices]),
        "complex tensor": other(2, empty(1, 4, 4, dtype=torch.complex64)),
        "tensor on the host": other(2, torch.ones(1, 4, 4)), "float indices": other(1, empty(4, 4)),
        "shared memory": too_many_stages,
    }  # fmt: skip
    said = {}
    with torch.no_grad(), stand_in(stage=lambda source: "llir"):
        launch()()
        for name, fault in faults.items():
            try:
                fault()
            except Refused as error:
                said[name] = str(error)
    return said


BEFORE = triton.runtime.driver._active, JITFunction.run


def left():
    """What a stand-in has changed and not put back."""
    x = empty(2, 2)
    bias_grads.pre_bias_grads([x], [x[0]], [x], "triton")  # would launch, without any driver
    kernels = [f for f in vars(dead).values() if isinstance(f, JITFunction) and f.device_caches]
    after = triton.runtime.driver._active, JITFunction.run
    return [repr(thing) for thing in (*kernels, *(b for a, b in zip(BEFORE, after, strict=True) if a is not b))]


def ways(launches):
    """Whether launchers took the ways that some of the sizes are there for."""
    encode = [launch for launch in launches if launch.kernel.endswith(":_encode_kernel")]
    named = [{launch.signature[path[0]][0]: value for path, value in launch.constexprs} for launch in encode]
    return {
        "two buffers of logits": any(dict(launch.options).get("maxnreg") for launch in encode),
        "three levels of selection": any(constants["SPAN"] > constants["GROUP"] for constants in named),
    }


def main(everything):
    began, operators, seen, refused, launches = time.process_time(), set(), set(), [], 0
    compiled, asked = {}, {}  # what the JIT made, by its key; what the recorder noted, and the keys of those launches

    def stage(source):
        """To the end the first of each kernel; to TTIR what differs in types, in arguments that are constants to the
        JIT, or in flags; the number of streams behind the first is no difference."""
        flags = tuple((path, value) for path, value in source.constants.items() if isinstance(value, bool))
        types = (frozenset(t) if isinstance(t, tuple) and len(t) > 1 else t for t in source.signature.values())
        kind = source.fn, tuple(types), flags
        if everything or source.fn not in seen:
            seen.update((source.fn, kind))
            return "cubin"
        if kind in seen:
            return "source"
        seen.add(kind)
        return "ttir"

    counting = {name: counted(name, operator, operators) for name, operator in OPERATORS.items()}
    with mock.patch.dict(OPERATORS, counting), mock.patch.object(trace.Recorder, "__getitem__", both):
        for (arch, tf32), group in groupby(scenarios(), lambda scenario: scenario.gpu):
            recorded = []
            with stand_in(arch, tf32=tf32, stage=stage) as driver, trace.as_on_gpu(arch, tf32, recorded):
                for scenario in group:
                    try:
                        scenario.run()
                    except Refused as error:
                        refused.append(f"{scenario.name}: {error}")
                        recorded.pop()
            launches += len(driver.launched)
            for launch, launched in zip(recorded, driver.launched, strict=True):
                asked.setdefault((launch, arch), set()).add(launched.key)
            for key, kernel in driver.kernels.items():
                compiled.setdefault(key, kernel)
    ran = time.process_time() - began
    said, forgotten = refusals(), left()
    keys = keys_of(asked)
    differ = [launch for key, (launch, given) in zip(keys, asked.items(), strict=True) if given != {key}]
    ended = {key for key, kernel in compiled.items() if kernel.stage == "cubin"}
    audited = []
    for key, (launch, arch) in zip(keys, asked, strict=True):
        if key in ended:
            module, name = launch.kernel.split(":")
            getattr(sys.modules[module], name).device_caches.clear()  # of what keys_of has left
            audited.append(compile_launch(launch, arch, None))  # out of the files that the JIT has left
    print(json.dumps({
        "triton": triton.__version__, "launches": launches, "noted": len(asked), "compiled": len(compiled),
        "stages": Counter(kernel.stage for kernel in compiled.values()), "refused": refused, "said": said,
        "operators": sorted(operators), "kernels": sorted({kernel.name for kernel in compiled.values()}),
        "ended": sorted({result.launch.kernel for result in audited}),
        "faults": [(result.launch.kernel, result.fault) for result in audited if result.fault or not result.registers],
        "ways": ways(launch for launch, _ in asked), "left": forgotten, "differ": list(map(repr, differ[:3])),
        "shared": max(kernel.shared or 0 for kernel in compiled.values()),
        "seconds": [round(ran), round(time.process_time() - began)],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main("--all" in sys.argv)
