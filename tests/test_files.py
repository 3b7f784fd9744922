"""Files are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from liquidfusion import files


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("new", encoding="utf8")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text(encoding="utf8") == "new"
    assert os.listdir(path.parent) == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def interrupted() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half", encoding="utf8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        files.write_text(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text(encoding="utf8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for check in (files.check_writable, lambda folder: files.write_text(folder / "a.txt", "x")):
        with pytest.raises(OSError, match="file") as error:
            check(tmp_path / "file")
        assert str(error.value.filename).startswith(str(tmp_path / "file"))
