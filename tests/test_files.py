"""atomic_path: the old file or the new one, never half of either, and nothing replaced unasked."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from semeda_fast import files
from semeda_fast.files import atomic_path

posix_only = pytest.mark.skipif(os.name != "posix", reason="what POSIX file systems promise")


def contents(folder: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in folder.iterdir() if entry.is_file()}


def write(
    target: Path,
    text: str,
    *,
    overwrite: bool = False,
    then: Callable[[Path], object] = lambda temporary: None,
) -> None:
    """Write through atomic_path; `then` is called with the temporary path at the end of the block."""
    with atomic_path(target, overwrite=overwrite) as temporary:
        temporary.write_text(text)
        then(temporary)


def enter(target: Path, *, overwrite: bool = False) -> None:
    """A block that must not be reached."""
    with atomic_path(target, overwrite=overwrite):
        pytest.fail("the block ran")


def run_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_new_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == tmp_path  # another file system could not replace in one step
        assert temporary.suffix == ".csv"
    assert contents(tmp_path) == {"a.csv": "new"}


def test_a_string_path_and_a_relative_path_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_path(str(tmp_path / "a.txt")) as temporary:
        temporary.write_text("1")
    monkeypatch.chdir(tmp_path)
    with atomic_path("b.txt") as temporary:
        temporary.write_text("2")
    assert contents(tmp_path) == {"a.txt": "1", "b.txt": "2"}


def test_overwriting_shows_the_old_file_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_path(target, overwrite=True) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert contents(tmp_path) == {"a.txt": "new"}


def test_overwrite_may_also_create(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt", overwrite=True) as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"a.txt": "new"}


def test_an_existing_file_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileExistsError, match=re.escape(str(target)) + r".*overwrite=True \(--overwrite\)"):
        enter(target)
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_file_that_appears_during_the_block_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(target, "slow", then=lambda _: target.write_text("fast"))
    assert contents(tmp_path) == {"a.txt": "fast"}


def test_the_same_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"a.txt": "new"}
    with pytest.raises(FileExistsError):
        write(tmp_path / "b.txt", "slow", then=lambda _: (tmp_path / "b.txt").write_text("fast"))
    assert contents(tmp_path) == {"a.txt": "new", "b.txt": "fast"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_exception_leaves_no_trace(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    target = tmp_path / "a.txt"
    if overwrite:
        target.write_text("old")

    def fail(_: Path) -> NoReturn:
        raise error

    with pytest.raises(type(error)) as caught:
        write(target, "half of the n", overwrite=overwrite, then=fail)
    assert caught.value is error
    assert contents(tmp_path) == ({"a.txt": "old"} if overwrite else {})


def test_a_failing_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(target, "new", overwrite=True)
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_writer_that_removes_its_file_does_not_hide_the_error(tmp_path: Path) -> None:
    def fail(temporary: Path) -> NoReturn:
        temporary.unlink()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write(tmp_path / "a.txt", "x", then=fail)
    assert contents(tmp_path) == {}


def test_a_process_that_dies_midway_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    script = f"""
import os, runpy
atomic_path = runpy.run_path({str(files.__file__)!r})["atomic_path"]  # torch is slow to import
with atomic_path({str(target)!r}, overwrite=True) as temporary:
    temporary.write_text("half of the n")
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    assert target.read_text() == "old"


def test_a_folder_as_the_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; expected the path of a file"):
        enter(tmp_path, overwrite=True)


def test_a_missing_folder_is_named_and_not_created(tmp_path: Path) -> None:
    target = tmp_path / "no" / "a.txt"
    with pytest.raises(FileNotFoundError, match=re.escape(str(target.parent)) + " does not exist; create"):
        enter(target)
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        enter(tmp_path / "a" / "b.txt")


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, since root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    with pytest.raises(PermissionError, match=f"no permission to write into {re.escape(str(tmp_path))}"):
        enter(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


@posix_only
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
@pytest.mark.parametrize("overwrite", [False, True])
def test_permissions_are_those_of_a_plain_open(tmp_path: Path, umask: int, overwrite: bool) -> None:
    before = os.umask(umask)
    try:
        plain, ours = tmp_path / "plain.txt", tmp_path / "ours.txt"
        plain.write_text("x")
        with atomic_path(ours, overwrite=overwrite) as temporary:
            temporary.write_text("x")
        assert ours.stat().st_mode & 0o777 == plain.stat().st_mode & 0o777 == 0o666 & ~umask
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)


def test_of_several_writers_at_once_exactly_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    barrier = threading.Barrier(6)
    refused: list[int] = []

    def work(number: int) -> None:
        try:
            write(target, str(number) * 10_000, then=lambda _: barrier.wait(timeout=30))  # all saw a free path
        except FileExistsError:
            refused.append(number)

    run_threads(work, 6)
    (winner,) = set(range(6)) - set(refused)
    assert contents(tmp_path) == {"a.txt": str(winner) * 10_000}


@posix_only
def test_many_overwriting_writers_leave_one_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        write(target, str(number) * 10_000, overwrite=True, then=lambda _: barrier.wait(timeout=30))

    run_threads(work, 6)
    assert list(contents(tmp_path)) == ["a.txt"]
    assert contents(tmp_path)["a.txt"] in {str(number) * 10_000 for number in range(6)}


@pytest.mark.parametrize("name", ["plain", "two.dots.tar", ".hidden", "mit Leerzeichen.txt", "grün.txt"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert contents(tmp_path) == {name: "x"}


@posix_only
def test_a_dangling_link_is_not_replaced_unasked(tmp_path: Path) -> None:
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write(link, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert link.is_symlink()
