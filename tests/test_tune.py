"""Launch settings recorded and found again; the search with an injected timer, kernels in the interpreter or real."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("triton")
from sparc_kernels import _launch, _tuned, cli, selection, tune
from sparc_kernels._trace import Shape, parse_shape

ROOT = Path(__file__).resolve().parents[1]
GPU = "Test GPU (40 GB)"
TINY = Shape(8, 64, 4, 32, 2, "float32")
DEVICE = torch.device(DEVICE)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, on a machine with GPU."""
    monkeypatch.setenv("SPARC_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARC_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(_tuned, "device_name", lambda: GPU)
    _tuned.forget()
    yield tmp_path
    _tuned.forget()


def file_of(cache):
    return cache / "test-gpu-40-gb.json"


def record(cache, entries, **others):
    content = {"version": 1, "entries": entries, **others}
    file_of(cache).write_text(content if isinstance(content, str) else json.dumps(content))
    _tuned.forget()


def preferring(**wanted):
    """A timer by which launches with these settings take 1 ms and all others 2."""

    def timer(run):
        run()
        trying = [fields for fields in _tuned._trial.values() if wanted.items() <= fields.items()]
        return 1.0 if trying else 2.0

    return timer


def test_winner_is_recorded_and_used_by_the_next_launch(cache, monkeypatch):
    task = tune.problem("encode", TINY, DEVICE)
    args = rows, itemsize, arch, compact = TINY.B, 4, _launch.capability(DEVICE), False
    default = _launch.encode_config(*args)
    fields = dict(block_m=32, block_n=default.block_n, num_warps=default.num_warps)
    monkeypatch.setattr(tune, "candidates", lambda op, args: [fields])
    (found,) = tune.tune(TINY, ["encode"], DEVICE, GPU, preferring(block_m=32))
    assert found.settings == fields and (found.best_ms, found.default_ms) == (1.0, 2.0) and not found.refused
    assert _launch.encode_config(*args).block_m == 32

    seen = []
    kernel = selection._encode_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **named: (seen.append(named["BLOCK_M"]), kernel[grid](*args, **named))

    monkeypatch.setattr(selection, "_encode_kernel", Spy())
    assert task.differs(task.run(), task.run()) == "" and seen == [32, 32]
    # every shape of the same bucket, no other
    assert _launch.encode_config(rows - 1, itemsize, arch, compact).block_m == 32
    assert _launch.encode_config(2 * rows, itemsize, arch, compact) == default
    assert _launch.encode_config(rows, itemsize, 90 if arch != 90 else 80, compact) == default
    assert _launch.encode_config(compact=compact, arch=arch, itemsize=itemsize, rows=rows).block_m == 32
    monkeypatch.undo()
    assert _launch.encode_config(*args) == default  # no GPU in use: nothing recorded counts


@pytest.mark.parametrize("op", tune.OPS)
def test_every_operator_can_be_searched(op, cache):
    task = tune.problem(op, TINY, DEVICE)
    with _tuned.observed(op) as wanted:
        task.run()
    tries = list(tune.candidates(op, next(iter(wanted))))[:4]
    found = tune.search(op, task, lambda run: 2.0, tries)
    assert found.tried == len(tries) > 1 and not found.refused, found.refused
    assert found.settings is None and set(found.keys) == {_tuned.key(op, args) for args in wanted}


def test_wrong_candidate_is_refused(cache):
    """Selection that is off, sums that are off, and settings that cannot run."""
    for op, wrong in (("encode", dict(group_m=3)), ("gather", dict(tiles=3)), ("reduce", dict(block_e=8))):
        task = tune.problem(op, TINY, DEVICE)
        run = task.run

        def faulty(run=run, op=op):
            out = run()
            if not _tuned._trial:
                return out
            return (out[0].roll(1, 0), *out[1:]) if op == "encode" else (out[0] * 1.01, *out[1:])

        task.run = faulty
        found = tune.search(op, task, preferring(**wrong), [wrong])
        assert found.settings is None and found.refused[0][0] == wrong and "off by" in found.refused[0][1], op
    found = tune.search("encode", tune.problem("encode", TINY, DEVICE), lambda run: 2.0, [dict(block_m=17)])
    assert "block_m a power of two" in found.refused[0][1]


def test_a_lucky_timing_is_not_recorded(cache):
    """The winner has to win once more."""
    task, times = tune.problem("reduce", TINY, DEVICE), iter([2.0, 1.0, 2.0, 1.99])
    found = tune.search("reduce", task, lambda run: next(times), [dict(block_e=4)])
    assert found.settings is None and found.best_ms == 2.0


@pytest.mark.parametrize(
    "fields, reason",
    [
        (dict(block_m=100), "block_m a power of two"),
        (dict(block_m=64, depth=3), "settings among .* got 'depth'"),
        (dict(num_warps=True), "num_warps a power of two"),
        (dict(num_stages=0), "num_stages an int in 1..8"),
        (dict(block_m=256, block_n=256, block_k=256), "shared memory"),
        ("fast", "expected an object of settings"),
        ({}, "expected an object of settings"),
    ],
)
def test_invalid_entries_are_refused_once_and_ignored(fields, reason, cache):
    args = (4096, 2, 86, False)
    default = _launch.encode_config(*args)
    record(cache, {_tuned.key("encode", args): {"settings": fields}})
    with pytest.warns(RuntimeWarning, match=reason):
        assert _launch.encode_config(*args) == default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _launch.encode_config(*args) == default


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "cannot be read"),
        ("[]", "version 1"),
        ('{"version": 2, "entries": {}}', "version 1"),
        ('{"version": 1, "entries": {"sort(n=8)": {"settings": {}}}}', "operator among"),
        ('{"version": 1, "entries": {"reduce(d=1024,arch=80,sources=1)": 3}}', "object with settings"),
    ],
)
def test_corrupt_files_are_ignored_with_a_warning(text, reason, cache):
    default = _launch.reduce_config(1024)
    file_of(cache).write_text(text)
    _tuned.forget()
    with pytest.warns(RuntimeWarning, match=f"test-gpu-40-gb.json.*{reason}"):
        assert _launch.reduce_config(1024) == default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _launch.reduce_config(1000) == _launch.reduce_config(1000)


