"""Writing files so that a crash leaves the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place in one step.

    The temporary file keeps `path`'s suffix, since writers such as Pillow choose a format by it.
    If the block raises, `path` stays as it was and the temporary file is removed.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False (checked before and after the block).
        FileNotFoundError: the folder of `path` does not exist.
        PermissionError: the folder of `path` cannot be written to.
    """
    target = Path(path)
    _check_target(target, overwrite)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; the finished one gets the permissions a plain open() would give.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            try:
                os.link(temporary, target)  # unlike replace(), link() fails if somebody was faster
            except FileExistsError:
                raise _exists(target) from None
            except OSError:  # no hard links on this file system
                _check_target(target, overwrite)
                temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; expected the path of a file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if target.exists() and not overwrite:
        raise _exists(target)
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"cannot write {target}: no permission to write into {target.parent}")


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} exists already; pass overwrite=True (--overwrite) or choose another path")
