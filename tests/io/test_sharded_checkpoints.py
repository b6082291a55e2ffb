"""Checkpoints of several processes: read by any number of processes and by torch alone, complete or absent; weights."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import io
import os
import pickle
import shutil
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import together
from torch.distributed.device_mesh import init_device_mesh

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.distributed import shard_latents
from sparc_kernels.io import atomic, blocks, run_checkpoints, sharded_checkpoints, streamed_weights
from sparc_kernels.io.blocks import by_name, flat, latents_dim
from sparc_kernels.io.run_checkpoints import checkpoints, load_checkpoint, load_latest, save_checkpoint
from sparc_kernels.io.weights import export_official, load_model, save_weights
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.folder import _REMAINS
from sparc_kernels.train.resume import RunState
from sparc_kernels.train.step import Step
from sparc_kernels.train.trainer import Trainer

pytestmark = [pytest.mark.subprocess, pytest.mark.slow, pytest.mark.long]  # test_processes.py saves and resumes too
WIDTHS = {"b": 7, "ä": 10}
MESHES = {"1 x 4": (1, 4), "2 x 2": (2, 2), "4 x 1": (4, 1)}
CONFIG = TrainConfig(n_latents=26, k=3, auxk=4, dead_steps_threshold=3, batch_size=8, epochs=3, lr=1e-2, reinit_every=2)


def batch(step: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {s: torch.randn(8, d, generator=g, dtype=dtype) for s, d in WIDTHS.items()}


def alone(steps: int = 4, seed: int = 0, dtype=torch.float32) -> RunState:
    """The state of a run of one process; the other bits by another seed."""
    torch.manual_seed(seed)
    model = AlignedSAE(WIDTHS, 26, 3, 4, dead_steps_threshold=3, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bfloat16
        optimizer = SparcAdam(model, lr=1e-2)
    step = Step(model, optimizer, torch.Generator().manual_seed(seed), reinit_every=2)
    state = RunState(step, CONFIG, torch.Generator().manual_seed(seed + 1), 2)
    for i in range(steps):
        step(batch(i, dtype))
        state.batches += 1
    state.index, state.loss = steps, 0.25 + seed
    state.sums += seed + torch.arange(3)
    return state


def divided(mesh: tuple[int, int], **settings) -> RunState:
    """The same run on the ranks of a mesh."""
    state = alone(**settings)
    replicas, shards = mesh
    of = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("data", "latents"))
    shard_latents(state.step.model, of, state.step.optimizer)
    # counts of steps are views of one tensor, as in one process
    state.step.optimizer.load_state_dict(state.step.optimizer.state_dict())
    return state


def save(folder: Path, state: RunState, step: int = 4, keep: int = 9) -> Path:
    return save_checkpoint(folder, step, {"run": "r"} | state.state_dict(), keep, state.step.model.ranks)


@functools.cache
def truth() -> dict:
    return {"kind": run_checkpoints.KIND, "step": 4, "run": "r"} | alone().state_dict()


def differences(got: dict, want: dict, ranks=None) -> list[str]:
    """Places at which a state, or a rank's blocks of it, is not what it should be."""
    got, want = flat(by_name(got)), flat(by_name(want))
    wrong = [".".join(key) for key in got.keys() ^ want.keys()]
    for key in got.keys() & want.keys():
        mine, his = got[key], want[key]
        if isinstance(his, torch.Tensor):
            dim = latents_dim(key)
            if ranks is not None and dim is not None:
                start, stop = ranks.block(26)
                his = his.narrow(dim, start, stop - start)
            same = mine.dtype == his.dtype and mine.equal(his)
        else:
            same = mine == his and type(mine) is type(his)
        wrong += [] if same else [f"{'.'.join(key)}: {mine} instead of {his}"]
    return wrong


# ----------------------------------------------------------------------------------------------------------- the cases


def saves(folder: Path, mesh: tuple[int, int], name: str) -> None:
    state = divided(mesh)
    path = save(folder / name, state)
    files = sorted(p.name for p in path.iterdir())
    assert path.name == "step-000000004.dcp"
    assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4)), "manifest.json"]
    sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert min(sizes) > 0.2 * max(sizes)  # replicas share what they write
    assert list(path.parent.iterdir()) == [path]


