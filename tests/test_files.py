"""Files are the old one or the whole new one: utils/files.py."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from data.digest import file_digest
from utils import files


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FullDisk:
    """A file that takes `room` bytes and then has no space."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content: bytes):
        self.file.write(content[: self.room])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def fail_at_call(monkeypatch, owner, name: str, number: int, error: BaseException):
    """Make the `number`-th call (from 1) of `owner.name` raise."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_text_and_json_bytes(tmp_path):
    """A platform's own newline or encoding, a missing final newline, or escaped letters in the JSON."""
    files.write_text(tmp_path / "a.txt", "café\r\nzwei\n")
    files.write_json(tmp_path / "a.json", {"ü": [1, None, 0.1]})
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xc3\xa9\r\nzwei\n"
    content = (tmp_path / "a.json").read_bytes()
    assert content.endswith(b"\n") and "ü".encode() in content and json.loads(content) == {"ü": [1, None, 0.1]}


@pytest.mark.parametrize("room", [0, 1, 7])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, room):
    """A write that fails after n bytes leaves half a file at the place, or a stray temporary (A21)."""
    target = tmp_path / "scores.json"
    target.write_bytes(b"old scores")
    original = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *args: FullDisk(original(*args), room))
    with pytest.raises(OSError, match=r"scores\.json") as caught:
        files.write_text(target, "new scores, longer")
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value) and ".tmp" not in str(caught.value)
    assert listing(tmp_path) == {"scores.json": b"old scores"}


@pytest.mark.parametrize("name", ["fsync", "replace", "fdopen", "open"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_every_call_may_fail(tmp_path, monkeypatch, name, error):
    """An error or Ctrl-C at opening, flushing or renaming harms the old file or leaves the temporary."""
    (tmp_path / "a").write_bytes(b"old")
    fail_at_call(monkeypatch, os, name, 1, error)
    with pytest.raises(type(error)):
        files.write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert listing(tmp_path) == {"a": b"old"}


def test_not_json_leaves_the_old_file(tmp_path):
    """NaN, infinities and unknown types are written as invalid JSON, or cost the old file."""
    (tmp_path / "a.json").write_bytes(b"{}")
    for value in [float("nan"), [float("inf")], {"a": {1, 2}}, {"a": "\ud800"}]:
        with pytest.raises(ValueError, match=r"a\.json: ") as caught:
            files.write_json(tmp_path / "a.json", value)
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == {"a.json": b"{}"}


def test_permission_modes(tmp_path):
    """A temporary's private mode 0600 replaces the file's own mode, or the umask of a new file is not followed."""
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o640)
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "new")
        files.write_text(tmp_path / "b", "new")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o640, 0o640]
    (tmp_path / "a").chmod(0o604)
    files.write_text(tmp_path / "a", "newer")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604


def test_symbolic_link_stays(tmp_path):
    """Replacing a symbolic link cuts it off from the file that it stands for."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    (tmp_path / "a").symlink_to("real/a")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink() and listing(tmp_path / "real") == {"a": b"new"}


def test_written_together_or_not_at_all(tmp_path, monkeypatch):
    """New predictions stand beside old scores because the second of two files could not be written."""
    (tmp_path / "predictions.json").write_bytes(b"old predictions")
    (tmp_path / "scores.json").write_bytes(b"old scores")
    fail_at_call(monkeypatch, os, "fdopen", 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=r"scores\.json"):
        files.write_together(tmp_path, {"predictions.json": "new p", "scores.json": "new s"})
    assert listing(tmp_path) == {"predictions.json": b"old predictions", "scores.json": b"old scores"}
    files.write_together(tmp_path, {"predictions.json": "new p", "scores.json": "new s"})
    assert listing(tmp_path) == {"predictions.json": b"new p", "scores.json": b"new s"}
    with pytest.raises(ValueError, match="plain file name"):
        files.write_together(tmp_path, {"sub/a": ""})


RESULTS = {"predictions.json": "new p", "scores.json": "new s"}


class Killed(BaseException):
    """The process is gone."""


def die_at(monkeypatch, owner, name: str, number: int) -> None:
    """At the `number`-th call of `owner.name` the process is dead: that and all later ones of it do nothing."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) >= number:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("name", "number", "expected"), [
    ("rename", 1, "old"), ("replace", 1, "new"), ("replace", 2, "new"),
])
def test_killed_between_files_that_belong_together(tmp_path, monkeypatch, name, number, expected):
    """New predictions stand beside old scores after a kill between two renames, and nothing can tell or mend it."""
    (tmp_path / "predictions.json").write_bytes(b"old p")
    (tmp_path / "scores.json").write_bytes(b"old s")
    with monkeypatch.context() as patch:
        die_at(patch, os, name, number)
        die_at(patch, files.shutil, "rmtree", 1)
        with pytest.raises(Killed):
            files.write_together(tmp_path, RESULTS)
    files.finish_writing(tmp_path)
    found = listing(tmp_path)
    assert found == {"predictions.json": f"{expected} p".encode(), "scores.json": f"{expected} s".encode()}
    files.write_together(tmp_path, dict.fromkeys(RESULTS, "newest"))
    assert listing(tmp_path) == dict.fromkeys(RESULTS, b"newest")


