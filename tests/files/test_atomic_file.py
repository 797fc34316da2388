"""A whole file or none: refusals, races, full disks. (Signals: test_convert_target.py, on real conversions.)"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddler.errors import RequestError, ResourceError
from fiddler.files.atomic_file import check_space, check_target, whole_file


def write(target: Path, content: bytes, *, force: bool = False, before_end: Callable[[], object] = int) -> None:
    with whole_file(target, force=force) as file:
        file.write(content)
        before_end()


def test_the_target_appears_at_the_end_with_no_other_file(tmp_path):
    target = tmp_path / "model.gguf"
    with whole_file(target, force=False) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    write(tmp_path / "model.gguf", b"")
    assert (tmp_path / "model.gguf").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")

    def fail():
        raise error

    with pytest.raises(error):
        write(target, b"half", force=True, before_end=fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_force_replaces_an_existing_file(tmp_path):
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    write(target, b"new", force=True)
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_without_force_a_file_that_appeared_meanwhile_survives(tmp_path, monkeypatch, links):
    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", refuse_link)
    target = tmp_path / "model.gguf"
    with pytest.raises(RequestError, match="exists"):
        write(target, b"mine", before_end=lambda: target.write_bytes(b"theirs"))
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_system_without_hard_links_works(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_link)
    write(tmp_path / "model.gguf", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def refuse_link(source, target, **options):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"model\.gguf: cannot be written: File too large; make room") as caught:
            write(tmp_path / "model.gguf", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_in_is_an_error(tmp_path):
    with pytest.raises(RequestError, match=r"/proc/model\.gguf: cannot be written: No such file"):
        write(Path("/proc/model.gguf"), b"")


@pytest.mark.parametrize(
    ("name", "force", "message"),
    [
        ("directory", False, "is a directory"),
        ("directory", True, "is a directory"),
        ("missing/model.gguf", True, "is not a directory; create it"),
        ("file/model.gguf", True, "is not a directory"),
        ("file", False, "exists; --force"),
    ],
)
def test_targets_that_cannot_be_written_are_refused(tmp_path, name, force, message):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match=message):
        check_target(tmp_path / name, force=force)


def test_new_targets_and_forced_existing_ones_are_accepted(tmp_path):
    (tmp_path / "file").touch()
    check_target(tmp_path / "file", force=True)
    check_target(tmp_path / "new", force=False)


def test_too_little_disk_space_is_an_error_with_both_figures(tmp_path):
    check_space(tmp_path / "model.gguf", 1)
    with pytest.raises(ResourceError, match=rf"model\.gguf: needs {1 << 60} bytes, and its disk has \d+ free"):
        check_space(tmp_path / "model.gguf", 1 << 60)


@pytest.fixture
def only_names(monkeypatch):
    """A file system whose files all have names, such as NFS."""
    real_open = os.open

    def refuse_nameless(path, flags, *mode):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_nameless)


@pytest.mark.parametrize("force", [True, False])
def test_files_are_written_where_all_files_have_names(tmp_path, only_names, force):
    target = tmp_path / "model.gguf"
    if force:
        target.write_bytes(b"old")
    with whole_file(target, force=force) as file:
        file.write(b"new")
        (temporary,) = (path for path in tmp_path.iterdir() if path != target)
        assert re.fullmatch(r"\.model\.gguf\.[0-9a-f]{12}\.tmp", temporary.name)
        assert target.exists() == force
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ValueError, match="stop"):
        write(target, b"half", force=True, before_end=raise_error)
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def raise_error():
    raise ValueError("stop")


def test_temporary_files_of_killed_writers_are_removed_and_those_of_others_stay(tmp_path):
    target = tmp_path / "model.gguf"
    abandoned, other_target, similar = (
        tmp_path / name
        for name in (".model.gguf.0123456789ab.tmp", ".other.gguf.0123456789ab.tmp", ".model.gguf.mine.tmp")
    )
    for path in (abandoned, other_target, similar):
        path.touch()
    (tmp_path / ".model.gguf.00000000000b.tmp").mkdir()
    os.mkfifo(tmp_path / ".model.gguf.00000000000c.tmp")
    (tmp_path / ".model.gguf.00000000000d.tmp").symlink_to(similar)
    with (tmp_path / ".model.gguf.00000000000a.tmp").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = set(tmp_path.iterdir())
        write(target, b"new")
        assert set(tmp_path.iterdir()) == before - {abandoned} | {target}


def test_a_file_that_replaces_another_has_its_permissions_and_a_link_stays(tmp_path):
    target, link = tmp_path / "private", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to("private")
    write(link, b"new", force=True)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to("made")
    write(dangling, b"new")
    assert dangling.is_symlink()
    assert (tmp_path / "made").read_bytes() == b"new"


def test_a_long_name_is_written(tmp_path):
    write(tmp_path / ("\u00e4" * 127), b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_signal_while_the_file_gets_its_name_comes_afterwards(tmp_path, monkeypatch, exists):
    target, arrived, names = tmp_path / "model.gguf", [], []
    if exists:
        target.write_bytes(b"old")
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append((number, target.read_bytes())))
    real = Path.replace

    def replace(path, other):
        signal.raise_signal(signal.SIGTERM)
        names.append(path.name)
        return real(path, other)

    monkeypatch.setattr(Path, "replace", replace)
    try:
        write(target, b"new", force=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == ([(signal.SIGTERM, b"new")] if exists else [])
    assert len(names) == exists
    assert list(tmp_path.iterdir()) == [target]


def test_default_signal_handlers_are_restored_and_others_left_alone(tmp_path, only_names):
    own_handler = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGHUP, own_handler)
    try:
        with whole_file(tmp_path / "model.gguf", force=False):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) is own_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is own_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_can_be_written_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=write, args=(tmp_path / "model.gguf", b"new"))
    thread.start()
    thread.join()
    assert (tmp_path / "model.gguf").read_bytes() == b"new"