def resumes(folder: Path, mesh: tuple[int, int], saved: str) -> None:
    """In place, from a run of other bits; also where nothing was trained before."""
    for before in (3, 0) if saved == "one" else (0,):
        state = divided(mesh, steps=before, seed=5)
        model, ranks = state.step.model, state.step.model.ranks
        kept = {name: value.data_ptr() for name, value in model.state_dict().items()}
        path, read = load_latest(folder / saved, pytest.fail, ranks=ranks)
        assert {*read["model"]} == {"pre_biases.b", "pre_biases.ä"}  # the others are read from the files
        sizes = {i: len(moments) for i, moments in read["optimizer"]["state"].items()}
        assert sizes == {i: 3 if i in (4, 5) else 1 for i in range(8)}  # of pre-biases alone there are moments
        state.load(path, read)
        assert {name: value.data_ptr() for name, value in model.state_dict().items()} == kept
        got = {"kind": run_checkpoints.KIND, "step": 4, "run": "r"} | state.state_dict()
        assert differences(got, truth(), ranks) == []
        strides = [p.stride() for p in model.parameters()]
        assert [state.step.optimizer.state[p]["exp_avg"].stride() for p in model.parameters()] == strides
    own = {s: v.chunk(ranks.replicas)[ranks.replica] for s, v in batch(9).items()}
    loss, _ = state.step(own)  # as a run that was never saved goes on
    same, _ = divided(mesh).step(own)
    assert loss.equal(same)


def does_not_fit(folder: Path) -> None:
    state = divided((1, 4))
    path, read = load_latest(folder / "2 x 2", ranks=state.step.model.ranks)
    ranks = state.step.model.ranks
    torch.manual_seed(0)
    model = shard_latents(AlignedSAE(WIDTHS, 25, 3), init_device_mesh("cpu", (4,)))
    other = RunState(Step(model, SparcAdam(model), torch.Generator()), CONFIG, torch.Generator(), 2)
    for saved in (path, folder / "one" / "step-000000004.pt"):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"last_nonzero_b: expected shape \(25,\), got \(26,\) \(rank 0\)"):
            other.load(saved, read)
        assert differences(model.state_dict(), before) == []
    assert ranks.objects(1) == [1] * 4  # still in step


def damages(folder: Path) -> None:
    """What one rank finds damaged, none reads."""
    state = divided((2, 2))
    ranks, first = state.step.model.ranks, state.step.model.ranks.rank == 0
    here = folder / "damaged"

    def flip(file: Path, place: int = -9) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-20])

    damaged = {f"__{rank}_0.distcp": [damage] for rank, damage in enumerate((Path.unlink, cut, flip, cut))}
    damaged |= {name: [Path.unlink, cut, flip] for name in (".metadata", "manifest.json")}
    for step in (4, 5):
        save(here, state, step)
    for name in damaged:
        for damage in damaged[name]:
            if first:
                shutil.copytree(here / "step-000000005.dcp", folder / "whole")
                damage(here / "step-000000005.dcp" / name)
            told = ranks.objects(None) and []
            path, read = load_latest(here, told.append, ranks=ranks)
            assert path.name == "step-000000004.dcp" and read["step"] == 4, (damage, name)
            ((text,),) = {tuple(rank) for rank in ranks.objects(told)}
            assert text.startswith(f"Skipped: checkpoint {here / 'step-000000005.dcp'}: expected a complete"), text
            assert name in text and "(rank " in text, text
            assert load_latest(here, told.append)[0] == path  # one process, too
            ranks.objects(None)
            if first:
                shutil.rmtree(here / "step-000000005.dcp")
                (folder / "whole").rename(here / "step-000000005.dcp")
            ranks.objects(None)
    assert load_latest(here, pytest.fail, ranks=ranks)[1]["step"] == 5
    assert load_latest(here, pytest.fail, after=5, ranks=ranks) is None
    ranks.objects(None)
    if first:
        for step in (4, 5):
            flip(here / f"step-00000000{step}.dcp" / "manifest.json", 40)
    ranks.objects(None)
    with pytest.raises(ValueError, match=r"expected a complete training checkpoint.*manifest.json.* \(rank 0\)"):
        load_latest(here, lambda text: None, ranks=ranks)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class Small(io.FileIO):
    """A file on a disk with 2,000 bytes."""

    def write(self, data) -> int:
        return super().write(data) if self.tell() < 2000 else full()


def on_a_full_disk(path, mode):
    return open("/dev/full", mode)


def on_a_small_disk(path, mode):
    return io.BufferedWriter(Small(path, mode), 100)


def bug(*args, **kwargs):
    raise KeyError("x")