def test_what_was_cut_off_never_replaces_what_came_later(tmp_path, monkeypatch):
    """The leftover of a killed writer is brought to its place over the newer result of the next one."""
    with monkeypatch.context() as patch:
        die_at(patch, os, "replace", 2)
        with pytest.raises(Killed):
            files.write_together(tmp_path, RESULTS)
    assert len(listing_of_temporaries(tmp_path)) == 1
    files.write_text(tmp_path / "scores.json", "newest")
    assert listing(tmp_path) == {"predictions.json": b"new p", "scores.json": b"newest"}
    files.finish_writing(tmp_path)
    assert listing(tmp_path) == {"predictions.json": b"new p", "scores.json": b"newest"}


def listing_of_temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".tmp-"))


def test_only_what_the_dead_left_is_cleared(tmp_path):
    """Half-written files of killed runs stay for ever; those of a living run, or a user's own, are deleted."""
    for name in (".tmp-12-0123abcd", ".tmp-together-abcd1234", ".tmp-mine", ".tmp-new-step-2-0123abcd"):
        (tmp_path / name).mkdir() if "together" in name else (tmp_path / name).write_text("x")
    path, descriptor = files._locked_temporary(tmp_path / "a")
    files.write_text(tmp_path / "b", "new")
    assert listing_of_temporaries(tmp_path) == sorted([path.name, ".tmp-mine", ".tmp-new-step-2-0123abcd"])
    os.close(descriptor)
    files.write_text(tmp_path / "b", "newer")
    assert listing_of_temporaries(tmp_path) == [".tmp-mine", ".tmp-new-step-2-0123abcd"]


def test_a_strangers_leftover_writes_nowhere_else(tmp_path):
    """A prepared `.tmp-whole-` folder replaces files in other folders, or puts folders and links in place of files."""
    folder, other = tmp_path / "run", tmp_path / "other"
    whole = folder / ".tmp-whole-abcd1234"
    (whole / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "target").write_text("mine")
    (folder / "link").symlink_to(other / "target")
    (whole / "link").write_text("theirs")
    (whole / "pointer").symlink_to(other / "target")
    files.finish_writing(folder)
    assert (other / "target").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["link"] and (folder / "link").read_text() == "theirs"


@pytest.mark.parametrize("texts", [{"a.json": "1"}, RESULTS], ids=["one file", "several"])
def test_no_leftover_of_that_name_blocks_the_writing(tmp_path, texts):
    """Every write fails beside a plain file, or a link, named as the folders of cut off writers are."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".tmp-whole-abcd1234").write_text("x")
    (folder / ".tmp-whole-efgh5678").symlink_to(elsewhere)
    files.write_together(folder, texts)
    assert {path.name for path in folder.iterdir()} == {*texts, ".tmp-whole-efgh5678"}
    assert (elsewhere / "x").read_text() == "mine"


@pytest.mark.parametrize("texts", [{"a.json": "1"}, RESULTS], ids=["one file", "several"])
def test_a_leftover_that_cannot_be_moved_is_named(tmp_path, texts):
    """The file to be written is blamed, where a folder is in the place of another one."""
    (tmp_path / "x").mkdir()
    (tmp_path / ".tmp-whole-abcd1234").mkdir()
    (tmp_path / ".tmp-whole-abcd1234/x").write_text("1")
    with pytest.raises(OSError) as caught:
        files.write_together(tmp_path, texts)
    assert caught.value.filename == str(tmp_path / ".tmp-whole-abcd1234")
    assert "of what an earlier program left in .tmp-whole-abcd1234" in caught.value.strerror


def test_flushed_before_renamed(tmp_path, monkeypatch):
    """A rename that reaches the disk before the content leaves an empty file after a power cut."""
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (order.append(name), original(*a)))
    files.write_text(tmp_path / "a", "new")
    assert order == ["fsync", "replace", "fsync"]


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    """A file system without fsync for folders makes every write fail; a real disk error is hidden."""
    original, refusal = os.fsync, [errno.EINVAL]

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal[0], "no")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "a", "new")
    files.sync_tree(tmp_path)
    assert listing(tmp_path) == {"a": b"new"}
    refusal[0] = errno.EIO
    with pytest.raises(OSError, match="no"):
        files.sync_tree(tmp_path)


def test_whole_tree_is_flushed(tmp_path, monkeypatch):
    """Nested files or folders are left out of the flush; a dangling link or a pipe stops or blocks it."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("a", "x/b", "x/y/c"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    files.sync_tree(tmp_path)
    expected = [tmp_path, *(tmp_path / name for name in ("a", "x", "x/b", "x/y", "x/y/c"))]
    assert sorted(flushed) == sorted(path.stat().st_ino for path in expected)


def test_sha256(tmp_path):
    """Another hash, or one of only the first block (FIPS 180-4 example values: "abc" and a million "a")."""
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"a" * 1_000_000)
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "b") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_lock_and_delete(tmp_path):
    """Two writers hold one folder at once; deleting a link deletes what it points to."""
    with files.folder_lock(tmp_path) as first, files.folder_lock(tmp_path) as second:
        assert (first, second) == (True, False)
    with files.folder_lock(tmp_path) as again:
        assert again
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to("folder")
    files.delete(tmp_path / "link")
    assert listing(tmp_path / "folder") == {"a": b"1"}
    files.delete(tmp_path / "folder")
    assert listing(tmp_path) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_a_folder_is_refused(tmp_path):
    """A named pipe called model_checkpoints made the run wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotADirectoryError), files.folder_lock(tmp_path / "pipe"):
        pass
    with pytest.raises(NotADirectoryError):
        files.sync_folder(tmp_path / "pipe")
