"""Files are the old one or the complete new one; errors of the system in one line: utils/files.py, errors.py."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import files
from utils.errors import REMEDIES, describe


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    """Fault: a platform's own newline or encoding, a missing final newline, or escaped letters in the JSON."""
    files.write_text(tmp_path / "a.txt", "café\r\nzwei\n")
    files.write_json(tmp_path / "a.json", {"ü": [1, None, 0.1]})
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xc3\xa9\r\nzwei\n"
    content = (tmp_path / "a.json").read_bytes()
    assert content.endswith(b"\n") and "ü".encode() in content and json.loads(content) == {"ü": [1, None, 0.1]}


FULL = """
import sys
from utils.files import write_text
try:
    write_text(sys.argv[1], "new scores" * 1000)
except OSError as error:
    print(error.errno, error.filename, error.strerror)
"""


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path):
    """Fault: a write that the system cuts off (here by a file size limit) leaves half a file, or a temporary (A21)."""
    target = tmp_path / "scores.json"
    target.write_bytes(b"old scores")
    command = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", sys.executable, "-c", FULL, str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"{errno.EFBIG} {target} not written (File too large)\n", done.stderr
    assert listing(tmp_path) == {"scores.json": b"old scores"}


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_every_call_may_fail(tmp_path, monkeypatch, name, error):
    """Fault: an error or Ctrl-C while flushing or renaming harms the old file or leaves the temporary."""
    (tmp_path / "a").write_bytes(b"old")
    fail_at_call(monkeypatch, os, name, 1, error)
    with pytest.raises(type(error)):
        files.write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert listing(tmp_path) == {"a": b"old"}


def test_not_json_leaves_the_old_file(tmp_path):
    """Fault: NaN, infinities and unknown types are written as invalid JSON, or cost the old file."""
    (tmp_path / "a.json").write_bytes(b"{}")
    for value in [float("nan"), [float("inf")], {"a": {1, 2}}, {"a": "\ud800"}]:
        with pytest.raises(ValueError, match=r"a\.json: ") as caught:
            files.write_json(tmp_path / "a.json", value)
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == {"a.json": b"{}"}


def test_links_and_permissions(tmp_path):
    """Fault: a link is replaced by a file, the umask of a new file is ignored, or what a kill left stays for ever."""
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to("real/a")
    (tmp_path / ".tmp-b").write_bytes(b"hal")
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "new")
        files.write_text(tmp_path / "b", "new")
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "real"]
    assert (tmp_path / "a").is_symlink() and listing(tmp_path / "real") == {"a": b"new"}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_flushed_before_renamed(tmp_path, monkeypatch):
    """Fault: a rename that reaches the disk before the content leaves an empty file after a power cut."""
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (order.append(name), original(*a)))
    files.write_text(tmp_path / "a", "new")
    assert order == ["fsync", "replace", "fsync"]


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    """Fault: a file system without fsync for folders makes every write fail; a real disk error is hidden."""
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


def test_complete_tree_is_flushed(tmp_path, monkeypatch):
    """Fault: nested files or folders are not flushed."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("a", "x/b", "x/y/c"):
        (tmp_path / name).write_bytes(b"1")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    files.sync_tree(tmp_path)
    expected = [tmp_path, *(tmp_path / name for name in ("a", "x", "x/b", "x/y", "x/y/c"))]
    assert sorted(flushed) == sorted(path.stat().st_ino for path in expected)


def test_sha256(tmp_path):
    """Fault: another hash, or one of the first block only (FIPS 180-4 example values: "abc" and a million "a")."""
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"a" * 1_000_000)
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "b") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert files.sha256_text("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()


def test_path_cause_and_remedy():
    """Fault: a bare "No space left on device", or one over several lines, that names neither path nor remedy."""
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert describe(full) == f"/a/b: No space left on device: {REMEDIES[errno.ENOSPC]}"
    assert describe(full, Path("c")).startswith("c: No space left on device: free space")
    assert describe(OSError("lost\n  the  way")) == "lost the way"
    assert describe(OSError(errno.EPIPE, "Broken pipe", 7)) == "Broken pipe"
