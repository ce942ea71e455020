"""Files of `torch.save`, read only where they hold nothing but tensors and plain values.

A pickle is a program. torch's `weights_only` runs none of it that could do more than build tensors; what that still
allows can fill the memory (`bytearray(10**11)`, records that were deflated, tensors that claim more than is stored) or
crash the interpreter (the hash of a deep tuple). So each pickle is read through first, without building anything, and
may name only what state dicts, optimizer states and random states are made of.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from itertools import islice
from os import SEEK_END, PathLike
from pathlib import Path
from typing import BinaryIO

import torch

from untrusted.files import open_regular
from untrusted.text import shorten

LONGEST_PICKLE = 64_000_000  # bytes, without the tensors
MOST_RECORDS = 200_000  # tensors in a file
MOST_VALUES = 2_000_000
DEEPEST = 50
STORAGES = "BFloat16 Bool Byte Char Double Float Half Int Long Short".split()
DTYPES = "bfloat16 bool float16 float32 float64 int8 int16 int32 int64 uint8".split()
NAMES = {
    "collections OrderedDict", "__builtin__ set", "torch Size", "torch device", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", *(f"torch {name}Storage" for name in STORAGES),
    *(f"torch {name}" for name in DTYPES),
}
# What the instructions of a pickle that torch writes take from the stack; MARK: all down to the last mark.
MARK = -1
TAKEN = {
    **dict.fromkeys(("TUPLE1", "APPEND", "BUILD", "BINPERSID"), 1),
    **dict.fromkeys(("TUPLE2", "SETITEM", "REDUCE"), 2), "TUPLE3": 3,
    **dict.fromkeys(("TUPLE", "APPENDS", "SETITEMS"), MARK),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT",
                     "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "GLOBAL"), 0),
}
IN_PLACE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # change what is then on top


class TorchFileError(ValueError):
    """Why a file is not read, without its name."""


class NotPlainError(TorchFileError):
    """It holds more than tensors and plain values."""


def load_torch_file(path: str | PathLike, device: str = "cpu", mmap: bool = False):
    """What `torch.save` put there, on the CPU, or on "meta" (shapes without numbers).

    Raises:
        NotPlainError: it holds more than tensors and plain values; nothing of it was built.
        TorchFileError: it is damaged or cut off, or no file of torch.save.
        OSError: it cannot be read, or is no regular file.
    """
    check_torch_file(path)
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip(path))
    except Exception as error:  # damaged bytes make torch raise almost anything
        raise TorchFileError(shorten(" ".join(str(error).split()) or type(error).__name__, 150)) from error
    for tensor in tensors_in(content):
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise NotPlainError(f"a tensor claims {tensor.numel():,} numbers and has fewer")
    return content


def save_torch_file(value: object, path: Path) -> None:
    """`torch.save` whose failing to write is an OSError: torch hides it behind a RuntimeError of its zip writer."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def check_torch_file(path: str | PathLike) -> None:
    """Raises as `load_torch_file`, without building anything."""
    with open_regular(path) as file:
        try:
            if file.read(4) == b"PK\x03\x04":
                check_records(file)
            else:
                file.seek(0)
                head = io.BytesIO(file.read(LONGEST_PICKLE))
                for _ in range(5):  # the format before torch 1.6: magic number, version, system, content, keys
                    check_pickle(head)
        except TorchFileError:
            raise
        except Exception as error:  # so do they make zipfile, pickletools and the seeking for a place that is not there
            raise TorchFileError(shorten(" ".join(str(error).split()) or type(error).__name__, 150)) from error


def is_zip(path: str | PathLike) -> bool:
    with open_regular(path) as file:
        return file.read(4) == b"PK\x03\x04"


def check_records(file: BinaryIO) -> None:
    """The records of a zip file: not more than there is room for, and the pickle among them."""
    size = file.seek(0, SEEK_END)
    if directory_size(file, size) > 200 * MOST_RECORDS:
        raise TorchFileError(f"it has more than {MOST_RECORDS:,} records")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("/constants.pkl") for record in records):
            raise NotPlainError("it is a TorchScript program")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise NotPlainError("its records are compressed, which torch.save does not do")
        if sum(record.file_size for record in records) > size:
            raise TorchFileError("its records claim more than it holds")
        pickles = [record for record in records if record.filename.endswith(".pkl")]
        if len(pickles) != 1 or len({record.filename for record in records}) < len(records):
            raise TorchFileError("no file of torch.save")
        if pickles[0].file_size > LONGEST_PICKLE:
            raise TorchFileError(f"its pickle is longer than {LONGEST_PICKLE // 1_000_000} MB")
        check_pickle(io.BytesIO(archive.read(pickles[0])))


def directory_size(file: BinaryIO, size: int) -> int:
    """Bytes of the zip file's list of records, told before anything is made for each of them."""
    file.seek(max(size - 42, 0))
    end = file.read()
    if end[-22:-18] != b"PK\x05\x06":
        raise TorchFileError("its end is missing")
    if end[:4] != b"PK\x06\x07":
        return int.from_bytes(end[-10:-6], "little")
    file.seek(int.from_bytes(end[8:16], "little"))  # there its numbers of 64 bits are, which count where they are
    return int.from_bytes(file.read(48)[40:], "little")


def check_pickle(file: BinaryIO) -> None:
    """Follows one pickle without building what it describes: names, and how deep its tuples are."""
    stack: list[int] = []  # depth of the tuple at that place; 0 for everything else
    marks: list[int] = []
    memo: dict[int, int] = {}
    for instruction, argument, _ in pickletools.genops(file):
        name = instruction.name
        if name == "GLOBAL" and argument not in NAMES:
            raise NotPlainError(f"it names {shorten(argument.replace(' ', '.', 1))}")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in TAKEN:
            first = marks.pop() if TAKEN[name] == MARK else len(stack) - TAKEN[name]
            taken, stack[first:] = stack[first:], []
            if name not in IN_PLACE:
                stack.append(max(taken, default=0) + 1 if name.startswith("TUPLE") else 0)
                if stack[-1] > DEEPEST:
                    raise NotPlainError(f"its tuples are nested deeper than {DEEPEST} levels")
        elif name not in ("PROTO", "STOP"):
            raise NotPlainError(f"it has the instruction {name}, which torch.save does not write")


def tensors_in(content) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists, tuples and sets. Raises NotPlainError for too many values or levels."""
    level, count = [content], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST_VALUES:
            raise NotPlainError(f"it describes more than {MOST_VALUES:,} values")
        yield from (value for value in level if isinstance(value, torch.Tensor))
        level = list(islice((child for value in level for child in children(value)), MOST_VALUES + 1))
        if not level:
            return
    raise NotPlainError(f"its values are nested deeper than {DEEPEST} levels")


def children(value) -> list:
    if isinstance(value, dict):  # its own methods: a pickle may put others into an OrderedDict
        return [*dict.keys(value), *dict.values(value)]
    return list(value) if type(value) in (list, tuple, set) else []
