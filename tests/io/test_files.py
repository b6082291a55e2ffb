"""Every layout that h5py, safetensors and NumPy write is read bit for bit, and damaged files are refused by name."""

import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from damage import flipped, scratched
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sparc_kernels import AlignedSAE
from sparc_kernels.io.features import Features
from sparc_kernels.io.files import MappedRows
from sparc_kernels.io.run_checkpoints import save_checkpoint
from sparc_kernels.io.weights import export_official

PAD = np.full(77, 7.0)  # before the features, so that they lie at another offset in every file


def contiguous(folder: Path, x: np.ndarray, name="x.h5", **options) -> Path:
    with h5py.File(folder / name, "w", **options) as file:
        file["pad"], file["features"], file["indices"] = PAD, x, np.arange(len(x))
    return folder / name


def user_block(folder, x) -> Path:
    return contiguous(folder, x, userblock_size=512)


def newest_format(folder, x) -> Path:
    return contiguous(folder, x, libver="latest")


def created(folder, x, name="x.h5", **options) -> Path:
    with h5py.File(folder / name, "w") as file:
        file.create_dataset("features", data=x, **options)
    return folder / name


def chunked(folder, x) -> Path:
    return created(folder, x, chunks=(max(1, len(x) // 3), max(1, x.shape[1] // 2)), maxshape=(None, None))


def compressed(folder, x) -> Path:
    return created(folder, x, chunks=(min(2, len(x)), x.shape[1]), compression="gzip", shuffle=True, fletcher32=True)


def lzf(folder, x) -> Path:
    return created(folder, x, chunks=(1, 1), compression="lzf")


def raw_files(folder, x) -> Path:
    cut = x.nbytes // 3
    return created(folder, x, external=[(folder / "one.bin", 5, cut), (folder / "two.bin", 0, h5py.h5s.UNLIMITED)])


def compact(folder, x) -> Path:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    with h5py.File(folder / "x.h5", "w") as file:
        space = h5py.h5s.create_simple(x.shape)
        dataset = h5py.h5d.create(file.id, b"features", h5py.h5t.py_create(x.dtype), space, plist)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, x)
    return folder / "x.h5"


def linked(folder, x) -> Path:
    with h5py.File(folder / "x.h5", "w") as file:
        file["group/deep"], file["hard"], file["features"] = x, PAD, h5py.SoftLink("/group/deep")
    return folder / "x.h5"


def linked_outside(folder, x) -> Path:
    contiguous(folder, x, "inner.h5")
    with h5py.File(folder / "x.h5", "w") as file:
        file["other"], file["features"] = (
            np.full(x.nbytes + 9000, 7, np.uint8),
            h5py.ExternalLink("inner.h5", "features"),
        )
    return folder / "x.h5"


def virtual(folder, x) -> Path:
    half = len(x) // 2
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    layout[half:] = h5py.VirtualSource("inner.h5", "features", x[half:].shape)[: len(x) - half]
    contiguous(folder, x[half:], "inner.h5")
    with h5py.File(folder / "x.h5", "w") as file:
        if half:
            file["here"], layout[:half] = x[:half], h5py.VirtualSource(".", "here", x[:half].shape)
        file.create_virtual_dataset("features", layout)
    return folder / "x.h5"


def bfloat16(folder, x) -> Path:
    """A type that NumPy has not: h5py reads float32, two bytes a value are in the file."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(folder / "x.h5", "w") as file:
        dataset = h5py.h5d.create(file.id, b"features", kind, h5py.h5s.create_simple(x.shape))
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.nan_to_num(x.astype("=f4")))
    return folder / "x.h5"


def npy(folder, x) -> Path:
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def safetensors(folder, x) -> Path:
    save_file({"a": PAD, "features": np.ascontiguousarray(x), "z": PAD}, folder / "x.safetensors")
    return folder / "x.safetensors"


def npy_by_columns(folder, x) -> Path:
    np.save(folder / "x.npy", np.asfortranarray(x))
    return folder / "x.npy"


def torch_file(folder, x: np.ndarray | torch.Tensor, suffix=".pt", **beside) -> Path:
    x = torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x
    torch.save({"a": torch.ones(3), "features": x, **beside} if beside else x, folder / f"x{suffix}")
    return folder / f"x{suffix}"


def torch_dict(folder, x) -> Path:
    return torch_file(folder, x, ".pth", indices=torch.arange(2 * len(x))[::2], z=torch.nn.Parameter(torch.ones(1)))


def torch_by_columns(folder, x) -> Path:
    return torch_file(folder, torch.from_numpy(x.copy(order="F")))


def torch_view(folder, x) -> Path:
    """Every second row and third column of another tensor, from its second row and column on."""
    whole = torch.full((2 * len(x) + 3, 3 * x.shape[1] + 2), 7.0).to(torch.from_numpy(x.copy()).dtype)
    whole[1 : 1 + 2 * len(x) : 2, 1 : 1 + 3 * x.shape[1] : 3] = torch.from_numpy(x.copy())
    return torch_file(folder, whole[1 : 1 + 2 * len(x) : 2, 1 : 1 + 3 * x.shape[1] : 3], other=whole)


def shards(folder, x: np.ndarray) -> Path:
    """Of every mapped and one packed format, cut anywhere, one of them empty: a pattern."""
    cuts = np.sort(np.random.default_rng(len(x)).integers(0, len(x) + 1, 10))
    (folder / "parts").mkdir()
    for i, part in enumerate(np.split(x, [*cuts, cuts[-1]])):
        write = (npy, safetensors, torch_file, created, chunked if len(part) else created, npy)[i % 6]
        file = write(folder / "parts", part)
        file.rename(file.with_name(f"x_{i}{file.suffix}"))
    return folder / "parts" / "x_*"


MAPPED = [contiguous, user_block, newest_format, linked]
NATIVE = [npy, npy_by_columns, safetensors, torch_file, torch_dict, torch_by_columns, torch_view]
LAYOUTS = [*MAPPED, *NATIVE, chunked, compressed, lzf, raw_files, compact, linked_outside, virtual, bfloat16]
LAYOUTS += [shards]


def as_the_library_reads(path: Path) -> np.ndarray:
    """In native byte order."""
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name), key=lambda file: int(file.stem[2:]))
        return np.concatenate([as_the_library_reads(file) for file in files])
    if path.suffix == ".npy":
        x = np.load(path)
    elif path.suffix == ".safetensors":
        x = load_file(path)["features"]
    elif path.suffix in (".pt", ".pth"):
        x = torch.load(path, weights_only=True, mmap=True)
        x = (x["features"] if isinstance(x, dict) else x).contiguous().numpy()
    else:
        with h5py.File(path) as file:
            x = file["features"][()]
    return x.astype(x.dtype.newbyteorder("="))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_layout_is_read_bit_for_bit(layout, dtype, shape, seed):
    """Any bits, NaN with payloads among them, in either byte order (all but HDF5: in the machine's)."""
    if layout in [*NATIVE, shards]:
        dtype = dtype.replace(">", "<")
    generator = np.random.default_rng(seed)
    x = np.frombuffer(generator.bytes(np.dtype(dtype).itemsize * shape[0] * shape[1]), dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = layout(Path(folder), x)
        want = as_the_library_reads(path)
        if layout is not bfloat16:
            assert want.tobytes() == x.astype(want.dtype).tobytes(), "not what was written"
        with Features({"a": path}, normalize=False) as opened:
            start = int(generator.integers(shape[0]))
            stop = int(generator.integers(start, shape[0])) + 1
            source = opened.sources["a"]
            for a, b in ((start, stop), (0, shape[0])):
                assert source.read(a, b).numpy().tobytes() == want[a:b].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_lies_in_one_piece_in_its_file_is_mapped(tmp_path, layout):
    x = np.ones((6, 4), "<f4")
    with Features({"a": layout(tmp_path, x)}, normalize=False) as opened:
        assert opened.read(0, 6)["a"].tolist() == x.tolist()
        mapped = isinstance(opened.sources["a"], MappedRows)
        assert mapped == (layout in [*MAPPED, *NATIVE])


@pytest.mark.parametrize(
    ("layout", "damage", "got"),
    [
        (raw_files, lambda folder: (folder / "two.bin").write_bytes(b"1234"), "4 of 64 bytes in {folder}/two.bin"),
        (virtual, lambda folder: (folder / "inner.h5").unlink(), "a part of it in inner.h5, where nothing is"),
        (virtual, lambda folder: h5py.File(folder / "inner.h5", "w").close(),
         "a part of it in inner.h5, 'features': no such dataset"),
        (virtual, lambda folder: created(folder, None, shape=(3, 4), dtype="f4", name="inner.h5"),
         "a part of it in inner.h5, 'features': rows never written"),
        (virtual, lambda folder: contiguous(folder, np.ones((2, 4), "<f4"), "inner.h5"),
         "a part of it in inner.h5, 'features': shape [2, 4], less than is taken from it"),
        (virtual, lambda folder: taken(folder, slice(4)), "8 values that are in no source"),
        (contiguous, lambda folder: created(folder, None, shape=(6, 4), dtype="f4"), "rows never written"),
        (contiguous, lambda folder: resized(folder), "4 of 10 chunks never written"),
    ],
)  # fmt: skip
def test_what_hdf5_would_fill_up_is_refused(tmp_path, layout, damage, got):
    """HDF5 reads zeros there, and says nothing."""
    path = layout(tmp_path, np.ones((6, 4), "<f4"))
    damage(tmp_path)
    with pytest.raises(ValueError) as error:
        Features({"a": path})
    expected = "expected all of the dataset 'features', got " + got.format(folder=tmp_path)
    assert str(error.value) == f"stream 'a' ({path}): {expected}"


def taken(folder: Path, rows: slice) -> None:
    layout = h5py.VirtualLayout((6, 4), "<f4")
    layout[rows] = h5py.VirtualSource(contiguous(folder, np.ones((6, 4), "<f4"), "inner.h5"), "features", (6, 4))[rows]
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_virtual_dataset("features", layout)


def resized(folder: Path) -> None:
    with h5py.File(chunked(folder, np.ones((6, 4), "<f4")), "a") as file:
        file["features"].resize(9, 0)


DAMAGED = [
    npy,
    safetensors,
    contiguous,
    user_block,
    newest_format,
    chunked,
    compressed,
    raw_files,
    compact,
    linked_outside,
    virtual,
    bfloat16,
    torch_dict,
    torch_view,
    shards,
]


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_file_is_refused_by_name_or_read_as_its_library_does(tmp_path, seed):
    generator = np.random.default_rng(seed)
    path = DAMAGED[seed % len(DAMAGED)](tmp_path, generator.standard_normal((40, 6)).astype("<f4"))
    file = generator.choice(sorted(file for file in tmp_path.rglob("*") if file.is_file()))
    file.write_bytes(scratched(file.read_bytes(), generator))
    try:
        with Features({"a": path}, normalize=False) as opened:
            opened.check()
            got = opened.sources["a"].read(0, opened.rows).numpy()
    except ValueError as error:
        named = path, file  # of shards the one that is damaged
        assert str(error).startswith(tuple(f"stream 'a' ({name}): expected " for name in named)), error
        return
    want = as_the_library_reads(path)
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_torch_file_is_never_read_as_other_values(tmp_path, seed):
    """It has a checksum of its values, which torch itself does not look at."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((40, 6)).astype("<f4")
    path = (torch_dict, torch_view, torch_file, shards)[seed % 4](tmp_path, x)
    file = generator.choice(sorted(file for file in tmp_path.rglob("*.pt*")))
    content = file.read_bytes()
    file.write_bytes((flipped if seed % 8 < 6 else scratched)(content, generator))
    try:
        with Features({"a": path}, normalize=False) as opened:
            opened.check()
            assert opened.sources["a"].read(0, opened.rows).numpy().tobytes() == x.tobytes()
    except ValueError as error:
        assert str(error).startswith((f"stream 'a' ({path}): expected ", f"stream 'a' ({file}): expected ")), error


def test_checksums_are_compared_over_all_values(tmp_path, monkeypatch):
    monkeypatch.setattr("sparc_kernels.io.files._CHECK_BYTES", 100)
    path = torch_file(tmp_path, torch.full((40, 6), 5.0), indices=torch.arange(40))
    whole, refused = path.read_bytes(), r"x\.pt\): expected values of the CRC-32 [0-9a-f]{8} in the file, got "
    values = whole.find(240 * struct.pack("<f", 5))
    for place in (values, values + 239 * 4, whole.find(struct.pack("<q", 38)), whole.find(struct.pack("<q", 39))):
        path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
        with pytest.raises(ValueError, match=refused):
            Features({"a": path}).check()
    path.write_bytes(whole)
    with Features({"a": path}) as opened:
        opened.close()
        opened.check()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.float32(3), "rows and columns, [n, d], got shape []"),
        (np.ones(4, "f4"), "rows and columns, [n, d], got shape [4]"),
        (np.ones((2, 3, 4), "f4"), "rows and columns, [n, d], got shape [2, 3, 4]"),
        (np.ones((0, 3), "f4"), "at least one row and one column, got shape [0, 3]"),
        (np.ones((3, 0), "f4"), "at least one row and one column, got shape [3, 0]"),
        (np.ones((3, 4), ">f4"), "float64, float32, float16 or bfloat16 features, got >f4"),
        (np.ones((3, 4), "i4"), "float64, float32, float16 or bfloat16 features, got i"),
        (np.ones((3, 4), "?"), "float64, float32, float16 or bfloat16 features, got b"),
        (np.ones((3, 4), "c8"), "float64, float32, float16 or bfloat16 features, got c"),
        (np.full((3, 4), b"x"), "float64, float32, float16 or bfloat16 features, got |S1"),
        (np.zeros((3, 4), "f4,f4"), "float64, float32, float16 or bfloat16 features, got [("),
    ],
)
def test_other_shapes_and_types_are_refused(tmp_path, x, words):
    paths = [npy(tmp_path, x), *([created(tmp_path, x)] if x.dtype.isnative else [])]
    if x.ndim and x.dtype.kind in "fi?" and x.dtype.isnative:
        paths.append(safetensors(tmp_path, x))
    for path in paths:
        with pytest.raises(ValueError) as error:
            Features({"a": path})
        assert str(error.value).lower().startswith(f"stream 'a' ({path}): expected {words}".lower())


def repacked(folder: Path, **options) -> None:
    """The file of torch.save as another program packs it, with `order` in place of its byte order."""
    order, compression = options.get("order"), options.get("compression", zipfile.ZIP_STORED)
    path = torch_file(folder, torch.ones(4, 3))
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in content.items():
            new.writestr(name, order if order and name.endswith("/byteorder") else data)


def official_weights(folder: Path) -> None:
    export_official(AlignedSAE({"a": 3}, n_latents=8, k=2), folder)
    (folder / "msae_checkpoint.pth").rename(folder / "x.pt")


def our_checkpoint(folder: Path) -> None:
    save_checkpoint(folder, 1, {"model": AlignedSAE({"a": 3}, n_latents=8, k=2).state_dict()}, 1).rename(
        folder / "x.pt"
    )


def saved(x, **options):
    return lambda folder: torch.save(x, folder / "x.pt", **options)


def quantised(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        x = torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8)
        torch.save({"features": x}, folder / "x.pt")


OLD = "an older one or a plain pickle, which cannot be mapped: load and torch.save it again"
WEIGHTS = "expected features, got the weights of a model (encoders.a.weight, ...)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (saved(torch.ones(4, 3), _use_new_zipfile_serialization=False), f"since PyTorch 1.6, got {OLD}"),
        (lambda folder: (folder / "x.pt").write_bytes(pickle.dumps(np.ones(3))), f"since PyTorch 1.6, got {OLD}"),
        (saved([torch.ones(4, 3)] * 2), "expected a tensor [n, d] or a dict of them, got a list"),
        (saved({"features": np.ones((4, 3))}), "tensors alone, got other objects (Unsupported global: GLOBAL numpy."),
        (saved(torch.nn.Linear(3, 4)), "other objects (Unsupported global: GLOBAL torch.nn.modules.linear.Linear)"),
        (saved({"a": torch.ones(4, 3), "b": torch.ones(4, 3)}), "'features', or only one, got 2 tensors: a, b (FILE:"),
        (saved({"model": {"a": torch.ones(4, 3), 1: 2}}), "'features', or only one, got 0 tensors: nothing"),
        (saved({"features": [1, 2]}), "expected a tensor 'features', got a list"),
        (saved({0: torch.ones(4, 3), 1: torch.ones(4, 3)}), "expected tensors whose names are texts, got 0, 1"),
        (quantised, "expected dense tensors, got a quantised one: save its dequantize()"),
        (saved(torch.eye(3).to_sparse()), "dense tensor"),
        (saved(torch.ones(4, 3, dtype=torch.complex64).conj().imag), "a plain tensor, got a view that negates its"),
        (saved(torch.ones(4, 3, device="meta")), "the values of 'features' in the file, got none"),
        (saved(torch.ones(4, 3, dtype=torch.int64)), "float64, float32, float16 or bfloat16 features, got int64"),
        (saved(torch.ones(0, 3)), "expected at least one row and one column, got shape [0, 3]"),
        (lambda folder: repacked(folder, compression=zipfile.ZIP_DEFLATED), "in the file, got none, compressed"),
        (lambda folder: repacked(folder, order=b"big"), "expected little-endian values, as this machine's, got big-"),
        (official_weights, WEIGHTS),
        (our_checkpoint, WEIGHTS),
    ],
)  # fmt: skip
def test_what_is_no_tensor_of_features_in_a_torch_file_is_refused(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError) as error:
        Features({"a": tmp_path / "x.pt"})
    assert str(error.value).startswith(f"stream 'a' ({tmp_path / 'x.pt'}): expected ") and words in str(error.value)


def test_torch_files_packed_again_or_without_checksums_are_read(tmp_path):
    repacked(tmp_path)
    torch.serialization.set_crc32_options(False)
    torch.save(torch.ones(1, 3).expand(4, 3), tmp_path / "y.pt")
    torch.serialization.set_crc32_options(True)
    with Features({"a": tmp_path / "x.pt", "b": tmp_path / "y.pt"}, normalize=False) as opened:
        assert all(torch.equal(x, torch.ones(4, 3)) for x in opened.read(0, 4).values())


def test_a_torch_that_does_not_tell_places_is_named(tmp_path, monkeypatch):
    """The attribute of a storage that says where its values are is no public one."""
    path, load = torch_file(tmp_path, torch.ones(4, 3)), torch.load

    def without(*args, **options):
        loaded = load(*args, **options)
        del loaded.untyped_storage()._checkpoint_offset
        return loaded

    monkeypatch.setattr(torch, "load", without)
    with pytest.raises(ValueError) as error:
        Features({"a": path})
    expected = "expected a PyTorch that tells where .pt files have their values, as 2.13 does, got "
    assert str(error.value).startswith(f"stream 'a' ({path}): {expected}{torch.__version__}, which does not: save")


def test_virtual_rows_without_an_end_are_read(tmp_path):
    """A mapping that grows with its source has no count of values, and no end to compare with the source's shape."""
    x, endless = np.arange(24, dtype="<f4").reshape(6, 4), slice(0, h5py.h5s.UNLIMITED)
    with h5py.File(tmp_path / "inner.h5", "w") as file:
        file.create_dataset("features", data=x, maxshape=(None, 4))
    layout = h5py.VirtualLayout((6, 4), "<f4", maxshape=(None, 4))
    layout[endless] = h5py.VirtualSource("inner.h5", "features", (6, 4), maxshape=(None, 4))[endless]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
    with Features({"a": tmp_path / "x.h5"}, normalize=False) as opened:
        assert opened.read(0, 6)["a"].tolist() == x.tolist()


def numbered(folder: Path, *names: str, rows=4) -> dict[str, np.ndarray]:
    """Files of these names, each of other rows."""
    arrays = {name: np.random.default_rng(i).standard_normal((rows, 3)).astype("<f4") for i, name in enumerate(names)}
    for name, x in arrays.items():
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / name, x)
    return arrays


@pytest.mark.parametrize(
    ("names", "pattern", "order"),
    [
        ([f"f_{i}.npy" for i in range(12)], "f_*.npy", range(12)),
        (["f_2.npy", "f_10.npy"], "f_[0-9].npy", [0]),
        (["f_9.npy", "f_10.npy", "f_8.npy"], "f_[0-9]*.npy", [2, 0, 1]),  # part of them on purpose
        (["r7_s1.npy", "r7_s2.npy"], "r7_*.npy", [0, 1]),
        (["r7_s3.npy"], "r7_s3*.np[y]", [0]),
        ([f"d{i}/f_3.npy" for i in range(11)], "d*/f_3.npy", range(11)),
        (["f_08.npy", "f_4.npy", "f_00.npy"], "f_*.npy", [2, 1, 0]),  # of 4 rows each
        (["f.npy"], "f*", [0]),
        (["f-00002-of-00002.npy", "f-00001-of-00002.npy"], "f*", [1, 0]),
        (["f-00001-of-00009.npy"], "f-0000[1-3]*", [0]),  # part of them on purpose
    ],
)
def test_a_pattern_takes_its_files_in_the_order_of_their_numbers(tmp_path, monkeypatch, names, pattern, order):
    parts = list(numbered(tmp_path, *names).values())
    want = np.concatenate([parts[i] for i in order])
    monkeypatch.chdir(tmp_path)
    for value in (tmp_path / pattern, pattern, [names[i] for i in order]):
        with Features({"a": value}, normalize=False) as opened:
            again = opened.describe(opened.check())["a"]["path"]
        monkeypatch.chdir("/")
        with Features({"a": again}, normalize=False) as opened:  # as a manifest has it
            assert opened.read(0, opened.rows)["a"].numpy().tobytes() == want.tobytes()
        monkeypatch.chdir(tmp_path)


ONE = "expected files that differ in one number, or a list of them (--stream NAME=FILE,FILE), got "


@pytest.mark.parametrize(
    ("names", "pattern", "words"),
    [
        (["f_0.npy", "f_1.npy", "f_3.npy"], "f_*.npy", "expected {folder}/f_2.npy, got f_3.npy after f_1.npy: a shard"),
        (["f_008.npy", "f_010.npy"], "f_[0]*", "expected {folder}/f_009.npy, got f_010.npy after f_008.npy: a shard"),
        (["f_1.npy", "f_5.npy"], "f_*.npy", "expected {folder}/f_2.npy, got f_5.npy after f_1.npy: a shard"),
        (["f_00.npy", "f_08.npy"], "f_*.npy", "expected {folder}/f_01.npy or {folder}/f_04.npy, got f_08.npy "),
        (["f_0.npy", "f_4.npy", "f_12.npy"], "f_*", "expected {folder}/f_8.npy, got f_12.npy after f_4.npy: a shard"),
        (["f_2.npy", "f_3.npy"], "f_*.npy", "expected numbers from 0 or 1 on, or a list of the files ("),
        (["f_2.npy"], "f_*.npy", "expected numbers from 0 or 1 on, or a list of the files ("),
        (["f_0.npy", "f_1.npy", "f_extra.npy"], "f_*.npy", f"{ONE}{{folder}}/f_0.npy and {{folder}}/f_extra.npy"),
        (["a/f_0.npy", "b/f_0.npy"], "*/f_?.npy", f"{ONE}{{folder}}/a/f_0.npy and {{folder}}/b/f_0.npy"),
        (["f_1e4f.npy", "f_7e4f.npy"], "f*", f"{ONE}{{folder}}/f_1e4f.npy and {{folder}}/f_7e4f.npy"),
        (["f_2024-01-31.npy", "f_2024-02-01.npy"], "f*", f"{ONE}{{folder}}/f_2024-01-31.npy and {{folder}}/f_2024-02"),
        (["f_1.npy", "f_01.npy"], "f_*.npy", "expected one file of each number, got {folder}/f_01.npy and "),
        (["f_1.npy", "f_1.pt"], "f_*", "expected one file of each number, got {folder}/f_1.npy and {folder}/f_1.pt"),
        (["r0_s0.npy", "r0_s1.npy", "r1_s1.npy"], "*.npy", f"{ONE}{{folder}}/r0_s0.npy and {{folder}}/r1_s1.npy"),
        (["r0_s0.npy", "r2_s0.npy"], "*.npy", "expected {folder}/r1_s0.npy or {folder}/r4_s0.npy, got r2_s0.npy "),
        (["f-0-of-3.npy", "f-1-of-3.npy"], "f*", "expected 3 files, as their names say, got 2, from {folder}/f-0-of-3"),
        (["f_0.npy"], "g_*.npy", "expected files of this pattern, got none"),
        (["f_0.npy", "f_1.csv"], "f_*", "expected a file ending in .h5, .hdf5, .safetensors, .npy, .pt, .pth, got"),
        (["g_0/f_0.npy"], "g*", "/g_0): expected a file, or a pattern for several ({folder}/g_0/*.npy), got a"),
    ],
)  # fmt: skip
def test_a_pattern_loses_no_file_silently(tmp_path, names, pattern, words):
    numbered(tmp_path, *(name for name in names if name.endswith(".npy")))
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError) as error:
        Features({"a": tmp_path / pattern})
    assert str(error.value).startswith(f"stream 'a' ({tmp_path}/") and words.format(folder=tmp_path) in str(error.value)


def test_shards_of_streams_begin_with_the_same_number(tmp_path):
    """Of as many rows, a first shard that is missing would shift all pairs."""
    numbered(tmp_path, *(f"a_{i}.npy" for i in (1, 2, 3)), *(f"b_{i}.npy" for i in (0, 1, 2)))
    numbered(tmp_path, "c_0.npy", rows=12)
    a, b = tmp_path / "a_*.npy", tmp_path / "b_*.npy"
    with pytest.raises(ValueError) as error:
        Features({"a": a, "x": torch.ones(12, 3), "b": b})
    expected = f"shards from number 1 on as in stream 'a' ({a}), got 0 as the first: name the files one by one"
    assert str(error.value).startswith(f"stream 'b' ({b}): expected {expected}")
    Features({"c": tmp_path / "c_*.npy", "b": b, "a": [tmp_path / f"a_{i}.npy" for i in (1, 2, 3)]}).close()


def test_shards_of_another_kind_are_named(tmp_path):
    numbered(tmp_path, "f_0.npy", "f_1.npy", "f_2.npy")
    pattern, last = tmp_path / "f_*.npy", tmp_path / "f_2.npy"
    for x, words in (
        (np.ones((4, 2), "<f4"), f"({last}): expected width 3 as in {tmp_path}/f_0.npy, got width 2"),
        (np.ones((0, 3), "<f8"), f"({last}): expected dtype torch.float32 as in {tmp_path}/f_0.npy, got dtype torch.f"),
        (np.ones((4, 3), "<i4"), f"({last}): expected float64, float32, float16 or bfloat16 features, got int32"),
        (np.array([[1, 2, 3], [1, np.nan, 3]], "<f4"), f"({pattern}): expected finite features, got NaN or infinity in "
         "1 rows: 9 (the first is row 1 of f_2.npy)"),
    ):  # fmt: skip
        np.save(last, x)
        with pytest.raises(ValueError) as error, Features({"a": pattern}) as opened:
            opened.check()
        assert str(error.value).startswith(f"stream 'a' {words}")
    for i in range(3):
        np.save(tmp_path / f"f_{i}.npy", np.ones((0, 3), "<f4"))
    with pytest.raises(ValueError, match=r"\*\.npy\): expected at least one row and one column, got shape \[0, 3\]"):
        Features({"a": pattern})
    numbered(tmp_path, "f_2.npy")
    with pytest.raises(ValueError, match=rf"stream 'a' \({last} and 1 more\): expected 4 rows as in stream 'b', got 8"):
        Features({"b": torch.ones(4, 3), "a": [last, last]})


@pytest.mark.parametrize("layout", [npy, torch_file, compressed, linked_outside])
def test_many_shards_keep_few_files_open_and_must_not_change(tmp_path, monkeypatch, layout):
    monkeypatch.setattr("sparc_kernels.io.shards.OPEN", 2)
    x = np.arange(60, dtype="<f4").reshape(20, 3)
    folders = [tmp_path / f"s{i}" for i in range(10)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        layout(folder, x[2 * i : 2 * i + 2])
    before = open_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "x.h5" if layout in (compressed, linked_outside) else "x.*"
    with Features({"a": f"s*/{name}"}, normalize=False) as opened:
        monkeypatch.chdir("/")
        generator = np.random.default_rng(0)
        for start in generator.integers(0, 18, 30):
            stop = int(generator.integers(start, 20)) + 1
            assert opened.read(int(start), stop)["a"].tolist() == x[start:stop].tolist()
            assert open_files(tmp_path) - before <= 2 * (1 + (layout is linked_outside))
        os.utime(folders[0] / layout(folders[0], x[:2]).name, ns=(1, 1))
        opened.read(8, 20)
        with pytest.raises(ValueError, match=r"s0/x\.\w+\): expected the file as it was when opened, got a ch"):
            opened.read(0, 1)
        next(folders[1].glob("x.*")).unlink()
        with pytest.raises(ValueError, match=r"s1/x\.\w+\): expected the file as it was when opened, got nothing t"):
            opened.read(2, 3)
    assert open_files(tmp_path) == before


def open_files(folder: Path) -> int:
    """Of this process below a folder; 0 where there is no such list."""
    links = Path("/proc/self/fd").glob("*")
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)