# moment -> rank, what fails there, how, whether the new checkpoint is complete
MOMENTS = {
    "the folder is made": (0, (run_checkpoints, "_make"), full, False),
    "the temporary folder is made": (0, (sharded_checkpoints, "_make_new"), full, False),
    "a plan": (1, (sharded_checkpoints._Saver, "create_local_plan"), bug, False),
    "the first write": (2, (sharded_checkpoints, "open"), on_a_full_disk, False),
    "a later write": (3, (sharded_checkpoints, "open"), on_a_small_disk, False),
    "a sync": (1, (os, "fsync"), full, False),
    "the metadata": (0, (pickle, "dump"), full, False),
    "the metadata's name": (0, (sharded_checkpoints._Files, "rename"), full, False),
    "the manifest": (0, (sharded_checkpoints, "write_json"), full, False),
    "the folder's name": (0, (os, "rename"), full, False),
    "the folder above is synced": (0, (sharded_checkpoints, "sync_folder"), full, True),
    "old ones are deleted": (0, (run_checkpoints, "_remove_old"), full, True),
}


def fails(folder: Path) -> None:
    """One rank fails at some moment: all raise its error, and the checkpoint is complete or absent."""
    state = divided((1, 4))
    ranks, here = state.step.model.ranks, folder / "failing"
    save(here, state, 4)
    for step, (moment, (rank, (owner, name), how, complete)) in enumerate(MOMENTS.items(), 5):
        patch = mock.patch.object(owner, name, how, create=name == "open")
        with patch if ranks.rank == rank else contextlib.nullcontext():
            with pytest.raises(Exception) as error:
                save(here, state, step)
            ranks.objects(None)
        text = f"No space left on device (rank {rank})" if how is not bug else f"KeyError: 'x' (rank {rank})"
        assert type(error.value) is (OSError if how is not bug else RuntimeError), (moment, error.value)
        assert text in str(error.value), (moment, error.value)
        found = sorted(path.name for path in here.iterdir())
        assert found == ["step-000000004.dcp"] + [f"step-{step:09d}.dcp"] * complete, (moment, found)
        assert load_latest(here, pytest.fail, ranks=ranks)[1]["step"] == (step if complete else 4), moment
        if complete and ranks.rank == 0:
            shutil.rmtree(here / f"step-{step:09d}.dcp")
        ranks.objects(None)
    save(here, state, 30, keep=1)
    assert [path.name for path in here.iterdir()] == ["step-000000030.dcp"]


def is_killed(folder: Path) -> None:
    """Every rank copies the folder before and after what it does to it: that is what a kill would leave."""
    state = divided((2, 2))
    ranks, here, number = state.step.model.ranks, folder / "killed", iter(range(1000))
    (here / "checkpoints").mkdir(parents=True, exist_ok=True)
    save(here / "checkpoints", state, 4, 1)

    def snapshot(real, *args, **kwargs):
        for moment in (0, 1):
            target = folder / "snapshots" / f"{ranks.rank}-{next(number):03d}"
            for source in [p for p in sorted(here.rglob("*")) if p.is_file()]:
                with contextlib.suppress(FileNotFoundError):
                    content = source.read_bytes()
                    file = target / source.relative_to(here)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
            if moment == 0:
                result = real(*args, **kwargs)
        return result

    moments = [(os, "rename"), (os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "mkdir")]
    with contextlib.ExitStack() as stack:
        for owner, name in moments:
            real = getattr(owner, name)
            if owner is Path:
                patched = lambda self, *args, real=real, **kw: _quietly(snapshot, self, real, here, *args, **kw)  # noqa: E731
            else:
                patched = functools.partial(snapshot, real)
            stack.enter_context(mock.patch.object(owner, name, patched))
        save(here / "checkpoints", state, 5, 1)


def _quietly(snapshot, self, real, here, *args, **kwargs):
    """Path.mkdir, with a snapshot if it is in the folder."""
    if here in self.parents:
        return snapshot(real, self, *args, **kwargs)
    return real(self, *args, **kwargs)


def holds_little(folder: Path) -> None:
    """No more than a piece goes to the writer or comes from the reader at a time."""
    state, sizes = divided((1, 4)), []
    limit = 4 * 10 * 8  # a latent of the widest stream has 40 bytes

    def recorded(real, value, *args, **kwargs):
        tensor = value if isinstance(value, torch.Tensor) else None
        result = real(value, *args, **kwargs)
        tensor = result if isinstance(result, torch.Tensor) else tensor
        if tensor is not None and tensor.dtype == torch.float32:
            sizes.append(tensor.nbytes)
        return result

    with (
        mock.patch.object(blocks, "PIECE", limit),
        mock.patch.object(torch, "save", functools.partial(recorded, torch.save)),
    ):
        path = save(folder / "little", state)
    other, written = divided((1, 4), seed=5), sizes.copy()
    _, read = load_latest(path.parent, ranks=other.step.model.ranks)
    with mock.patch.object(torch, "load", functools.partial(recorded, torch.load)):
        run_checkpoints.fill(path, other.state_dict(), other.step.model.ranks)
    assert read["step"] == 4
    for some in (written, sizes[len(written) :]):
        assert max(some) <= limit and len(some) > 12, some
    others = {text.split(":")[0] for text in differences(other.state_dict()["model"], state.state_dict()["model"])}
    assert others == {"pre_biases.b", "pre_biases.ä"}


