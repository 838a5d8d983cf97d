"""A folder that is complete or not there, and safetensors files in it that are written tensor by tensor.

safetensors itself writes a file from tensors that are all in memory.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from .checkpoint import DTYPES, INDEX

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "*.model", "*.tiktoken",
)  # fmt: skip

# what a folder has that may be replaced
_OURS = ("config.json", "adapter_config.json")

# at once: faster than all of a large tensor
_CHUNK = 2**20

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to write to, which becomes `path` when the block ends without an error, and disappears otherwise.

    Where the process is killed, `.NAME.partial` is left beside `path`; the next run removes it.

    Args:
        path: of the folder.
        overwrite: replace a saved model or adapter that is there; nothing else is replaced.
        inputs: folders that are read, which are not replaced either.

    Raises:
        FileExistsError: `path` is there and not an empty folder, and is not to be overwritten, or may not be.
        OSError: nothing can be written there, or another process writes there.
    """
    # without "..", whose parent is no place for it
    path = Path(os.path.abspath(Path(path).expanduser()))
    _check_free(path, overwrite, inputs)
    partial, former = (path.with_name(f".{path.name}.{state}") for state in ("partial", "former"))
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_claimed(partial))
        except OSError as error:
            raise OSError(f"cannot write to {path.parent}: {error.strerror or error}. Name another folder.") from error
        try:
            yield partial
            _replace(path, partial, former)
        except OSError as error:
            _remove(partial)
            raise OSError(f"{path} was not written: {error.strerror or error}. Nothing is left of it.") from error
        except BaseException:
            _remove(partial)
            raise


def _replace(path: Path, partial: Path, former: Path) -> None:
    """`partial` takes the place of `path`, which stays where that fails."""
    if not path.exists():
        partial.rename(path)
        return
    _remove(former)
    path.rename(former)
    try:
        partial.rename(path)
    except OSError:
        former.rename(path)
        raise
    _remove(former)


def _check_free(path: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """FileExistsError unless something may be put in place of what is there."""
    if path == Path.cwd() or path.is_mount():
        raise FileExistsError(f"{path} is the current folder or a mount point, and stays. Name a folder in it.")
    if not (path.exists() or path.is_symlink()) or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already. Name another folder, or pass --overwrite to replace it.")
    kept = [folder for folder in (Path.cwd(), *inputs) if folder.resolve().is_relative_to(path.resolve())]
    if kept:
        raise FileExistsError(f"{path} is not overwritten: {kept[0]} is read, or in use. Name another folder.")
    if not any((path / name).is_file() for name in _OURS):
        raise FileExistsError(
            f"{path} is not overwritten: it is no saved model or adapter. Name another folder, or remove it."
        )


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder, empty, for this process alone: a lock goes with the process, the folder may stay behind."""
    if fcntl is None:
        _remove(folder)
        folder.mkdir()
        yield
        return
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process is writing {folder}") from error
        for path in folder.iterdir():
            _remove(path)
        yield
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """That of an adapter, if it has one, with the tokens and the chat template that it was trained with."""
    if (source / "tokenizer_config.json").is_file():
        for path in source.iterdir():
            if path.is_file() and matches(path.name, _TOKENIZER):
                shutil.copyfile(path, folder / path.name)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


class Shards:
    """model.safetensors, or numbered files with an index, of tensors that come one at a time in any order."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], shard_size: int | str) -> None:
        """Lay the files out.

        Args:
            folder: where they go.
            tensors: name -> shape and dtype, as tensors on the meta device.
            shard_size: bytes of a file at most, as a number or such as "5GB"; a larger tensor has one for itself.
        """
        pattern = "model{suffix}.safetensors"
        split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=shard_size)
        self._files = ExitStack()
        self._opened: list[FileIO] = []
        self._places: dict[str, tuple[FileIO, int, Tensor]] = {}
        needed = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written, and the disk has {free:,} free")
        try:
            for name, keys in split.filename_to_tensors.items():
                self._lay_out(folder / name, {key: tensors[key] for key in keys})
        except BaseException:
            self._files.close()
            raise
        if split.is_sharded:
            parameters = sum(tensor.numel() for tensor in tensors.values())
            metadata = {"total_parameters": parameters, **split.metadata}
            write_json(folder / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename})

    def _lay_out(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # wide ones first, so that each starts at a multiple of its own size
        for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            end = offset + tensor.numel() * tensor.dtype.itemsize
            header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # the tensors start at a multiple of 8
        text += b" " * (-len(text) % 8)
        file = self._files.enter_context(path.open("wb", buffering=0))
        self._opened.append(file)
        file.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in tensors.items():
            start: int = header[key]["data_offsets"][0]  # pyright: ignore[reportIndexIssue]
            self._places[key] = (file, 8 + len(text) + start, tensor)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a tensor to its place, once."""
        file, at, planned = self._places.pop(key)
        assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), key
        if not tensor.numel():
            return
        data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        file.seek(at)
        while data:
            data = data[file.write(data[:_CHUNK]) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # what is complete is on the disk before it gets its name
        with self._files:
            if kind is None:
                assert not self._places, f"never written: {sorted(self._places)[:3]}"
                for file in self._opened:
                    os.fsync(file.fileno())
