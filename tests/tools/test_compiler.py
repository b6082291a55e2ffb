"""Kernels compiled ahead of time are those that the JIT looks for later."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm_process
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

pytest.importorskip("triton")
from sparc_kernels.core.registry import NAMESPACE, operator_of
from sparc_kernels.tools import compiler
from sparc_kernels.tools.shape import parse_shape
from sparc_kernels.tools.trace import as_on_gpu, trace
from sparc_kernels.tools.verify import run as verify
from sparc_kernels.tools.verify import suite
from sparc_kernels.tools.verify.judge import F32, Check
from sparc_kernels.tools.verify.launches import launches_of

ROOT = Path(__file__).resolve().parents[2]


def python(code, **more):
    """In a process of its own, where kernels are not interpreted."""
    done = warm_process.run("-c", code, env=more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Triton's JIT gets the arguments of the traced launches, and what it would compile is noted.
_JIT = """
import dataclasses, torch
from triton.runtime import driver
from sparc_kernels.tools import compiler, trace
from sparc_kernels.tools.shape import parse_shape
compiled = []

class Driver(compiler._Driver):
    def get_current_device(self):
        return 0  # the JIT keeps what it has compiled by device

driver.set_active(Driver(compiler.target_of(90)))

class Pointer:
    def __init__(self, tensor):
        self.dtype, self.address = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self):
        return self.address

def real(x):
    return Pointer(x) if isinstance(x, torch.Tensor) else tuple(map(real, x)) if isinstance(x, (tuple, list)) else x

def watch(kernel):
    kernel.device_caches[0], kernel.device_caches[90]  # the JIT sets its compiler up at the first use of a device
    kernel.compile = lambda src, target, options: compiled.append((src.name, src.hash(), str(options))) or object()

def launch(self, *args, **named):
    watch(self.kernel)
    noted(self, *args, **named)
    self.kernel.run(*map(real, args), grid=(1,), warmup=True, **{k: real(v) for k, v in named.items()})

noted, trace.Recorder._launch = trace.Recorder._launch, launch
recorded = []
for text in ("6,70,5,20/13,2,float32", "256,2048,16,64,1,bfloat16"):
    shape = parse_shape(text)
    recorded += trace.trace(shape, 90, auxk=True, update="dense", max_grad_norm=1.0).launches
    recorded += trace.trace(shape, 90, topk_type="local", update="direct").launches
wanted, compiled = set(compiled), []
for launch in dict.fromkeys(recorded):
    compiler.ask_jit(launch, 90)
assert len(wanted) > 50
assert set(compiled) == wanted, sorted({name for name, *_ in set(compiled) ^ wanted})
other = dataclasses.replace(recorded[0], divisible=())
compiler.ask_jit(other, 90)
assert compiled[-1] not in wanted
"""


@pytest.mark.compile
@pytest.mark.subprocess
def test_the_jit_looks_for_what_was_compiled():
    python(_JIT)


_CACHE = """
import dataclasses, multiprocessing, pathlib, os
from sparc_kernels.tools import compiler
from sparc_kernels.tools.shape import parse_shape
from sparc_kernels.tools.trace import trace

def main():
    compiler.get_context = lambda kind: multiprocessing.get_context("fork")  # test_interpreted_process... spawns
    every = [l for l in trace(parse_shape("8,64,4,32,1"), 90).launches if "_centre" in l.kernel or "_means" in l.kernel]
    broken = dataclasses.replace(every[0], num_warps=3)
    told = []
    done = compiler.compile_all([*every, *every, broken], 90, 2, lambda *numbers: told.append(numbers))
    assert (done.kernels, len(done.errors)) == (len(set(every)), 1), done
    assert done.errors[0][0] == "_centre_kernel" and "num_warps" in done.errors[0][1], done.errors
    assert done.failed == {broken: done.errors[0][1]}
    assert told == [(i + 1, len(set(every)) + 1) for i in range(len(set(every)) + 1)]
    assert done.cpu_seconds > 0 and done.seconds > 0
    cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.cubin")}
    assert len(files) == len(set(every))
    for launch in every:
        compiler.ask_jit(launch, 90)
    assert files == {p: p.stat().st_mtime_ns for p in cache.rglob("*.cubin")}

if __name__ == "__main__":
    main()
"""


@pytest.mark.compile
@pytest.mark.subprocess
def test_compiled_once_side_by_side_into_the_cache(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_CACHE)
    python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", TRITON_CACHE_DIR=str(tmp_path / "c"))


@pytest.mark.compile
@pytest.mark.subprocess
def test_interpreted_process_compiles_too(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launches = [x for x in trace(parse_shape("8,64,4,32,1"), 90).launches if x.kernel.endswith("_means_kernel")]
    done = compiler.compile_all(launches, 90, 1)
    assert done.kernels == 1 and not done.errors and list(tmp_path.rglob("*.cubin"))
    assert os.environ["TRITON_INTERPRET"] == "1"


# --------------------------------------------------------------------------------------------------- what verify needs


class _Both(TorchDispatchMode):
    """Operators give the torch path's values in the layout of the launchers' outputs, which run on meta tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        operator = operator_of(func)
        *args, impl = args
        if impl == "triton":
            meta = tree_map_only(torch.Tensor, lambda x: laid(x, x, "meta"), args)
            with self:
                made = operator.run(*meta, "triton")
        given = operator.run(*args, "torch")
        if impl != "triton" or given is None:
            return given
        return tree_map(lambda x, like: laid(x, like, x.device).copy_(x), given, made)


def laid(x, like, device):
    """Memory for x as `like` lies in its own: strides, and where it begins."""
    size = like.storage_offset() + sum(s * (n - 1) for s, n in zip(like.stride(), like.shape, strict=True)) + 1
    return x.new_empty(size, device=device, dtype=like.dtype).as_strided(
        like.shape, like.stride(), like.storage_offset()
    )


def really_launched(case, dtype):
    """What the checks launch when they have values and judge them."""
    recorded, problems = [], {}
    with as_on_gpu(90, False, recorded), _Both():
        for name, word, fn in suite.CHECKS:
            if word in case.ops.split():
                fn(Check(name, case, dtype, torch.device("cpu"), "auto", problems=problems))
    return set(recorded)


SMALL = [case for case in verify.CUDA_CASES if case.quick]
SMALL += [replace(c, dtypes=(F32,)) for c in verify.CPU_CASES if c.name in ("routes", "mixed")]


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in SMALL for d in c.dtypes], ids=str)
def test_launches_are_those_of_the_checks(case, dtype):
    listed, real = set(launches_of(case, dtype, 90)), really_launched(case, dtype)
    assert len(real) > 20
    assert not real - listed, [(x.kernel, x.divisible, x.constexprs) for x in real - listed]
    assert not listed - real, [(x.kernel, x.divisible, x.constexprs) for x in listed - real]