def writes_weights(folder: Path, mesh: tuple[int, int], dtype: torch.dtype, piece: int) -> None:
    state, sizes = divided(mesh, dtype=dtype), []
    model, whole = state.step.model, alone(dtype=dtype).step.model
    here = folder / f"weights {mesh} {dtype} {piece}"
    if model.ranks.rank == 0:
        (here / "one").mkdir(parents=True)
        save_weights(whole, here / "one" / "m.safetensors", False, 7)
        export_official(whole, here / "one", {"lr": 0.5})
    model.ranks.objects(None)
    real = streamed_weights._bits

    def recorded(x):
        sizes.append(x.numel() * x.element_size())
        return real(x)

    with mock.patch.object(streamed_weights, "PIECE", piece), mock.patch.object(streamed_weights, "_bits", recorded):
        save_weights(model, here / "m.safetensors", False, 7)
        export_official(model, here, {"lr": 0.5})
    assert max(sizes, default=0) <= max(piece, 26 * dtype.itemsize)
    if model.ranks.rank == 0:
        names = ["m.safetensors", "msae_checkpoint.pth", "run_config.json"]
        assert sorted(p.name for p in here.iterdir()) == [*names[:2], "one", names[2]]
        for name in names:
            assert (here / name).read_bytes() == (here / "one" / name).read_bytes(), name


def cannot_write_weights(folder: Path) -> None:
    model, found = divided((2, 2)).step.model, []
    for function, name in ((save_weights, "m.safetensors"), (export_official, "")):
        (folder / "no weights").mkdir(exist_ok=True)
        disk = mock.patch.object(os, "fsync", full) if model.ranks.rank == 0 else contextlib.nullcontext()
        with disk, pytest.raises(OSError, match=r"No space left on device \(rank 0\)"):
            function(model, folder / "no weights" / name)
        found += model.ranks.objects([*(folder / "no weights").iterdir()])
    assert found == [[]] * 8


def takes_over(folder: Path) -> None:
    """A run of one process, resumed by four, which save it."""
    read = load_checkpoint(folder / "run" / "checkpoints" / "step-000000006.pt")
    model = AlignedSAE(WIDTHS, CONFIG.n_latents, CONFIG.k, CONFIG.auxk, dead_steps_threshold=3)
    shard_latents(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "latents")))
    step = Step(model, SparcAdam(model, CONFIG.lr), torch.Generator(), reinit_every=CONFIG.reinit_every)
    state = RunState(step, CONFIG, torch.Generator(), len(read["sums"]) - 1)
    path, head = load_latest(folder / "run" / "checkpoints", pytest.fail, ranks=model.ranks)
    state.load(path, head)
    assert state.batches == 6
    save_checkpoint(folder / "taken", 6, {"run": head["run"]} | state.state_dict(), 1, model.ranks)


def streams() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {s: torch.randn(32, d, generator=g) for s, d in WIDTHS.items()}


def cases(folder: Path) -> dict:
    made = {f"{mesh} saves": functools.partial(saves, folder, MESHES[mesh], mesh) for mesh in MESHES}
    for mesh in MESHES:
        for saved in ("one", *MESHES):
            made[f"{mesh} resumes what {saved} saved"] = functools.partial(resumes, folder, MESHES[mesh], saved)
    for case in (does_not_fit, damages, fails, is_killed, holds_little, cannot_write_weights, takes_over):
        made[case.__name__] = functools.partial(case, folder)
    for mesh, dtype, piece in (("1 x 4", torch.float64, 1 << 20), ("2 x 2", torch.float32, 300),
                               ("4 x 1", torch.bfloat16, 50), ("1 x 4", torch.bfloat16, 1)):  # fmt: skip
        name = f"{mesh} writes weights, {dtype}, {piece} bytes at a time"
        made[name] = functools.partial(writes_weights, folder, MESHES[mesh], dtype, piece)
    return made