def test_users_entry_before_the_shipped_one_and_the_way_out(cache, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(_tuned, "SHIPPED", shipped)
    entry = {
        "reduce(d=1024,arch=80,sources=1)": {"settings": {"block_e": 8}},
        "reduce(d=512,arch=80,sources=1)": {"settings": {"block_e": 8}},
    }
    (shipped / "test-gpu-40-gb.json").write_text(json.dumps({"version": 1, "entries": entry}))
    record(cache, {"reduce(d=1024,arch=80,sources=1)": {"settings": {"block_e": 2, "num_warps": 8}}})
    assert (_launch.reduce_config(1024).block_e, _launch.reduce_config(512).block_e) == (2, 8)
    monkeypatch.undo()
    monkeypatch.setenv("SPARC_KERNELS_TUNED", "0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 97)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    assert _tuned.device_name() is None
    monkeypatch.setenv("SPARC_KERNELS_TUNED", "1")
    assert _tuned.device_name() == GPU


def test_what_follows_from_a_setting_follows(cache):
    """Another group size changes how many maxima there are to read."""
    record(cache, {_tuned.key("select", (32768, 64, False)): {"settings": {"group": 16, "num_warps": 8}}})
    config = _launch.select_config(32768, 64)
    assert (config.group, config.span, config.n_spans_pad, config.num_warps) == (16, 16, 2048, 8)
    assert _launch.select_config(30000, 33) == config


def test_writing_keeps_what_was_recorded(cache):
    _tuned.write(GPU, {"reduce(d=512,arch=80,sources=1)": {"settings": {"block_e": 8}}}, {})
    _tuned.write(GPU, {"reduce(d=256,arch=80,sources=1)": {"settings": {"block_e": 8}}}, {"torch": "x"})
    content = json.loads(file_of(cache).read_text())
    assert (
        list(content["entries"]) == ["reduce(d=512,arch=80,sources=1)", "reduce(d=256,arch=80,sources=1)"]
        and content["gpu"] == GPU
    )
    assert [path.name for path in cache.iterdir()] == [file_of(cache).name]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("SPARC_KERNELS_CACHE", str(in_the_way))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr("sparc_kernels._triton.INTERPRETED", False)
    monkeypatch.setattr(tune, "problem", lambda *args: pytest.fail("searched before the cache was tried"))
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert cli.main(["tune", "--shape", "8,64,4,32,2"]) == 2
    assert "cannot be written" in (said := capsys.readouterr().err) and "SPARC_KERNELS_CACHE" in said
    assert in_the_way.read_text() == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert cli.main(["tune", "--shape", "8,64,4,32,2"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert cli.main(["tune", "--shape", "8,64"]) == 2
    assert "--shape: expected" in capsys.readouterr().err


def test_no_file_is_read_on_import(tmp_path):
    code = (
        "import builtins, io, pathlib, sparc_kernels, sparc_kernels.module\n"
        "from sparc_kernels import _tuned\n"
        "assert _tuned.table.cache_info().misses == 0 and _tuned.recorded.cache_info().misses == 0\n"
        "import torch; sparc_kernels.AlignedSAE({'a': 8}, 16, 2)({'a': torch.randn(4, 8)})\n"
        "assert _tuned.table.cache_info().misses == 0"
    )
    (tmp_path / "anything.json").write_text("{")
    env = os.environ | {"PYTHONPATH": str(ROOT), "SPARC_KERNELS_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], env=env, check=True)


def test_shapes_are_parsed():
    assert parse_shape("8,64,4,32/16,2,float16").widths == (32, 16)
    with pytest.raises(ValueError, match="one width or S of them"):
        parse_shape("8,64,4,32/16,3")


def test_trace_does_not_see_what_is_recorded_here(cache, monkeypatch):
    from sparc_kernels.audit import launches

    before = launches(TINY, 90)
    record(cache, {_tuned.key("reduce", (32, 90, 1)): {"settings": {"block_e": 8}}})
    assert launches(TINY, 90) == before
