"""Files are the old one or the complete new one; errors of the system in one line: utils/files.py, errors.py."""

import errno
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


def test_path_cause_and_remedy():
    """Fault: a bare "No space left on device", or one over several lines, that names neither path nor remedy."""
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert describe(full) == f"/a/b: No space left on device: {REMEDIES[errno.ENOSPC]}"
    assert describe(full, Path("c")).startswith("c: No space left on device: free space")
    assert describe(OSError("lost\n  the  way")) == "lost the way"
    assert describe(OSError(errno.EPIPE, "Broken pipe", 7)) == "Broken pipe"
