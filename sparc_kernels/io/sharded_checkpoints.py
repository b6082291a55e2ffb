"""Checkpoints of several processes: a folder that torch.distributed.checkpoint reads, with a manifest of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..core.validation import fail, require
from ..distributed.ranks import Ranks
from .atomic import Hashing, read_json, sync_folder, write_json
from .blocks import Block, Key, flat, in_step, nested

MANIFEST = "manifest.json"
KIND = "sparc_kernels sharded checkpoint"
TEMPORARY = ".tmp"  # added to the folder's name until it is complete
_DIGEST = "sha256"


# -------------------------------------------------------------------------------------------------------------- writing


def write_folder(path: Path, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint folder, complete or not at all; every rank calls it.

    Args:
        path: the folder; an existing one is replaced.
        state: nested dicts with names as keys. Blocks are written by the ranks that hold them, one of the replicas
            each (torch's rule spreads them evenly); other tensors once; other values by rank 0.
        ranks: of the model.

    Raises:
        OSError: a rank cannot write; the message names it.
        ValueError: the ranks' states do not fit together.
    """
    temporary, first = path.with_name(path.name + TEMPORARY), ranks.rank == 0
    writer, planner = _Writer(temporary), _Saver(flat(state))
    try:
        in_step(ranks, lambda: _make_new(temporary) if first else None)
        writer.set_up_storage_writer(first)
        plan = in_step(ranks, lambda: planner.plan_of(first))
        plans, metadata = planner.create_global_plan(ranks.objects(plan))  # the same on every rank
        plan = writer.prepare_global_plan(plans)[ranks.rank]
        results = ranks.objects(in_step(ranks, lambda: writer.write_data(plan, planner).wait()))
        in_step(ranks, lambda: writer.finish(metadata, results) if first else None)
        files = {name: entry for part in ranks.objects(writer.fs.written) for name, entry in part.items()}
        in_step(ranks, lambda: _publish(temporary, path, files, ranks) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_new(folder: Path) -> None:
    """Make an empty folder, in place of what a killed run left there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _publish(temporary: Path, path: Path, files: dict[str, dict], ranks: Ranks) -> None:
    """Write the manifest and give the folder its name."""
    manifest = {"kind": KIND, "torch": torch.__version__, "ranks": ranks.size, "files": dict(sorted(files.items()))}
    write_json(temporary / MANIFEST, manifest | {_DIGEST: _digest(manifest)})
    if path.exists():
        remove(path)
    os.rename(temporary, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint folder, so that a kill leaves it whole or under a temporary name."""
    temporary = path.with_name(f"{path.name}.old{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


class _Files(FileSystem):
    """torch's file system, whose files are hashed while they are written and synced before they are closed."""

    def __init__(self) -> None:
        self.written: dict[str, dict] = {}  # name -> bytes and sha256

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """Open a file, as torch's writer and reader ask for it."""
        with open(path, mode) as file:
            if mode != "wb":
                yield file
                return
            with Hashing(file).own_errors() as stream:
                yield stream
            stream.close()
            self.written[Path(path).name] = {"bytes": stream.size, "sha256": stream.digest.hexdigest()}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file, as torch's writer does with its metadata."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    fs: _Files

    def __init__(self, path: Path):
        super().__init__(path, sync_files=False)  # `_Files` syncs, after flushing
        self.fs = _Files()


class _Saver(dcp.DefaultSavePlanner):
    """Plans a flat state that may hold Blocks, each written in pieces under its place in the whole tensor."""

    def __init__(self, leaves: dict[Key, Any]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values = {".".join(key): value for key, value in leaves.items()}
        self.keys = {".".join(key): key for key in leaves}

    def plan_of(self, first: bool) -> SavePlan:
        """Plan what this rank could write; the global plan leaves out what another rank writes.

        Args:
            first: whether this is rank 0.
        """
        self.set_up_planner(self.values, is_coordinator=first)
        return self.create_local_plan()

    def create_local_plan(self) -> SavePlan:
        """Plan the items of this rank."""
        self.pieces: dict[MetadataIndex, torch.Tensor] = {}
        items = []
        for name, value in self.state_dict.items():
            if isinstance(value, Block):
                items += [self._item(name, piece) for piece in value.pieces()]
            elif isinstance(value, torch.Tensor):
                items.append(self._item(name, value))
            elif self.is_coordinator:
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def _item(self, name: str, value: Block | torch.Tensor) -> WriteItem:
        tensor = value.tensor if isinstance(value, Block) else value
        chunk = _chunk(value)
        index = MetadataIndex(name, chunk.offsets)
        self.pieces[index] = tensor
        kind = WriteItemType.SHARD if isinstance(value, Block) else WriteItemType.TENSOR
        return WriteItem(
            index, kind, tensor_data=TensorWriteData(chunk, TensorProperties(tensor.dtype), torch.Size(value.shape))
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Merge the ranks' plans; the metadata have every value's place in the nested state, in the state's order."""
        plans, metadata = super().create_global_plan(all_plans)
        stored = {name: metadata.state_dict_metadata[name] for name in self.keys}
        return plans, replace(metadata, planner_data=self.keys, state_dict_metadata=stored)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return what an item of the plan stands for."""
        return self.state_dict[index.fqn] if index.offset is None else self.pieces[index]


def _chunk(value: Block | torch.Tensor) -> ChunkStorageMetadata:
    """Place of a tensor in the whole one."""
    if isinstance(value, Block):
        offsets = [value.start if d == value.dim else 0 for d in range(value.tensor.dim())]
        return ChunkStorageMetadata(torch.Size(offsets), value.tensor.shape)
    return ChunkStorageMetadata(torch.Size([0] * value.dim()), value.shape)


# -------------------------------------------------------------------------------------------------------------- reading


def verify(path: Path, rank: int = 0, size: int = 1) -> None:
    """Check the manifest of a checkpoint folder, and a share of its files by their hashes.

    Args:
        path: the folder.
        rank: number of this process.
        size: processes that share the work.

    Raises:
        ValueError: there is no valid manifest, or a file is missing or damaged.
    """
    files = _manifest(path)["files"]
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in by_size[rank::size]:
        want, file = files[name], path / name
        try:
            digest, n = hashlib.sha256(), file.stat().st_size
            with open(file, "rb") as content:
                while n == want["bytes"] and (part := content.read(1 << 20)):
                    digest.update(part)
        except OSError as error:
            fail(_label(path), _COMPLETE, f"{name} that cannot be read ({error.strerror})")
        require(n == want["bytes"], _label(path), _COMPLETE, f"{name} of {n:,} bytes instead of {want['bytes']:,}")
        require(digest.hexdigest() == want["sha256"], _label(path), _COMPLETE, f"{name}, which is damaged")


_COMPLETE = "a complete training checkpoint"


def _label(path: Path) -> str:
    return f"checkpoint {path}"


def _manifest(path: Path) -> dict:
    """The manifest of a folder, checked."""
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError as error:
        raise ValueError(f"{_label(path)}: expected {_COMPLETE} ({error})") from error
    digest = manifest.pop(_DIGEST, None)
    ok = manifest.get("kind") == KIND and digest == _digest(manifest)
    require(ok, _label(path), _COMPLETE, f"{MANIFEST}, which is damaged or another's")
    return manifest


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_folder(
    path: Path, blocks: Mapping[Key, Block] | None = None, wanted: Callable[[Key], bool] | None = None
) -> dict[str, Any]:
    """Read a checkpoint folder; no collective. Its files are not verified.

    Args:
        path: the folder.
        blocks: place in the state -> block that is filled in place, in its own dtype.
        wanted: whether to read what is at a place besides; None: everything, whole.

    Returns:
        The nested state, without what was not wanted or went into blocks.

    Raises:
        ValueError: a block is not in the checkpoint, or of another shape.
    """
    blocks, reader = blocks or {}, _Reader(path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    keys, stored = metadata.planner_data, metadata.state_dict_metadata
    targets: dict[str, Any] = {".".join(key): block for key, block in blocks.items()}
    for name, block in targets.items():
        block.check(name, getattr(stored.get(name), "size", None))
    for name, entry in stored.items():
        if name not in targets and (wanted is None or wanted(keys[name])):
            targets[name] = None
            if isinstance(entry, TensorStorageMetadata):
                targets[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    items: list[ReadItem] = []
    for name, target in targets.items():
        entry = stored[name]
        if isinstance(entry, TensorStorageMetadata):
            items += create_read_items_for_chunk_list(name, entry, [_chunk(target)])
        else:
            here, none = MetadataIndex(name), torch.Size([0])
            items.append(ReadItem(LoadItemType.BYTE_IO, here, none, here, none, none))
    places = {index: (info.relative_path, info.offset) for index, info in metadata.storage_data.items()}
    items.sort(key=lambda item: places[item.storage_index])  # every file from its beginning to its end
    loader = _Loader(targets)
    reader.read_data(LoadPlan(items), loader).wait()
    read = {name: loader.values.get(name, target) for name, target in targets.items() if not isinstance(target, Block)}
    return nested({keys[name]: value for name, value in read.items()})


class _Loader(dcp.DefaultLoadPlanner):
    """Tells torch's reader where what it reads belongs."""

    def __init__(self, targets: dict[str, Any]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.targets, self.values = targets, dict[str, Any]()

    def load_bytes(self, read_item: ReadItem, value) -> None:
        """Take a value that is no tensor."""
        self.values[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the tensor of which items fill parts."""
        target = self.targets[index.fqn]
        return target.tensor if isinstance(target, Block) else target


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose pickled metadata may name nothing but what torch's writer puts there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the checkpoint, whose files are all in its manifest."""
        folder = Path(self.path)
        with open(folder / ".metadata", "rb") as file:
            metadata = _Metadata(file).load()
        files = _manifest(folder)["files"]
        for info in metadata.storage_data.values():
            known = info.relative_path in files
            require(known, _label(folder), "data in the files of its manifest", info.relative_path)
        return metadata


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if (module.split(".")[0], name) in _NAMES else None
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if found is None and not dtype:
            raise pickle.UnpicklingError(f"{module}.{name} in the metadata of a checkpoint")
        return getattr(torch, name) if dtype else found


_NAMES = {
    *(("torch", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo", "Size", "_get_layout",
    )),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip
