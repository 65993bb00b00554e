"""PyTorch distributed-checkpoint files read and written slice by slice, in one process and with bounded memory."""

import dataclasses
import enum
import pickle
from dataclasses import dataclass
from typing import Callable

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)


class _Stub:
    """Stands for a class of Megatron's that only its optimizer states need."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _MetadataUnpickler(pickle.Unpickler):
    """`.metadata` is a pickle: only plain containers and torch's own descriptions may come out of it."""

    PLAIN = {  # noqa: RUF012
        "builtins": {"set", "frozenset", "dict", "list", "tuple", "slice", "complex", "bytearray"},
        "collections": {"OrderedDict", "defaultdict"},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
        "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
        "torch.serialization": {"_get_layout"},
    }
    DESCRIPTIONS = ("torch.distributed.checkpoint.", "torch.distributed._shard.")

    def find_class(self, module, name):
        if module.split(".")[0] in ("megatron", "transformer_engine"):
            return _Stub
        if "." not in name:
            if name in self.PLAIN.get(module, ()):
                return super().find_class(module, name)
            if module == "torch":
                value = super().find_class(module, name)
                if name in ("Size", "device") or isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
                    return value
            if module.startswith(self.DESCRIPTIONS):
                value = super().find_class(module, name)
                if isinstance(value, type) and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum)):
                    return value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class _Reader(FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        path = self.path / ".metadata"
        try:
            with open(path, "rb") as file:
                return _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None


class SliceReader:
    """Tensors of a checkpoint by key; however many ranks wrote it, a slice is put together from the chunks it meets."""

    def __init__(self, folder):
        self.folder = folder
        self.reader = _Reader(folder)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.tensors = {
            key: value for key, value in self.metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
        }

    def read(self, key, offsets, sizes):
        """The box at `offsets` of `sizes` as a tensor of the checkpoint's dtype. ValueError when chunks leave gaps."""
        entry = self.tensors[key]
        if any(o + s > extent for o, s, extent in zip(offsets, sizes, entry.size)):
            raise ValueError(f"{self.folder}: '{key}' is {tuple(entry.size)}; {tuple(sizes)} at {tuple(offsets)} lies outside")
        target = torch.empty(tuple(sizes), dtype=entry.properties.dtype)
        items, covered = [], 0
        for number, chunk in enumerate(entry.chunks):
            begin = [max(a, b) for a, b in zip(offsets, chunk.offsets)]
            end = [min(a + s, b + t) for a, s, b, t in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            lengths = [e - b for b, e in zip(begin, end)]
            if any(length <= 0 for length in lengths):
                continue
            covered += int(torch.Size(lengths).numel())
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key, torch.Size(offsets)),
                    dest_offsets=torch.Size(b - o for b, o in zip(begin, offsets)),
                    storage_index=MetadataIndex(key, chunk.offsets, number),
                    storage_offsets=torch.Size(b - o for b, o in zip(begin, chunk.offsets)),
                    lengths=torch.Size(lengths),
                )
            )
        if covered != target.numel():
            raise ValueError(f"{self.folder}: the shards of '{key}' cover {covered} of {target.numel()} elements of a slice")
        self.reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target):
        self.target = target

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner

    def resolve_tensor(self, item):
        result = self.target
        for dim, (first, length) in enumerate(zip(item.dest_offsets, item.lengths)):
            result = result.narrow(dim, first, length)
        return result

    def commit_tensor(self, item, tensor):
        pass


@dataclass
class Chunk:
    """One shard to write: its place in the global tensor, and how its values come to be."""

    key: str
    size: tuple
    offsets: tuple
    sizes: tuple
    dtype: torch.dtype
    values: Callable[[], torch.Tensor]


class _ChunkPlanner(SavePlanner):
    """Resolves each chunk only when it is written."""

    def __init__(self, chunks, wrote):
        self.chunks = {MetadataIndex(chunk.key, torch.Size(chunk.offsets)): chunk for chunk in chunks}
        self.wrote = wrote
        self.failure = None

    def set_up_planner(self, *args, **kwargs):
        raise NotImplementedError

    create_global_plan = finish_plan = set_up_planner

    def create_local_plan(self):
        items = []
        for index, chunk in self.chunks.items():
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes)),
                properties=TensorProperties(dtype=chunk.dtype),
                size=torch.Size(chunk.size),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, item):
        """The writer's threads lose their exceptions: the first is kept for write_chunks to raise."""
        try:
            return self._values(item)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def _values(self, item):
        chunk = self.chunks[MetadataIndex(item.index.fqn, item.index.offset)]
        values = chunk.values()
        if tuple(values.shape) != tuple(chunk.sizes) or values.dtype != chunk.dtype:
            raise ValueError(f"{chunk.key}: a shard is {tuple(values.shape)} {values.dtype}, planned {chunk.sizes} {chunk.dtype}")
        self.wrote(values.numel() * values.element_size())
        return values.contiguous()


def write_chunks(folder, chunks, threads=2, wrote=lambda bytes: None):
    """Writes a checkpoint of `chunks` into `folder`, whose tensors exist only while they are written (one per thread)."""
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan

    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=threads, sync_files=True)
    planner = _ChunkPlanner(chunks, wrote)
    writer.reset(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    (plan,), metadata = create_default_global_save_plan([plan])
    (plan,) = writer.prepare_global_plan([plan])
    results = writer.write_data(plan, planner).wait()
    if planner.failure is not None:
        raise planner.failure
    if len(results) != len(planner.chunks):
        raise OSError(
            f"{folder}: {len(planner.chunks) - len(results)} of {len(planner.chunks)} tensors could not be written (disk full?)"
        )
    writer.finish(metadata, [results])
