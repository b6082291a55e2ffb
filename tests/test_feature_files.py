"""Every layout that h5py, safetensors and NumPy write is read bit for bit, and damaged files are refused by name."""

import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from damage import scratched
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sparc_kernels.feature_files import MappedRows
from sparc_kernels.features import Features

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


MAPPED = [contiguous, user_block, newest_format, linked]
LAYOUTS = [*MAPPED, chunked, compressed, lzf, raw_files, compact, linked_outside, virtual, bfloat16, npy, safetensors]


def as_the_library_reads(path: Path) -> np.ndarray:
    """In native byte order."""
    if path.suffix == ".npy":
        x = np.load(path)
    elif path.suffix == ".safetensors":
        x = load_file(path)["features"]
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
    """Any bits, NaN with payloads among them, in either byte order (.npy and safetensors: in the machine's)."""
    if layout in (npy, safetensors):
        dtype = dtype.replace(">", "<")
    generator = np.random.default_rng(seed)
    x = np.frombuffer(generator.bytes(np.dtype(dtype).itemsize * shape[0] * shape[1]), dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = layout(Path(folder), x)
        want = as_the_library_reads(path)
        if layout is not bfloat16:
            assert want.tobytes() == x.astype(want.dtype).tobytes(), "not what was written"
        with Features({"a": path}, normalize=False) as found:
            start = int(generator.integers(shape[0]))
            stop = int(generator.integers(start, shape[0])) + 1
            source = found.sources["a"]
            for a, b in ((start, stop), (0, shape[0])):
                assert source.read(a, b).numpy().tobytes() == want[a:b].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_lies_in_one_piece_in_its_file_is_mapped(tmp_path, layout):
    x = np.ones((6, 4), "<f4")
    with Features({"a": layout(tmp_path, x)}, normalize=False) as found:
        assert found.read(0, 6)["a"].tolist() == x.tolist()
        mapped = isinstance(found.sources["a"], MappedRows)
        assert mapped == (layout in [*MAPPED, npy, safetensors])


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
]


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_file_is_refused_by_name_or_read_as_its_library_does(tmp_path, seed):
    generator = np.random.default_rng(seed)
    path = DAMAGED[seed % len(DAMAGED)](tmp_path, generator.standard_normal((40, 6)).astype("<f4"))
    file = generator.choice(sorted(tmp_path.iterdir()))
    file.write_bytes(scratched(file.read_bytes(), generator))
    try:
        with Features({"a": path}, normalize=False) as found:
            found.check()
            got = found.sources["a"].read(0, found.rows).numpy()
    except ValueError as error:
        assert str(error).startswith(f"stream 'a' ({path}): expected "), error
        return
    want = as_the_library_reads(path)
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


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


def test_virtual_rows_without_an_end_are_read(tmp_path):
    """A mapping that grows with its source has no count of values, and no end to compare with the source's shape."""
    x, endless = np.arange(24, dtype="<f4").reshape(6, 4), slice(0, h5py.h5s.UNLIMITED)
    with h5py.File(tmp_path / "inner.h5", "w") as file:
        file.create_dataset("features", data=x, maxshape=(None, 4))
    layout = h5py.VirtualLayout((6, 4), "<f4", maxshape=(None, 4))
    layout[endless] = h5py.VirtualSource("inner.h5", "features", (6, 4), maxshape=(None, 4))[endless]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
    with Features({"a": tmp_path / "x.h5"}, normalize=False) as found:
        assert found.read(0, 6)["a"].tolist() == x.tolist()
