"""Kernels compiled ahead of time are those that the JIT looks for later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from sparc_kernels import _compile
from sparc_kernels._trace import parse_shape, trace

ROOT = Path(__file__).resolve().parents[1]


def python(code, **more):
    """In a process of its own, where kernels are not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT), **more}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Triton's JIT gets the arguments of the traced launches, and what it would compile is noted.
_JIT = """
import dataclasses, torch
from triton.runtime import driver
from sparc_kernels import _compile, _trace
compiled = []

class Driver(_compile._Driver):
    def get_current_device(self):
        return 0  # the JIT keeps what it has compiled by device

driver.set_active(Driver(_compile.target_of(90)))

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

noted, _trace._Recorder._launch = _trace._Recorder._launch, launch
found = []
for text in ("6,70,5,20/13,2,float32", "256,2048,16,64,1,bfloat16"):
    shape = _trace.parse_shape(text)
    found += _trace.trace(shape, 90, auxk=True, update="dense", max_grad_norm=1.0).launches
    found += _trace.trace(shape, 90, topk_type="local", update="direct").launches
wanted, compiled = set(compiled), []
for launch in dict.fromkeys(found):
    _compile.ask_jit(launch, 90)
assert len(wanted) > 50
assert set(compiled) == wanted, sorted({name for name, *_ in set(compiled) ^ wanted})
other = dataclasses.replace(found[0], divisible=())
_compile.ask_jit(other, 90)
assert compiled[-1] not in wanted
"""


def test_the_jit_looks_for_what_was_compiled():
    python(_JIT)


_CACHE = """
import dataclasses, pathlib, os
from sparc_kernels import _compile
from sparc_kernels._trace import parse_shape, trace

def main():
    every = [l for l in trace(parse_shape("8,64,4,32,1"), 90).launches if "_centre" in l.kernel or "_means" in l.kernel]
    broken = dataclasses.replace(every[0], num_warps=3)
    told = []
    done = _compile.compile_all([*every, *every, broken], 90, 2, lambda *numbers: told.append(numbers))
    assert (done.kernels, len(done.errors)) == (len(set(every)), 1), done
    assert done.errors[0][0] == "_centre_kernel" and "num_warps" in done.errors[0][1], done.errors
    assert done.failed == {broken: done.errors[0][1]}
    assert told == [(i + 1, len(set(every)) + 1) for i in range(len(set(every)) + 1)]
    assert done.cpu_seconds > 0 and done.seconds > 0
    cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.cubin")}
    assert len(files) == len(set(every))
    for launch in every:
        _compile.ask_jit(launch, 90)
    assert files == {p: p.stat().st_mtime_ns for p in cache.rglob("*.cubin")}

if __name__ == "__main__":
    main()
"""


def test_compiled_once_side_by_side_into_the_cache(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_CACHE)
    python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", TRITON_CACHE_DIR=str(tmp_path / "c"))


def test_interpreted_process_compiles_too(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launches = [x for x in trace(parse_shape("8,64,4,32,1"), 90).launches if x.kernel.endswith("_means_kernel")]
    done = _compile.compile_all(launches, 90, 1)
    assert done.kernels == 1 and not done.errors and list(tmp_path.rglob("*.cubin"))
    assert os.environ["TRITON_INTERPRET"] == "1"