CASES = [*cases(Path())]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "one").mkdir()
    save_checkpoint(folder / "one", 4, {"run": "r"} | alone().state_dict(), 1)
    Trainer(CONFIG, streams(), folder / "run", checkpoint_every=6, keep=9, device="cpu", quiet=True).train()
    for later in checkpoints(folder / "run" / "checkpoints")[1:]:
        later.unlink()
    return folder, together(folder, 4, cases(folder))


@pytest.mark.parametrize("case", CASES)
def test_four_processes(case, group):
    assert not group[1][case], "\n".join(group[1][case])


# ------------------------------------------------------------------------------------------------ read by one process


@pytest.mark.parametrize("mesh", MESHES)
def test_one_process_reads_what_four_saved(mesh, group):
    (path,) = checkpoints(group[0] / mesh)
    read = load_checkpoint(path)
    assert differences(read, truth()) == [] and [*read["model"]] == [*truth()["model"]]
    state = alone(seed=5)
    state.load(*load_latest(group[0] / mesh, pytest.fail))
    assert differences(state.state_dict(), alone().state_dict()) == []
    for form in (path, group[0] / "one" / "step-000000004.pt"):
        assert [*load_checkpoint(form, without=("optimizer", "model"))] == [
            key for key in truth() if key not in ("optimizer", "model")
        ]
    model, normalize = load_model(path)
    assert normalize and differences(model.state_dict(), alone().state_dict()["model"]) == []


@pytest.mark.parametrize("mesh", MESHES)
def test_torch_alone_reads_it(mesh, group, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    (path,) = checkpoints(group[0] / mesh)
    want = truth()
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole, named = flat(torch.load(tmp_path / "whole.pt")), flat(by_name(want))
    assert [*whole] == [*named]
    assert all(whole[k].equal(v) if isinstance(v, torch.Tensor) else whole[k] == v for k, v in named.items())
    model = alone(seed=5).step.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load({"model": model.state_dict()}, checkpoint_id=path)
    assert differences(model.state_dict(), want["model"]) == []


def test_what_a_kill_leaves_is_a_run_to_resume(group, tmp_path):
    snapshots = sorted((group[0] / "snapshots").iterdir())
    assert len(snapshots) > 30
    steps, remains = [], set()
    for snapshot in snapshots:
        _, state = load_latest(snapshot / "checkpoints", pytest.fail)
        steps.append(state["step"])
        others = {p.name for p in (snapshot / "checkpoints").iterdir()} - {"step-000000004.dcp", "step-000000005.dcp"}
        assert all(map(_REMAINS.fullmatch, others)), others
        remains |= others
        assert differences(state | {"step": 4}, truth()) == []
    assert {*steps} == {4, 5} and remains == {"step-000000005.dcp.tmp", "step-000000004.dcp.old.tmp"}


def test_a_run_taken_over_by_four_processes_ends_as_it_would(group, tmp_path):
    run = Path(shutil.copytree(group[0] / "run", tmp_path / "run"))
    want = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(group[0] / "taken", run / "checkpoints")
    (run / "checkpoints" / "step-000000003.dcp.tmp").mkdir()
    trainer = Trainer(CONFIG, streams(), run, resume=True, keep=1, device="cpu", quiet=True)
    assert trainer.batches == 6
    trainer.train()
    assert (run / "model.safetensors").read_bytes() == want
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000012.pt"]


def test_metadata_can_name_nothing_else(group, tmp_path):
    """Not even with a manifest to match."""
    path = Path(shutil.copytree(group[0] / "1 x 4" / "step-000000004.dcp", tmp_path / "step-000000004.dcp"))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'done'}",)

    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = sharded_checkpoints._manifest(path)
    content = (path / ".metadata").read_bytes()
    manifest["files"][".metadata"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    atomic.write_json(path / "manifest.json", manifest | {"sha256": sharded_checkpoints._digest(manifest)})
    with pytest.raises(ValueError, match=r"checkpoint .*: expected a torch file of tensors \(posix.system in the meta"):
        load_checkpoint(path)
    assert not (tmp_path / "done").exists()


def test_a_step_has_one_checkpoint(tmp_path):
    state = {"x": 1}
    (tmp_path / "step-000000002.dcp").mkdir()
    (tmp_path / "step-000000003.dcp").mkdir()
    save_checkpoint(tmp_path, 2, state, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000002.pt", "step-000000003.dcp"]
    told: list[str] = []
    assert load_latest(tmp_path, told.append)[1]["step"] == 2 and len(told) == 1
    assert copy.copy(told)[0].startswith(f"Skipped: checkpoint {tmp_path / 'step-000000003.dcp'}: expected a complete")
