"""The one way in which this package writes a file: whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file beside `path` that takes its name when the block ends.

    Whatever is written to the temporary file is flushed to the disk first. A block that fails leaves `path` as it was
    and nothing beside it. Missing directories are made.

    Raises
    ------
    OSError
        The directory cannot be written or the disk is full. The error names `path`.
    """
    target = Path(path)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with naming(target):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text to `path`, as :func:`replacing` does.

    Raises
    ------
    OSError
        As of :func:`replacing`.
    """
    with replacing(path) as temporary, naming(Path(path)):
        temporary.write_text(text, encoding="utf8")


def check_writable(directory: Path) -> None:
    """Make sure, before any work, that files can be written into `directory`; it is made if it is missing.

    Raises
    ------
    OSError
        They cannot.
    """
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system name what the user asked for, not a temporary file or nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
