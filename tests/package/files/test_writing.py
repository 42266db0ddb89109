"""Files that appear whole: flushed before they are renamed, and their folder after that."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from itop_prune.files.writing import flush, replacing, unfinished_name


def test_a_file_is_flushed_then_renamed_and_then_its_folder_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        events.append(("flushed", os.fstat(handle).st_ino))

    def watched_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.append(("renamed", target))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    path = tmp_path / "file"
    with replacing(path) as unfinished:
        unfinished.write_text("new")
    expected = [
        ("flushed", path.stat().st_ino),
        ("renamed", path),
        ("flushed", tmp_path.stat().st_ino),
    ]
    assert events == expected


def test_an_error_leaves_the_file_of_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_no_two_unfinished_files_have_one_name_and_all_keep_the_suffix(tmp_path: Path) -> None:
    names = {unfinished_name(tmp_path / "model.pt2") for _ in range(50)}
    assert len(names) == 50
    assert {(name.parent, name.suffix) for name in names} == {(tmp_path, ".pt2")}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_a_folder_of_a_disk_that_flushes_none_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file" if kind == "file" else tmp_path
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", fsync)
    if (kind, number) == ("folder", errno.EINVAL):
        flush(path)
        return
    with pytest.raises(OSError):
        flush(path)
