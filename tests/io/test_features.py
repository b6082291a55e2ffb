"""Feature files of every kind, and shuffled batches of them."""

import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparc_kernels.cli.arguments import stream_features
from sparc_kernels.io import features as module
from sparc_kernels.io.features import Features
from sparc_kernels.io.files import HDF5Rows, MappedRows
from sparc_kernels.io.loader import Loader

ROWS, WIDTH = 300, 12


def values(rows=ROWS, width=WIDTH, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(path, x: torch.Tensor, **options):
    """The features in the format of the file's name."""
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".safetensors":
        save_file({"features": x, "other": torch.zeros(3)}, path)
    elif path.suffix in (".pt", ".pth"):
        torch.save(x, path)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("indices", data=np.arange(len(x)))
            file.create_dataset("features", data=x.numpy(), **options)
    return path


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.h5", "x.hdf5", "x.pt", "x.pth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_format_gives_the_same_rows(tmp_path, name, dtype):
    x = values(dtype=dtype)
    path = write(tmp_path / name, x)
    with Features({"a": path}, normalize=False, dtype=torch.float64) as opened:
        assert isinstance(opened.sources["a"], MappedRows)
        assert (opened.rows, opened.widths) == (ROWS, {"a": WIDTH}) and opened.sources["a"].dtype == dtype
        assert torch.equal(opened.read(0, ROWS)["a"], x.double())
        assert torch.equal(opened.read(37, 41)["a"], x[37:41].double())
    with Features({"a": path}) as opened:
        expected = x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-8)
        assert torch.equal(opened.read(5, 9)["a"], expected[5:9])


def test_bfloat16(tmp_path):
    x = values(dtype=torch.bfloat16)
    save_file({"anything": x}, tmp_path / "x.safetensors")  # the only tensor, whatever its name
    torch.save({"anything": x.T.contiguous().T, "note": "a"}, tmp_path / "x.pt")
    with Features({"a": tmp_path / "x.safetensors", "b": tmp_path / "x.pt"}, normalize=False) as opened:
        assert all(torch.equal(rows, x[3:8].float()) for rows in opened.read(3, 8).values())


@pytest.mark.parametrize("options", [{"chunks": (32, WIDTH)}, {"chunks": (32, WIDTH), "compression": "gzip"}])
def test_chunked_hdf5_is_read_in_whole_chunks(tmp_path, options):
    x = values()
    path = write(tmp_path / "x.h5", x, **options)
    with Features({"a": path}, normalize=False) as opened:
        assert isinstance(opened.sources["a"], HDF5Rows)
        assert torch.equal(opened.read(30, 70)["a"], x[30:70])
        loader = Loader(opened, 20, torch.Generator(), memory=ROWS * WIDTH * 4 // 2)
        assert loader.block_rows < 32  # less than a chunk fits
        whole = Loader(opened, 20, torch.Generator())
        assert whole.block_rows == ROWS // 16
    x = values(3000)
    with Features({"a": write(tmp_path / "y.h5", x, **options)}) as opened:
        assert Loader(opened, 20, torch.Generator()).block_rows % 32 == 0


def with_indices(path: Path, x: torch.Tensor, indices) -> Path:
    """A file of the name's format; tensors, arrays and lists are written as they are."""
    if path.suffix == ".safetensors":
        save_file({"features": x, "indices": indices}, path)
    elif path.suffix == ".pt":
        torch.save({"features": x, "indices": indices}, path)
    else:
        with h5py.File(path, "w") as file:
            file["features"], file["indices"] = x.numpy(), indices
    return path


def indexed(path, indices) -> Path:
    """A file of the name's format with these `indices` beside its features, which are in no single piece in .pt."""
    if path.suffix == ".pt":
        return with_indices(path, values(len(indices)), torch.tensor(indices)[None].T.expand(-1, 3)[:, 1])
    return with_indices(path, values(len(indices)), torch.tensor(indices) if path.suffix != ".h5" else indices)


@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".pt"])
def test_rows_of_other_samples_are_not_paired(tmp_path, suffix):
    """Row i is the sample `indices[i]`: the same in all files, though not in the files that have none."""
    order = [4, 0, 3, 1, 2]
    a, b = indexed(tmp_path / f"a{suffix}", order), indexed(tmp_path / "b.h5", order)
    plain = write(tmp_path / "plain.npy", values(5))
    with Features({"plain": plain, "a": a, "b": b, "tensor": values(5)}) as opened:
        assert opened.rows == 5
    words = [b"four", b"zero", b"three", b"one", b"two"]
    text = [indexed(tmp_path / f"text{i}.h5", given) for i, given in enumerate((words, words, words[::-1]))]
    Features({"a": text[0], "b": text[1]}).close()
    for first, other, indices, message in (
        (a, tmp_path / "c.h5", [4, 0, 1, 3, 2], f"`indices` 3 in row 2 as in stream 'a' ({a}), got 1: rows are paired"),
        (text[0], text[2], words[::-1], f"`indices` {words[0]} in row 0 as in stream 'a' ({text[0]}), got {words[4]}"),
        (a, tmp_path / "d.h5", order[:3], f"5 rows as in stream 'a' ({a}), got 3 rows"),
    ):
        indexed(other, indices)
        with pytest.raises(ValueError) as error:
            Features({"plain": plain, "a": first, "c": other} if len(indices) == 5 else {"a": first, "c": other})
        assert str(error.value).startswith(f"stream 'c' ({other}): expected {message}")


