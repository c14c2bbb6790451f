"""Where the bytes of a cache lie: keys such as `teachers/cnn/zarr.json`, each set whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ddcache.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

_TEMPORARY = ".tmp"
_LOCK = ".lock"


class Store(Protocol):
    """What the cache asks of the place where it lies.

    Keys are built from checked names only. A key holds either nothing or all of the bytes of one `put`.
    """

    @property
    def name(self) -> str:
        """The place, for messages; holds no credentials."""

    def size(self, key: str) -> int | None:
        """Return how many bytes a key holds; None if there is no such key."""

    def get(self, key: str) -> bytes:
        """Return the bytes of a key.

        Raises:
            CacheError: there is no such key, or it cannot be read.
        """

    def open(self, key: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a key as a read-only array, mapped where that is possible.

        Raises:
            CacheError: there is no such key, or it cannot be read.
        """

    def put(self, key: str, data: bytes | npt.NDArray[np.uint8]) -> None:
        """Set the bytes of a key, all or nothing, durable when this returns.

        Raises:
            CacheError: it cannot be written; the key is as it was.
        """

    def names(self, prefix: str) -> list[str]:
        """Return the names of the keys directly in `prefix`, sorted."""

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly in `prefix`, sorted."""

    def delete(self, prefix: str) -> None:
        """Remove a key, or a folder with all in it, its `zarr.json` first so that no rest looks complete."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep other writers out until the block ends.

        Raises:
            CacheError: another process holds it, or the place can't be written.
        """


def open_store(location: str | Path) -> Store:
    """Return the store at a folder."""
    return LocalStore(Path(location))


class LocalStore:
    """Keys under a root folder: a `put` goes to a temporary file, is flushed to the disk, and is renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Return the file of a key, which need not exist."""
        return self.root / key

    def size(self, key: str) -> int | None:
        """Return how many bytes a key holds; None if there is no such key."""
        path = self.path(key)
        return path.stat().st_size if path.is_file() else None

    def get(self, key: str) -> bytes:
        """Return the bytes of a key.

        Raises:
            CacheError: there is no such key, or it cannot be read.
        """
        try:
            return self.path(key).read_bytes()
        except OSError as error:
            raise CacheError(f"cannot read {key} of the cache {self.root}: {error.strerror}") from error

    def open(self, key: str) -> npt.NDArray[np.uint8]:
        """Map the bytes of a key.

        Raises:
            CacheError: there is no such key, or it cannot be read.
        """
        try:
            if self.path(key).stat().st_size == 0:  # can't be mapped
                return np.empty(0, dtype=np.uint8)
            return np.memmap(self.path(key), dtype=np.uint8, mode="r")
        except OSError as error:
            raise CacheError(f"cannot read {key} of the cache {self.root}: {error.strerror}") from error

    def put(self, key: str, data: bytes | npt.NDArray[np.uint8]) -> None:
        """Set the bytes of a key, all or nothing, on the disk when this returns.

        Raises:
            CacheError: the disk is full, the folder is read-only, or the like; the key is as it was.
        """
        target = self.path(key)
        temporary = self.root / _TEMPORARY / key.replace("/", "~")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data.data if isinstance(data, np.ndarray) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise CacheError(
                f"cannot write {key} of the cache {self.root}: {error.strerror}; what was committed before is safe, "
                f"and the same command goes on from there"
            ) from error

    def names(self, prefix: str) -> list[str]:
        """Return the names of the files directly in the folder `prefix`, sorted."""
        folder = self.path(prefix)
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly in the folder `prefix`, sorted."""
        folder = self.path(prefix)
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def delete(self, prefix: str) -> None:
        """Remove a key, or a folder with all in it, its `zarr.json` first so that no rest looks complete."""
        target = self.path(prefix)
        if target.is_dir():
            (target / "zarr.json").unlink(missing_ok=True)
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing this cache; a killed process lets go of it by itself.

        Raises:
            CacheError: another process holds it, or the folder cannot be made.
        """
        if self.size("zarr.json") is None and (foreign := _foreign_entries(self.root)):
            raise CacheError(
                f"{self.root} is no ddcache cache and holds other things, such as {foreign[0]}; choose another folder"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / _LOCK).open("w")
        except OSError as error:
            raise CacheError(f"cannot write the cache {self.root}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CacheError(
                    f"another process is writing the cache {self.root}; wait for it to end, then run again"
                ) from error
            shutil.rmtree(self.root / _TEMPORARY, ignore_errors=True)
            yield
            shutil.rmtree(self.root / _TEMPORARY, ignore_errors=True)


def _foreign_entries(root: Path) -> list[str]:
    """Return what a killed first run, which leaves no `zarr.json`, can't have left in the folder."""
    ours = {"samples.parquet", "teachers", "inputs", _LOCK, _TEMPORARY}
    return sorted(entry.name for entry in root.iterdir() if entry.name not in ours) if root.is_dir() else []


def _sync_folder(folder: Path) -> None:
    """Flush a rename: without it, a power cut may keep the ledger's record and lose the chunk it vouches for."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
