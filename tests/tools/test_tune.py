"""Launch settings recorded and found again; the search with an injected timer, kernels in the interpreter or real."""

import json
import threading
import warnings
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_process
from conftest import DEVICE

pytest.importorskip("triton")
from sparc_kernels import cli
from sparc_kernels.core import gpu_timer, target
from sparc_kernels.launch import device as launch_device
from sparc_kernels.launch import reduce as reduce_settings
from sparc_kernels.launch import select as select_settings
from sparc_kernels.launch import tuned
from sparc_kernels.ops import selection
from sparc_kernels.tools import compiler, tune
from sparc_kernels.tools.compiler import Compilation
from sparc_kernels.tools.shape import Shape, parse_shape
from sparc_kernels.tools.trace import Launch

ROOT = Path(__file__).resolve().parents[2]
GPU = "Test GPU (40 GB)"
TINY = Shape(8, 64, 4, (32, 32), "float32")
DEVICE = torch.device(DEVICE)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, on a machine with GPU."""
    monkeypatch.setenv("SPARC_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARC_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(tuned, "device_name", lambda: GPU)
    tuned.forget()
    yield tmp_path
    tuned.forget()


def file_of(cache):
    return cache / "test-gpu-40-gb.json"


def record(cache, entries, **others):
    content = {"version": 1, "entries": entries, **others}
    file_of(cache).write_text(content if isinstance(content, str) else json.dumps(content))
    tuned.forget()


def preferring(**wanted):
    """A timer by which launches with these settings take 1 ms and all others 2."""

    def timer(run):
        run()
        trying = [fields for fields in tuned._trial.values() if wanted.items() <= fields.items()]
        return 1.0 if trying else 2.0

    return timer


def test_winner_is_recorded_and_used_by_the_next_launch(cache, monkeypatch):
    task = tune.problem("encode", TINY, DEVICE)
    args = rows, itemsize, arch, compact = TINY.B, 4, launch_device.capability(DEVICE), False
    default = select_settings.encode_config(*args)
    fields = dict(block_m=32, block_n=default.block_n, num_warps=default.num_warps)
    monkeypatch.setattr(tune, "candidates", lambda op, args: [fields])
    monkeypatch.setattr(tune, "compile_all", lambda *args: Compilation())
    (result,) = tune.tune(TINY, ["encode"], DEVICE, GPU, preferring(block_m=32))
    assert result.settings == fields and (result.best_ms, result.default_ms) == (1.0, 2.0) and not result.refused
    assert select_settings.encode_config(*args).block_m == 32

    seen = []
    kernel = selection._encode_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **named: (seen.append(named["BLOCK_M"]), kernel[grid](*args, **named))

    monkeypatch.setattr(selection, "_encode_kernel", Spy())
    assert task.differs(task.run(), task.run()) == "" and seen == [32, 32]
    # every shape of the same bucket, no other
    assert select_settings.encode_config(rows - 1, itemsize, arch, compact).block_m == 32
    assert select_settings.encode_config(2 * rows, itemsize, arch, compact) == default
    assert select_settings.encode_config(rows, itemsize, 90 if arch != 90 else 80, compact) == default
    assert select_settings.encode_config(compact=compact, arch=arch, itemsize=itemsize, rows=rows).block_m == 32
    monkeypatch.undo()
    assert select_settings.encode_config(*args) == default  # no GPU in use: nothing recorded counts


@pytest.mark.parametrize("op", tune.OPS)
def test_every_operator_can_be_searched(op, cache):
    task = tune.problem(op, TINY, DEVICE)
    with tuned.observed(op) as wanted:
        task.run()
    tries = [tune.Try(fields) for fields in tune.candidates(op, next(iter(wanted)))][:4]
    result = tune.search(op, task, lambda run: 2.0, tries)
    assert result.tried == len(tries) > 1 and not result.refused, result.refused
    assert result.settings is None and set(result.keys) == {tuned.key(op, args) for args in wanted}


def test_wrong_candidate_is_refused(cache):
    """Selection that is off, sums that are off, and settings that cannot run."""
    for op, wrong in (("encode", dict(group_m=3)), ("gather", dict(tiles=3)), ("reduce", dict(block_e=8))):
        task = tune.problem(op, TINY, DEVICE)
        run = task.run

        def faulty(run=run, op=op):
            out = run()
            if not tuned._trial:
                return out
            return (out[0].roll(1, 0), *out[1:]) if op == "encode" else (out[0] * 1.01, *out[1:])

        task.run = faulty
        result = tune.search(op, task, preferring(**wrong), [tune.Try(wrong)])
        assert result.settings is None and result.refused[0][0] == wrong and "off by" in result.refused[0][1], op
    tries = [tune.Try(dict(block_m=17))]
    result = tune.search("encode", tune.problem("encode", TINY, DEVICE), lambda run: 2.0, tries)
    assert "block_m a power of two" in result.refused[0][1]


def test_a_lucky_timing_is_not_recorded(cache):
    """The winner has to win once more."""
    task, times = tune.problem("reduce", TINY, DEVICE), iter([2.0, 1.0, 2.0, 1.99])
    result = tune.search("reduce", task, lambda run: next(times), [tune.Try(dict(block_e=4))])
    assert result.settings is None and result.best_ms == 2.0


class Clock:
    """Seconds that pass only where a test says so."""

    seconds = 0.0

    def __call__(self):
        return self.seconds

    def timer(self, run):
        """Takes ten seconds; entries of 8 are faster."""
        run()
        self.seconds += 10
        return 1.0 if {"block_e": 8} in tuned._trial.values() else 2.0


def quick(ran):
    """A problem that launches nothing; `ran` gets the settings of each run."""

    def run():
        reduce_settings.reduce_config(32)
        ran.append(dict(tuned._trial))
        return ()

    return tune.Problem(run, lambda reference, result: "")


def test_search_ends_in_time_with_the_second_round(cache):
    clock, ran = Clock(), []
    tries = [tune.Try(dict(block_e=e)) for e in (2, 8, 4, 2, 4, 2, 4)]
    result = tune.search("reduce", quick(ran), clock.timer, tries, until=75.0, now=clock)
    assert (result.tried, result.candidates, clock.seconds) == (4, 7, 70.0)  # default, 4 candidates, both once more
    assert result.settings == dict(block_e=8) and ran[-2:] == [{}, {"reduce": dict(block_e=8)}]


def test_candidate_known_not_to_work_is_not_run(cache):
    ran = []
    tries = [tune.Try(dict(block_e=8), wrong="_latent_reduce_kernel: shared memory"), tune.Try(dict(block_e=4))]
    result = tune.search("reduce", quick(ran), Clock().timer, tries)
    assert result.refused == [(dict(block_e=8), "_latent_reduce_kernel: shared memory")] and result.tried == 2
    assert {"reduce": dict(block_e=4)} in ran and {"reduce": dict(block_e=8)} not in ran


def test_minutes_are_shared_out_over_the_operators_left(cache, monkeypatch):
    clock, compiling, ends, takes = Clock(), [], [], iter([30.0, 150.0, 70.0])

    def search(op, task, timer, tries, *, tell, until, now):
        ends.append(until)
        clock.seconds += next(takes)
        return tune.SearchResult(op, [], 1.0, 1.0, None, 1, 1, [])

    monkeypatch.setattr(tune, "prepare", lambda op, shape, arch, seconds, tell: compiling.append(seconds))
    monkeypatch.setattr(tune, "problem", lambda *args: None)
    monkeypatch.setattr(tune, "search", search)
    results = tune.tune(TINY, tune.OPS, DEVICE, GPU, None, minutes=4.0, now=clock)
    # 240 s over 4, 210 over 3, 60 over 2; then they are over
    assert ends == [60.0, 100.0, 210.0] and [result.op for result in results] == ["encode", "select", "gather"]
    assert compiling == [tune.COMPILING * share for share in (60.0, 70.0, 30.0)]


def test_limit_is_told(cache, monkeypatch, capsys):
    result = tune.SearchResult(
        "encode", [], 2.0, 1.5, dict(block_m=64), 37, 120, [(dict(block_m=16), f"{tune.WRONG}: off by 1")]
    )
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr("sparc_kernels.core._triton.INTERPRETED", False)
    monkeypatch.setattr(tune, "tune", lambda *args, minutes, **more: asked.append(minutes) or [result])
    assert cli.main(["tune", "--shape", "8,64,4,32,2", "--op", "encode", "--op", "reduce", "--minutes", "1.5"]) == 0
    said = capsys.readouterr().out
    assert asked == [1.5] and "37 of 120 tried, time limit" in said and "reduce   not searched, time limit" in said
    assert "wrong result: off by 1 with {'block_m': 16}" in said
    result.tried = 120
    assert cli.main(["tune", "--shape", "8,64,4,32,2", "--op", "encode"]) == 0
    assert "120 tried, 1 refused" in capsys.readouterr().out and asked[1] == float("inf")
    for wrong in ("0", "x", "inf"):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--shape", "8,64,4,32,2", "--minutes", wrong])
        assert f"--minutes: expected a number > 0, got '{wrong}'" in capsys.readouterr().err


def constants_of(launch: Launch) -> dict:
    """Its constexpr arguments by name."""
    names = [name for name, _ in launch.signature]
    return {names[path[0]]: value for path, value in launch.constexprs if len(path) == 1 and path[0] < len(names)}


def test_kernels_of_the_candidates_are_compiled_first(cache, monkeypatch):
    """All of them; a candidate whose kernel does not compile is refused, the settings recorded before count."""
    encode_key = tuned.key("encode", (TINY.B, 4, 90, False))
    record(cache, {encode_key: {"settings": {"block_m": 32}}})
    given = []

    def compile_all(launches, arch, jobs, on_done, seconds):
        given.append((list(launches), arch, seconds))
        on_done(1, 2)
        broken = [x for x in launches if constants_of(x).get("BLOCK_E") == 8 and x.num_warps == 2]
        return Compilation(failed=dict.fromkeys(broken, "does not compile"))

    monkeypatch.setattr(tune, "compile_all", compile_all)
    told = []
    tries = tune.prepare("reduce", TINY, 90, 60.0, told.append)
    ((launches, arch, seconds),) = given
    assert (arch, seconds, told) == (90, 60.0, ["reduce: 1 of 2 kernels compiled"])
    mine = [x for x in launches if x.kernel.endswith(":_latent_reduce_kernel")]
    wanted = {tuple(one.fields[name] for name in ("block_e", "block_d", "num_warps")) for one in tries}
    assert len(wanted) > 20
    assert {(constants_of(x)["BLOCK_E"], constants_of(x)["BLOCK_D"], x.num_warps) for x in mine} == wanted
    refused = [one for one in tries if one.wrong]
    assert refused and all(one.wrong == "_latent_reduce_kernel: does not compile" for one in refused)
    assert all((one.fields["block_e"], one.fields["num_warps"]) == (8, 2) for one in refused)
    (encode,) = [x for x in set(launches) if x.kernel.endswith(":_encode_kernel")]
    assert constants_of(encode)["BLOCK_M"] == 32
    assert tuned.device_name() == GPU and target.current() is None


def test_planned_kernels_are_those_of_training(cache):
    """What is compiled ahead is what the same operators launch elsewhere."""
    from sparc_kernels.tools.audit import launches

    elsewhere = set(launches(TINY, 90))
    for op, name in (("encode", "_encode"), ("select", "_select"), ("gather", "_gather"), ("reduce", "_latent_reduce")):
        default, tries = tune.plan(op, TINY, 90)
        mine = {x for x in default if x.kernel.endswith(f":{name}_kernel")}
        # decode_nmse, which no training step calls, has forms of its own of the gather
        assert mine & elsewhere if op == "gather" else mine and mine <= elsewhere, op
        assert set(tries[0].launches) <= set(default)  # the first candidate is the default
        assert all(one.launches and not one.wrong for one in tries) and len(tries) > 4


class FakeCuda:
    """What the timer asks of torch.cuda; `log` says what happened where."""

    def __init__(self, monkeypatch, captures):
        self.log, self.where, self.captures = [], "main", captures
        made = {
            "Stream": lambda: self.Stream("side"), "current_stream": lambda: self.Stream("main"),
            "CUDAGraph": self.Graph,
            "stream": lambda stream: self.on(stream.name), "graph": self.graph, "Event": self.Event,
            "synchronize": lambda: self.log.append("synchronize"), "_sleep": lambda n: self.log.append(("sleep", n)),
        }  # fmt: skip
        for name, stand_in in made.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        self.Event.log = self.Graph.log = self.log

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            pass

    class Event:
        made = 0

        def __init__(self, enable_timing):
            FakeCuda.Event.made += 1
            self.number = FakeCuda.Event.made

        def record(self):
            self.log.append("event")

        def elapsed_time(self, other):
            return 0.5 * (other.number - self.number)

    class Graph:
        def replay(self):
            self.log.append("replay")

    @contextmanager
    def on(self, name):
        before, self.where = self.where, name
        yield
        self.where = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        with self.on(f"capture on {stream.name}"):
            yield
        if not self.captures:
            raise RuntimeError("operation not permitted")

    def run(self):
        self.log.append(self.where)


def test_timer_replays_a_graph(monkeypatch):
    monkeypatch.setattr(gpu_timer, "FLUSH_BYTES", 16)
    cuda, said = FakeCuda(monkeypatch, captures=True), []
    timer = tune.GraphTimer(torch.device("cpu"), said.append)
    timer.flush = type("Flush", (), {"zero_": lambda self: cuda.log.append("flush")})()
    assert timer(cuda.run) == 0.5 and not said
    once = ["flush", "event", "replay", "event"]
    assert cuda.log == ["side", "capture on side", *(once * 22), "synchronize"]


def test_timer_covers_launches_that_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(gpu_timer, "FLUSH_BYTES", 16)
    cuda, said = FakeCuda(monkeypatch, captures=False), []
    seconds = iter([1.0, 1.003] * 3 + [5.0, 5.001] * 3)
    monkeypatch.setattr(gpu_timer.time, "perf_counter", lambda: next(seconds))
    timer = tune.GraphTimer(torch.device("cpu"), said.append)
    assert timer(cuda.run) == 0.5
    covers = {entry for entry in cuda.log if isinstance(entry, tuple)}
    ((_, cycles),) = covers  # longer than 3 ms at 2 GHz
    assert 1.9 * 2e9 * 0.003 < cycles < 3 * 2e9 * 0.003
    once = [("sleep", cycles), "event", "main", "event"]
    launched = [*(["synchronize", "main"] * 3), "synchronize"]
    assert cuda.log == ["side", "capture on side", *launched, *(once * 22), "synchronize"]
    assert timer(cuda.run) == 0.5 and cuda.log.count("capture on side") == 1
    assert len(said) == 1 and "operation not permitted" in said[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", tune.OPS)
def test_every_operator_can_be_captured(op, cache):
    said = []
    assert tune.GraphTimer(DEVICE, said.append)(tune.problem(op, TINY, DEVICE).run) > 0 and not said


def test_compilation_gives_up_what_has_not_begun():
    ended, begun, waiting = (Future() for _ in range(3))
    ended.set_result(1)
    begun.set_running_or_notify_cancel()
    results = compiler._ended([ended, begun, waiting], 0.0)
    assert next(results) is ended
    threading.Timer(0.01, begun.set_result, [2]).start()
    assert list(results) == [begun] and waiting.cancelled()


def test_kernel_beyond_the_shared_memory_is_an_error(monkeypatch):
    shared = launch_device.SHARED_LIMIT[90]
    kernel = SimpleNamespace(metadata=SimpleNamespace(shared=shared))
    monkeypatch.setattr(compiler, "ask_jit", lambda launch, arch: kernel)
    assert compiler._timed(compiler._compile, None, 90)[:2] == (True, "")
    kernel.metadata.shared += 1
    assert compiler._timed(compiler._compile, None, 90)[1] == f"ValueError: shared memory {shared + 1} B > {shared} B"


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
    default = select_settings.encode_config(*args)
    record(cache, {tuned.key("encode", args): {"settings": fields}})
    with pytest.warns(RuntimeWarning, match=reason):
        assert select_settings.encode_config(*args) == default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_settings.encode_config(*args) == default


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
    default = reduce_settings.reduce_config(1024)
    file_of(cache).write_text(text)
    tuned.forget()
    with pytest.warns(RuntimeWarning, match=f"test-gpu-40-gb.json.*{reason}"):
        assert reduce_settings.reduce_config(1024) == default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reduce_settings.reduce_config(1000) == reduce_settings.reduce_config(1000)


def test_users_entry_before_the_shipped_one_and_the_way_out(cache, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tuned, "SHIPPED", shipped)
    entry = {
        "reduce(d=1024,arch=80,sources=1)": {"settings": {"block_e": 8}},
        "reduce(d=512,arch=80,sources=1)": {"settings": {"block_e": 8}},
    }
    (shipped / "test-gpu-40-gb.json").write_text(json.dumps({"version": 1, "entries": entry}))
    record(cache, {"reduce(d=1024,arch=80,sources=1)": {"settings": {"block_e": 2, "num_warps": 8}}})
    assert (reduce_settings.reduce_config(1024).block_e, reduce_settings.reduce_config(512).block_e) == (2, 8)
    monkeypatch.undo()
    monkeypatch.setenv("SPARC_KERNELS_TUNED", "0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 97)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    assert tuned.device_name() is None
    monkeypatch.setenv("SPARC_KERNELS_TUNED", "1")
    assert tuned.device_name() == GPU


def test_what_follows_from_a_setting_follows(cache):
    """Another group size changes how many maxima there are to read."""
    record(cache, {tuned.key("select", (32768, 64, False)): {"settings": {"group": 16, "num_warps": 8}}})
    config = select_settings.select_config(32768, 64)
    assert (config.group, config.span, config.n_spans_pad, config.num_warps) == (16, 16, 2048, 8)
    assert select_settings.select_config(30000, 33) == config


def test_writing_keeps_what_was_recorded(cache):
    tuned.write(GPU, {"reduce(d=512,arch=80,sources=1)": {"settings": {"block_e": 8}}}, {})
    tuned.write(GPU, {"reduce(d=256,arch=80,sources=1)": {"settings": {"block_e": 8}}}, {"torch": "x"})
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
    monkeypatch.setattr("sparc_kernels.core._triton.INTERPRETED", False)
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


@pytest.mark.subprocess
def test_no_file_is_read_on_import(tmp_path):
    code = (
        "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
        "import sparc_kernels, sparc_kernels.nn.module\n"
        "from sparc_kernels.launch import tuned\n"
        "assert tuned.table.cache_info().misses == 0 and tuned.recorded.cache_info().misses == 0\n"
        "import torch; sparc_kernels.AlignedSAE({'a': 8}, 16, 2)({'a': torch.randn(4, 8)})\n"
        "assert tuned.table.cache_info().misses == 0"
    )
    (tmp_path / "anything.json").write_text("{")
    done = warm_process.run("-c", code, env={"SPARC_KERNELS_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_shapes_are_parsed():
    assert parse_shape("8,64,4,32/16,2,float16").d_streams == (32, 16)
    with pytest.raises(ValueError, match="one width or S of them"):
        parse_shape("8,64,4,32/16,3")


def test_trace_does_not_see_what_is_recorded_here(cache, monkeypatch):
    from sparc_kernels.tools.audit import launches

    before = launches(TINY, 90)
    record(cache, {tuned.key("reduce", (32, 90, 1)): {"settings": {"block_e": 8}}})
    assert launches(TINY, 90) == before