@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".pt"])
def test_a_stopped_extraction_is_told_by_its_indices(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for indices, start in (([0, 1, 2, 3, 0, 0], 4), ([3, 1, 2, 4, 5, 0], None), ([0, 1, 2, 3, 4, 0], 5), ([0] * 6, 1)):
        indexed(path, indices)
        if start is None:
            Features({"a": path}).close()
            continue
        with pytest.raises(ValueError) as error:
            Features({"a": path})
        got = f"expected `indices` of every row, got zeros from row {start} to the last, 5: was it stopped?"
        assert str(error.value) == f"stream 'a' ({path}): {got}"
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"], file["indices"] = values(6).numpy(), np.zeros((6, 2))
    with pytest.raises(ValueError, match=r"expected `indices` of shape \[6\], got shape \[6, 2\]"):
        Features({"a": tmp_path / "b.h5"})


COMPARED = "`indices` that are whole numbers, floats or texts, got "


@pytest.mark.parametrize(
    ("name", "indices", "words"),
    [
        ("x.h5", np.zeros(3, "i4,f4"), f"{COMPARED}[('f0', '<i4'), ('f1', '<f4')]"),
        ("x.h5", np.zeros(3, "c8"), f"{COMPARED}complex64"),
        ("x.h5", np.zeros(3, "V3"), f"{COMPARED}|V3"),
        ("x.h5", np.full(3, None, h5py.ref_dtype), f"{COMPARED}objects"),
        ("x.h5", np.array([1, np.nan, np.nan]), "`indices` that are no NaN, got NaN in row 1"),
        ("x.pt", torch.tensor([1, 2, float("nan")]), "`indices` that are no NaN, got NaN in row 2"),
        ("x.pt", torch.ones(3, dtype=torch.bfloat16), f"{COMPARED}bfloat16"),
        ("x.pt", torch.ones(3, dtype=torch.complex64), f"{COMPARED}complex64"),
        ("x.safetensors", torch.ones(3, dtype=torch.bfloat16), f"{COMPARED}BF16"),
        ("x.pt", [1, 0, 0], "`indices` of every row, got zeros from row 1 to the last, 2: was it stopped?"),
        ("x.pt", [1, 2], "`indices` of shape [3], got shape [2]"),
        ("x.pt", [1, [2], 3], "`indices` of numbers or texts alone, got others (setting an array element"),
        ("x.pt", [1, 2, None], f"{COMPARED}objects"),
        ("x.pt", {"0": 1}, "`indices` in a tensor or a list, got a dict"),
    ],
)
def test_indices_that_cannot_be_compared_are_refused(tmp_path, name, indices, words):
    path = with_indices(tmp_path / name, values(3), indices)
    with pytest.raises(ValueError) as error:
        Features({"a": path})
    assert str(error.value).startswith(f"stream 'a' ({path}): expected {words}")


def test_indices_in_a_list_or_above_the_group_are_compared(tmp_path):
    """Of a .pt file, and of several groups of an HDF5 file, where they are as many as the rows."""
    x, texts = values(5), ["e", "d", "c", "b", "\u00e4"]
    ints = with_indices(tmp_path / "i.h5", x, [4, 3, 2, 1, 0])
    words = with_indices(tmp_path / "w.h5", x, texts)
    fixed = with_indices(tmp_path / "f.h5", x, np.char.encode(texts))
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file["l/x/features"], file["l/y/features"], file["indices"] = x.numpy(), x.numpy(), [4, 3, 2, 1, 0]
        file["l/z/features"], file["l/indices"] = x[:3].numpy(), [1, 0, 0]
    group = tmp_path / "g.h5:l/y/features"
    pt = with_indices(tmp_path / "i.pt", x, [4, 3, 2, 1, 0]), with_indices(tmp_path / "w.pt", x, tuple(texts))
    Features({"a": ints, "b": group, "c": pt[0]}).close()
    Features({"a": words, "b": pt[1], "c": fixed}).close()
    other = with_indices(tmp_path / "o.pt", x, [0, 1, 2, 3, 4])
    for first, second, got in (
        (group, other, "4 in row 0 as in stream 'a' .*, got 0"),
        (other, group, "0 in row 0 as in stream 'a' .*, got 4"),
        (words, ints, "b'e' in row 0 as in stream 'a' .*, got 4"),
        (ints, fixed, "4 in row 0 as in stream 'a' .*, got b'e'"),
    ):
        with pytest.raises(ValueError, match=f"expected `indices` {got}: rows are paired by position"):
            Features({"a": first, "b": second})
    with pytest.raises(ValueError, match="zeros from row 1 to the last, 2: was it stopped"):
        Features({"a": tmp_path / "g.h5:l/z/features"})


def test_indices_of_shards_are_compared_over_all_of_them(tmp_path):
    def write(name: str, *parts):
        for i, indices in enumerate(parts):
            with h5py.File(tmp_path / f"{name}_{i}.h5", "w") as file:
                file["features"] = np.ones((len(indices), 3), "<f4")
                if None not in indices:
                    file["indices"] = np.array(indices, int)
        return tmp_path / f"{name}_*.h5"

    a, b = write("a", [5, 0], [], [3, 1, 2]), write("b", [5], [0, 3, 1, 2])
    with Features({"a": a, "b": b}) as opened:
        assert opened.rows == 5
    with pytest.raises(ValueError, match=r"`indices` 3 in row 2 as in stream 'a' .*, got 1: rows are paired by pos"):
        Features({"a": a, "b": write("b", [5], [0, 1, 3, 2])})
    with pytest.raises(ValueError, match=r"b_1\.h5\): expected `indices` as in .*b_0\.h5, got none"):
        Features({"b": write("b", [5], [None] * 4)})


def test_the_command_line_lists_shards(tmp_path):
    """For names that are no numbers; a comma in the name of a file is a part of it."""
    with h5py.File(tmp_path / "z.h5", "w") as file:
        file["a,b.npy"] = np.ones((4, 3), "<f4")
    for name in ("d_01-31.npy", "d_02-01.npy", "e,1.npy", "x.npy", "x.npy,d_01-31.npy"):
        (tmp_path / name).touch()
    for files in (["d_01-31.npy", "d_02-01.npy", "x.npy"], ["x.npy", "z.h5:a"], ["z.h5:a,b.npy"], ["e,1.npy"],
                  ["e,*.npy"], ["x.npy,d_01-31.npy"]):  # fmt: skip
        paths = [tmp_path / file for file in files]
        assert stream_features("a=" + ",".join(map(str, paths))) == ("a", paths if len(files) > 1 else paths[0])


def test_another_dataset_of_a_file(tmp_path):
    """FILE:DATASET, with the `indices` of its group; a file whose name has a colon is that file."""
    x, y = values(), values(seed=1)
    path, tensors = tmp_path / "x.h5", tmp_path / "x.safetensors"
    with h5py.File(path, "w") as file:
        file["features"], file["layers/3/acts"], file["layers/3/indices"] = x.numpy(), y.numpy(), np.arange(ROWS)[::-1]
    save_file({"features": x, "layers.3": y, "z": y.clone()}, tensors)
    torch.save({"features": x, "layers.3": y}, tmp_path / "x.pt")
    colon = write(tmp_path / "x.h5:z.npy", x)
    given = {"a": path, "b": f"{path}:layers/3/acts", "c": f"{tensors}:layers.3", "d": colon}
    given |= {"e": tmp_path / "x.pt:layers.3", "f": tmp_path / "[x].h5:layers/3/acts"}
    with Features(given, normalize=False) as opened:
        rows = opened.read(0, ROWS)
        assert [s for s, t in rows.items() if torch.equal(t, y)] == ["b", "c", "e", "f"]
        again = {s: entry["path"] for s, entry in opened.describe(opened.check()).items()}
    with Features(again, normalize=False) as opened:  # as a manifest has them
        assert all(torch.equal(opened.read(0, ROWS)[s], t) for s, t in rows.items())
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["features/clip"], file["features/dino"], file["gone"] = x.numpy(), y.numpy(), h5py.SoftLink("/nowhere")
        file["flat"], file["indices"] = x.numpy(), np.arange(ROWS)
    hint = "(FILE:DATASET takes one of them)"
    for name, words in (
        ("y.h5", f"a dataset 'features', got a group of that name with features/clip, features/dino {hint}"),
        ("y.h5:gone", "a dataset 'gone', got a link to nothing"),
        ("y.h5:acts", f"a dataset 'acts', got features, flat, gone, indices {hint}"),
        ("x.safetensors:acts", f"a tensor 'acts', got 3 tensors: features, layers.3, z {hint}"),
        ("z.h5:acts", "a file, got nothing there"),
    ):
        with pytest.raises(ValueError) as error:
            Features({"a": tmp_path / name})
        assert str(error.value) == f"stream 'a' ({tmp_path / name}): expected {words}"
    with pytest.raises(ValueError, match=r"stream 'b' .*: expected `indices` 0 in row 0 as in stream 'a' .*, got 299"):
        Features({"a": f"{tmp_path / 'y.h5'}:flat", "x": f"{path}:features", "b": given["b"]})


def test_zero_rows_stay_zero_and_streams_stay_together(tmp_path):
    a, b = values(seed=1), values(width=5, seed=2)
    a[7] = 0
    paths = {"a": write(tmp_path / "a.npy", a), "b": write(tmp_path / "b.h5", b)}
    with Features(paths) as opened:
        rows = opened.read(6, 9)
        assert rows["a"][1].abs().max() == 0 and rows["b"][1].norm() == pytest.approx(1)
        summaries = opened.check()
    assert (summaries["a"].zero_rows, summaries["a"].n_zero_rows, summaries["b"].n_zero_rows) == ([7], 1, 0)
    assert summaries["a"].zeros(ROWS) == "1 zero rows (7) of 300"


@pytest.mark.parametrize("name", ["x.npy", "x.pt"])
def test_reading_leaves_no_file_pages_behind(tmp_path, name):
    """Resident pages of the mapping, which would count as this process's memory."""
    if sys.platform != "linux":
        pytest.skip("smaps is Linux's")
    path = write(tmp_path / name, torch.zeros(200_000, 16))
    with Features({"a": path}) as opened:
        for start in range(0, opened.rows, 10_000):
            opened.read(start, start + 10_000)
        text = Path("/proc/self/smaps").read_text().split(str(path))[1]
        resident = int(text.split("Rss:")[1].split()[0])  # kB
        assert resident <= 64, f"{resident} kB of {path.stat().st_size // 1024} kB"


def test_check_finds_what_is_wrong_and_what_is_there(tmp_path):
    x = values()
    write(tmp_path / "x.npy", x)
    write(tmp_path / "x.h5", x)
    write(tmp_path / "y.npy", x.flip(0))
    kinds = {name: Features({"a": tmp_path / name}).check()["a"] for name in ("x.npy", "x.h5", "y.npy")}
    assert kinds["x.npy"].fingerprint == kinds["x.h5"].fingerprint != kinds["y.npy"].fingerprint
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    spread = (unit - unit.mean(0)).square().sum() / unit.square().sum()
    assert kinds["x.npy"].spread == pytest.approx(spread.item(), rel=1e-5)
    raw = Features({"a": x + 3}, normalize=False).check()["a"].spread
    assert raw == pytest.approx((x - x.mean(0)).square().sum().item() / (x + 3).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named_with_their_positions(tmp_path, monkeypatch, value):
    monkeypatch.setattr(module, "_CHECK_BYTES", 50 * WIDTH * 4)  # several pieces
    x = values()
    for row in range(40, 290, 20):
        x[row, row % WIDTH] = value
    path = write(tmp_path / "x.npy", x)
    with pytest.raises(ValueError) as error, Features({"a": path}) as opened:
        opened.check()
    rows = ", ".join(map(str, range(40, 240, 20)))
    assert (
        str(error.value)
        == f"stream 'a' ({path}): expected finite features, got NaN or infinity in 13 rows: {rows}, ..."
    )


def test_large_finite_values_are_no_fault():
    x = torch.full((4, 3), 1e30)  # whose norm overflows float32
    assert Features({"a": x}, normalize=False).check()["a"].n_zero_rows == 0
    assert Features({"a": x}, dtype=torch.float64).check()["a"].n_zero_rows == 0


@pytest.mark.parametrize(("normalize", "what"), [(True, "norm fits"), (False, "values fit")])
def test_rows_too_large_for_float32_are_named(tmp_path, normalize, what):
    """Divided by an infinite norm they would become zero rows, and as float32 infinite."""
    x = values(dtype=torch.float32 if normalize else torch.float64)
    x[[3, 250]] *= 1e20 if normalize else 1e100
    path = write(tmp_path / "x.npy", x)
    Features({"a": path}, dtype=torch.float64).check()
    with pytest.raises(ValueError) as error:
        Features({"a": path}, normalize).check()
    expected = f"rows whose {what} float32, got too large features in 2 rows: 3, 250"
    assert str(error.value) == f"stream 'a' ({path}): expected {expected}"


def test_some_batches_are_read_and_checked_alone():
    x = values()
    x[290, 5], x[3] = float("nan"), 0
    opened = Features({"a": x})
    first, last = opened.interval(range(0, 280, 7)), opened.interval(range(280, ROWS, 7))
    assert first == (0, 280) and last == (280, ROWS) and opened.interval(range(0, 0, 7)) == (0, 0)
    summary = opened.check(rows=first)["a"]
    assert summary.zero_rows == [3] and summary.n_read == 280
    with pytest.raises(ValueError, match=r"got NaN or infinity in 1 rows: 290"):
        next(Features({"a": x}).batches(7, range(280, ROWS, 7)))
    read = dict(Features({"a": x}).batches(7, range(7, 21, 7)))
    assert list(read) == [7, 14] and read[14]["a"].equal(opened.read(14, 21)["a"])
    assert list(Features({"a": x}).batches(7, range(0, 0, 7))) == []


def test_batches_are_refused_before_the_first(monkeypatch):
    x = values()
    x[290, 5] = float("nan")
    with pytest.raises(ValueError, match=r"stream 'a': expected finite features, got NaN or infinity in 1 rows: 290"):
        next(Features({"a": x}).batches(10))
    opened = Features({"a": values()})
    opened.check()
    monkeypatch.setattr(opened, "check", lambda: pytest.fail("checked twice"))
    assert sum(len(rows["a"]) for _, rows in opened.batches(7)) == ROWS


def test_quick_check_reads_a_sample(monkeypatch):
    monkeypatch.setattr(module, "_CHECK_BYTES", 64)
    x = values(100_000, 4)
    opened = Features({"a": x})
    read, real = [], opened.sources["a"].read
    monkeypatch.setattr(opened.sources["a"], "read", lambda a, b: (read.append(b - a), real(a, b))[1])
    first = opened.check(full=False)["a"].fingerprint
    assert sum(read) <= 256 * 64
    x[0, 0] += 1
    assert opened.check(full=False)["a"].fingerprint != first


# --------------------------------------------------------------------------------------------------------------- loader


def numbered(rows=2000, widths=(3, 2)) -> Features:
    """Row i of every stream holds i + 1."""
    number = torch.arange(1.0, rows + 1)[:, None]
    return Features({f"s{d}": number.expand(rows, d).contiguous() for d in widths}, normalize=False)


def drawn(loader: Loader, first=0, last=1, skip=0):
    batches = list(loader.epochs(first, last, skip))
    for batch in batches:
        a, b = batch.x.values()
        assert torch.equal(a[:, 0], b[:, 0]), "streams came apart"
    return batches


def rows_of(batches) -> torch.Tensor:
    return torch.cat([next(iter(b.x.values()))[:, 0] for b in batches]).long() - 1


KINDS = [("window", 1 << 30), ("window", 4000), ("official", 1 << 30), ("none", 1 << 30)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("shuffle", "memory"), KINDS)
def test_every_row_once_an_epoch_and_resumed_anywhere(shuffle, memory, drop_last):
    opened = numbered(1990)

    def loader(state=None):
        generator = torch.Generator().manual_seed(3)
        if state is not None:
            generator.set_state(state)
        return Loader(opened, 64, generator, shuffle=shuffle, memory=memory, drop_last=drop_last)

    assert loader().resident == (shuffle == "window" and memory > 10**6)
    batches = drawn(loader(), 0, 3)
    per_epoch = len(loader())
    assert per_epoch == (31 if drop_last else 32) and len(batches) == 3 * per_epoch
    for epoch in range(3):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [b.number for b in part] == list(range(per_epoch)) and {b.epoch for b in part} == {epoch}
        assert [b.last for b in part] == [False] * (per_epoch - 1) + [True]
        rows = rows_of(part)
        assert len(rows.unique()) == len(rows) == (1984 if drop_last else 1990)
    orders = [rows_of([b for b in batches if b.epoch == epoch]) for epoch in range(3)]
    assert torch.equal(orders[0], orders[1]) == (shuffle == "none")
    assert torch.equal(rows_of(drawn(loader(), 0, 3)), rows_of(batches))
    for at in (1, 17, per_epoch - 1, per_epoch, per_epoch + 9):  # so many batches were taken
        last = batches[at - 1]
        rest = drawn(loader(last.epoch_state), last.epoch, 3, skip=last.number + 1)
        assert torch.equal(rows_of(rest), rows_of(batches[at:])), at
        assert [(b.epoch, b.number) for b in rest] == [(b.epoch, b.number) for b in batches[at:]]


@pytest.mark.parametrize(("shuffle", "memory"), KINDS)
def test_batches_of_shards_are_those_of_their_rows(tmp_path, shuffle, memory):
    x = values(700, 3)
    for i, part in enumerate(x.split([3, 0, 296, 400, 1])):
        write(tmp_path / f"x_{i}.npy", part)
    batches = []
    for value in (x, tmp_path / "x_*.npy"):
        with Features({"a": value}) as opened:
            loader = Loader(opened, 64, torch.Generator().manual_seed(3), shuffle=shuffle, memory=memory)
            batches.append([batch.x["a"] for batch in loader.epochs(0, 2)])
    assert len(batches[0]) == 22
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_quick_check_reads_of_every_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHECK_BYTES", 64)
    for i in range(300):
        write(tmp_path / f"x_{i}.npy", values(3, 4))
    write(tmp_path / "x_300.npy", values(0, 4))
    with Features({"a": tmp_path / "x_*.npy"}) as opened:
        read, real = [], opened.sources["a"].read
        monkeypatch.setattr(opened.sources["a"], "read", lambda a, b: (read.append(a), real(a, b))[1])
        opened.check(full=False)
    assert set(range(0, 900, 3)) <= set(read)


def test_official_order_is_the_official_samplers():
    """Runs of batch_size rows in the order of torch.randperm, the rest last."""
    generator = torch.Generator().manual_seed(5)
    batches = drawn(Loader(numbered(330), 100, generator, shuffle="official"))
    order = torch.randperm(3, generator=torch.Generator().manual_seed(5)).tolist()
    expected = [torch.arange(100 * i, 100 * i + 100) for i in order] + [torch.arange(300, 330)]
    assert torch.equal(rows_of(batches), torch.cat(expected))


def test_windows_mix_well():
    """Files are often sorted. A batch of a window covers as many parts of the file as chance in 16 blocks would."""
    opened = numbered(20_000)
    loader = Loader(opened, 200, torch.Generator().manual_seed(0), memory=20_000 * 20 // 4)
    assert not loader.resident and loader.window_blocks >= 16
    batches = drawn(loader)
    parts = [len((rows_of([b]) // loader.block_rows).unique()) for b in batches]
    assert min(parts) >= 14
    # consecutive batches come from all over the file: the mean row number is near the middle
    means = torch.stack([rows_of(batches[i : i + 10]).float().mean() for i in range(0, 100, 10)])
    assert (means / 20_000 - 0.5).abs().max() < 0.25
    order = rows_of(batches)
    assert (order.diff() == 1).float().mean() < 0.02  # neighbours in the file are apart


@pytest.mark.parametrize("shuffle", ["window", "official", "none"])
def test_intervals_keep_to_their_rows(shuffle):
    intervals = [(0, 90), (110, 111), (500, 777)]
    loader = Loader(numbered(), 50, torch.Generator().manual_seed(1), shuffle=shuffle, intervals=intervals, memory=5000)
    rows = rows_of(drawn(loader)).sort().values
    assert torch.equal(rows, torch.cat([torch.arange(a, b) for a, b in intervals]))


def test_windows_stay_within_memory():
    opened, memory = numbered(20_000, widths=(30, 10)), 400_000
    loader = Loader(opened, 64, torch.Generator(), memory=memory)
    batches = loader.epochs(0, 1)
    for _ in range(200):
        next(batches)
    # the thread's buffers, found by way of the frame that holds it
    worker = batches.gi_frame.f_locals["worker"]
    held = sum(x.numel() * x.element_size() for buffer in worker.buffers for x in buffer.values())
    assert 0.7 * memory < held <= memory
    batches.close()


def test_the_thread_ends_with_its_consumer_and_reports_its_errors(monkeypatch):
    opened = numbered()
    loader = Loader(opened, 10, torch.Generator(), memory=5000)
    batches = loader.epochs(0, 5)
    thread = batches.gi_frame.f_locals["worker"].thread
    next(batches)
    batches.close()
    assert not thread.is_alive()

    def fail(*args):
        raise OSError("the disk went away")

    monkeypatch.setattr(opened, "read_stream", fail)
    with pytest.raises(OSError, match="the disk went away"):
        list(loader.epochs(0, 1))


def test_waiting_for_data_is_told_from_computing(monkeypatch):
    opened = numbered(400)
    real = opened.read_stream

    def slow(*args):
        time.sleep(0.003)
        return real(*args)

    monkeypatch.setattr(opened, "read_stream", slow)
    starved = Loader(opened, 20, torch.Generator(), memory=4000)
    list(starved.epochs(0, 1))

    def busy() -> float:
        quick = Loader(numbered(400), 20, torch.Generator(), memory=4000)
        for _ in quick.epochs(0, 1):
            time.sleep(0.003)
        return quick.waited

    assert starved.waited > 0.05 > min(busy() for _ in range(5))  # other work may hold up its thread, not every time


def test_bad_arguments_are_named():
    opened = numbered(100)
    cases = [
        (lambda: Loader(opened, 0, torch.Generator()), "batch_size: expected an int >= 1, got 0"),
        (
            lambda: Loader(opened, 50, torch.Generator(), memory=100),
            "memory: expected at least 2,000 bytes for batches",
        ),
        (lambda: Loader(opened, 200, torch.Generator(), drop_last=True), "batch_size: expected at most 100"),
        (lambda: Loader(opened, 5, torch.Generator(), shuffle="all"), "shuffle: expected one of 'window'"),
        (lambda: Loader(opened, 5, torch.Generator(), intervals=[]), "intervals: expected at least one row"),
        (lambda: Features({}), "streams: expected a dict of 1 to 8 streams, name to file, got 0 streams"),
        (lambda: Features(["a.npy"]), "streams: expected a dict of 1 to 8 streams, name to file, got a list"),
        (
            lambda: Features({str(s): torch.ones(2, 2) for s in range(9)}),
            "streams: expected a dict of 1 to 8 streams, name to file, got 9 streams",
        ),
        (
            lambda: Features({"a": np.ones((2, 2), np.float32)}),
            "streams['a']: expected a path, a list of paths or a torch.Tensor [n, d], got a ndarray",
        ),
        (lambda: Features({"a": 3}), "streams['a']: expected a path, a list of paths or a torch.Tensor [n, d], got 3"),
        (
            lambda: Features({"a": torch.ones(2, 2).to_sparse()}),
            "streams['a']: expected a dense tensor, got one of layout torch.sparse_coo",
        ),
        (lambda: Features({"a": torch.ones(0, 2)}), "streams['a']: expected at least one row and one column, got a"),
        (lambda: Features({"a": torch.ones(2, 2, device="meta")}), "streams['a']: expected a tensor on the CPU, got a"),
        (lambda: Features({"a": torch.ones(2, 2)}, dtype=torch.float16), "dtype: expected torch.float32"),
        (lambda: Features({"a": torch.ones(2)}), "streams['a']: expected shape [n, d]"),
        (
            lambda: opened.require_widths({"s3": 3, "x": 2}, "the model"),
            "streams: expected s3, x, the streams of the model",
        ),
        (
            lambda: opened.require_widths({"s3": 3, "s2": 4}, "the model"),
            "stream 's2': expected width 4 as in the model",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message), error.value


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for package, name in (("h5py", "x.h5"), ("safetensors", "x.safetensors")):
        write(tmp_path / name, values())
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"stream 'a'.*, .* file, needs {package}: pip install {package}$"):
            Features({"a": tmp_path / name})
