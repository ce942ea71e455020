"""Pickles that would run code, or do harm with what torch's `weights_only` allows, at every place that reads one."""

import hashlib
import io
import json
import pickle
import tarfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.prompts import PromptFormat
from data.token_cache import open_token_table
from model.legacy import load_legacy_weights
from model.loading import load_language_model
from tests.conftest import byte_tokenizer, tiny_gpt2, tiny_language_model, write_rows
from tests.faults.hostile_attack import Attack, Bomb
from utils.checkpoint import Checkpoints, load_state, verify
from utils.seal import sealed

ROWS = [{"id": str(number), "article": "some words here", "highlights": "words"} for number in range(4)]


# -- legacy .pt ------------------------------------------------------------------------------------------------


def legacy(content, old_format: bool = False):
    """An attack by a `.pt` file that torch.save wrote; content(folder): what is in it."""

    def run(folder: Path) -> None:
        torch.save(content(folder), folder / "old.pt", _use_new_zipfile_serialization=not old_format)
        load_legacy_weights(tiny_gpt2(seed=0), folder / "old.pt")

    return run


def legacy_bytes(content):
    """The same by the file's bytes."""

    def run(folder: Path) -> None:
        (folder / "old.pt").write_bytes(content(folder))
        load_legacy_weights(tiny_gpt2(seed=0), folder / "old.pt")

    return run


def state_with(folder: Path) -> dict:
    return {**tiny_gpt2().state_dict(), "note": Bomb(folder)}


def zip_of(records: dict[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # that a name stands twice in it is meant
        for name, content in records.items() if isinstance(records, dict) else records:
            archive.writestr(name, content)
    return file.getvalue()


def torch_zip(pickled: bytes) -> bytes:
    return zip_of({"old/data.pkl": pickled, "old/version": b"3\n", "old/byteorder": b"little"})


def instructions(body: bytes) -> bytes:
    """A pickle of torch's kind: {"a": what the instructions leave}."""
    return torch_zip(b"\x80\x02}X\x01\x00\x00\x00a" + body + b"s.")


def call(name: str, argument: bytes) -> bytes:
    """The instructions that call a function with one argument."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n" + argument + b"\x85R"


def tar_of_pickles(folder: Path) -> bytes:
    """The oldest format of torch, which once led past `weights_only`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(1 if name != "pickle" else Bomb(folder), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def torch_script(folder: Path) -> bytes:
    class Program(torch.nn.Module):
        def forward(self, x):
            return x + 1

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Program()), file)
    return file.getvalue()


def twice_the_pickle(folder: Path) -> bytes:
    """Two records of one name: a checker and a reader may each take another."""
    harmless = pickle.dumps({}, 2)
    return zip_of([("old/data.pkl", harmless), ("old/data.pkl", pickle.dumps(Bomb(folder), 2)), ("old/version", b"3")])


def with_own_methods(folder: Path) -> bytes:
    """An OrderedDict whose instance has an `items` and a `get` of its own."""
    own = b"".join(b"X" + bytes([len(name), 0, 0, 0]) + name + b"K\x01s" for name in (b"get", b"items", b"keys"))
    return torch_zip(b"\x80\x02ccollections\nOrderedDict\n)R" + b"X\x01\x00\x00\x00aNs" + b"}" + own + b"b.")


def claiming(folder: Path) -> dict:
    """A tensor of 10^15 numbers, all of them the same four bytes."""
    return {**tiny_gpt2().state_dict(), "lm_head.weight": torch.zeros(1).expand(10**9, 10**6),
            "transformer.wte.weight": torch.zeros(1).expand(10**9, 10**6)}


LEGACY = [
    Attack("a .pt file", legacy(state_with), "old.pt holds more than tensors.*it names .*open"),
    Attack("a .pt file of the format before torch 1.6", legacy(state_with, True), "old.pt holds more than tensors"),
    Attack("a .pt file, the pickle in a nested state dict",
           legacy(lambda folder: {"model_state_dict": state_with(folder)}), "old.pt holds more than tensors"),
    Attack("a .pt file that is a plain pickle, protocol 2",
           legacy_bytes(lambda folder: pickle.dumps(Bomb(folder), 2)), "old.pt holds more than tensors"),
    Attack("a .pt file that is a plain pickle, protocol 5",
           legacy_bytes(lambda folder: pickle.dumps(Bomb(folder), 5)), "old.pt holds more than tensors"),
    Attack("a .pt file that is a tar of pickles", legacy_bytes(tar_of_pickles), "old.pt is damaged"),
    Attack("a TorchScript program as .pt", legacy_bytes(torch_script), "old.pt .*TorchScript"),
    Attack("a .pt file with two pickles of one name", legacy_bytes(twice_the_pickle), "old.pt is damaged"),
    Attack("a .pt file that is deflated",
           legacy_bytes(lambda folder: zip_of({"old/data.pkl": b"\x80\x02}."}, zipfile.ZIP_DEFLATED)), "compressed"),
    Attack("a .pt file: bytearray(10^11), which torch allows",
           legacy_bytes(lambda folder: instructions(call("__builtin__ bytearray", b"\x8a\x05\x00\xe8\x76\x48\x17"))),
           "names __builtin__.bytearray"),
    Attack("a .pt file: FloatTensor(10^9), which torch allows",
           legacy_bytes(lambda folder: instructions(call("torch FloatTensor", b"J\x00\xca\x9a\x3b"))),
           "names torch.FloatTensor"),
    Attack("a .pt file: a tuple 500,000 deep as a key, whose hash ends the interpreter",
           legacy_bytes(lambda folder: torch_zip(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")), "nested deeper"),
    Attack("a .pt file: lists within lists, 2^60 in all",
           legacy_bytes(lambda folder: torch_zip(doubling())), "more than 2,000,000 values"),
    Attack("a .pt file: a Counter", legacy(lambda folder: Counter("abc")), "names collections.Counter"),
    Attack("a .pt file: an instruction that torch does not write",
           legacy_bytes(lambda folder: torch_zip(pickle.dumps({"a": b"x" * 300}, 4))), "holds more than tensors"),
    Attack("a .pt file: an OrderedDict with methods of its own", legacy_bytes(with_own_methods), "is not a state dict"),
    Attack("a .pt file: tensors of 10^15 numbers in 4 bytes", legacy(claiming), "claims 1,000,000,000,000,000 numbers"),
    Attack("a .pt file: a sparse tensor",
           legacy(lambda folder: {"a": torch.ones(2, 2).to_sparse()}), "names torch._utils._rebuild_sparse_tensor"),
    Attack("a .pt file: weights that are whole numbers",
           legacy(lambda folder: {key: value.long() for key, value in tiny_gpt2().state_dict().items()}),
           "17 of another type"),
    Attack("a .pt file: a name of a million characters",
           legacy(lambda folder: {"module." * 150_000: torch.ones(1)}), "old.pt is not a state dict"),
]


def doubling() -> bytes:
    """A list of twice the list before, 60 times: small in the file and in memory, but endless for who walks it."""
    body = b"\x80\x02]q\x00"
    for level in range(60):
        body += b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return body + b"."


# -- model folders ---------------------------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    tiny_language_model(seed=7).save(folder / "model")
    return folder / "model"


def bin_weights(write, in_shards: bool = False, keep_safetensors: bool = False):
    """An attack by a pytorch_model.bin; write(path, folder): writes it."""

    def run(folder: Path) -> None:
        model = model_folder(folder)
        if not keep_safetensors:
            (model / "model.safetensors").unlink()
        name = "pytorch_model-00001-of-00001.bin" if in_shards else "pytorch_model.bin"
        write(model / name, folder)
        if in_shards:
            index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_gpt2().state_dict(), name)}
            (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        load_language_model(str(model))

    return run


def save_state(path: Path, folder: Path) -> None:
    torch.save(state_with(folder), path)


def beside(name: str, content=lambda folder: pickle.dumps(Bomb(folder))):
    """An attack by a file that lies in a model folder and is none of the model's."""

    def run(folder: Path) -> None:
        model = model_folder(folder)
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content(folder))
        load_language_model(str(model))

    return run


def distributed(folder: Path) -> None:
    model = model_folder(folder)
    (model / "model.safetensors").rename(model / "shard-00001-model-00001-of-00001.safetensors")
    (model / ".metadata").write_bytes(pickle.dumps(Bomb(folder)))
    load_language_model(str(model))


MODEL_FOLDERS = [
    Attack("pytorch_model.bin", bin_weights(save_state), "pytorch_model.bin: .*not unpickled"),
    Attack("pytorch_model.bin in shards with an index", bin_weights(save_state, in_shards=True),
           "pytorch_model-00001-of-00001.bin: .*not unpickled"),
    Attack("pytorch_model.bin that is a plain pickle",
           bin_weights(lambda path, folder: path.write_bytes(pickle.dumps(Bomb(folder)))), "not unpickled"),
    Attack("pytorch_model.bin that is a TorchScript program",
           bin_weights(lambda path, folder: path.write_bytes(torch_script(folder))), "TorchScript"),
    Attack("pytorch_model.bin: tensors of 10^15 numbers in 4 bytes",
           bin_weights(lambda path, folder: torch.save(claiming(folder), path)), "claims 1,000,000,000,000,000"),
    Attack("pytorch_model.bin beside good weights", bin_weights(save_state, keep_safetensors=True)),
    Attack("model.safetensors that is a pickle",
           beside("model.safetensors"), "model cannot be loaded"),
    Attack("training_args.bin, optimizer.pt, rng_state.pth in a model folder", beside("training_args.bin")),
    Attack("optimizer.pt in a model folder", beside("optimizer.pt")),
    Attack("a checkpoint of several processes, with a pickled .metadata", distributed, "of several processes"),
    Attack("tokenizer.model that is a pickle", beside("tokenizer.model")),
    Attack("vocab.json that is a pickle", beside("vocab.json")),
]


# -- checkpoints -----------------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    """A checkpoint of ours, as a run writes it."""
    model = tiny_language_model()
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = {"optimizer": optimizer.state_dict(), "random": [torch.get_rng_state()], "objective": [None]}
    state = {"epoch": 0, "identity": {}, "judged_by": ""}
    return Checkpoints(folder / "run/model_checkpoints", "a" * 32, 2).save(1, model.save, state, tensors)


def recompute_manifest(step: Path) -> None:
    """What an attacker does who knows the format."""
    path = step / "trainer_state/manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(step, manifest)


def write_manifest(step: Path, manifest: dict) -> None:
    """With its own sum, as the program would write it."""
    manifest.pop("sha256", None)
    (step / "trainer_state/manifest.json").write_text(json.dumps(sealed(manifest)))


def state_file(name: str, with_manifest: bool):
    def run(folder: Path) -> None:
        step = checkpoint(folder)
        torch.save({"state": Bomb(folder)}, step / f"trainer_state/{name}.pt")
        if with_manifest:
            recompute_manifest(step)
        verify(step)
        load_state(step)

    return run


CHECKPOINTS = [
    Attack(f"{name}.pt of a checkpoint{', its manifest recomputed' * with_manifest}", state_file(name, with_manifest),
           f"{name}.pt: {'not readable with weights_only.*names .*open' if with_manifest else 'changed|cut short'}")
    for name in ("optimizer", "random", "objective") for with_manifest in (False, True)
]


# -- token caches ----------------------------------------------------------------------------------------------


def cache_file(name: str, content):
    """An attack by a file of a token cache whose manifest fits; the table is then made anew."""

    def run(folder: Path) -> None:
        csv, format_ = write_rows(folder / "rows.csv", ROWS), PromptFormat(byte_tokenizer(), max_length=64)
        before = open_token_table(csv, format_, folder / "cache")
        place = before.folder
        content(place / name, folder)
        manifest = json.loads((place / "manifest.json").read_text())
        for each in manifest["files"]:
            manifest["files"][each] = hashlib.sha256((place / each).read_bytes()).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest))
        after = open_token_table(csv, format_, folder / "cache")
        assert [after.ids(row).tolist() for row in range(4)] == [format_.training_rows(*[[each[key]] for key in (
            "article", "highlights")])[0][0] for each in ROWS]

    return run


def objects(path: Path, folder: Path) -> None:
    np.save(path, np.array([Bomb(folder)], dtype=object), allow_pickle=True)


def npz(path: Path, folder: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.array([Bomb(folder)], dtype=object))


CACHES = [
    Attack("a .npy file of pickled objects in a token cache", cache_file("offsets.npy", objects)),
    Attack("an .npz file in the place of a .npy", cache_file("numbers.npy", npz)),
    Attack("a pickle in the place of a .npy",
           cache_file("boundaries.npy", lambda path, folder: path.write_bytes(pickle.dumps(Bomb(folder))))),
    Attack("offsets outside of the tokens",
           cache_file("offsets.npy", lambda path, folder: np.save(path, np.array([0, 9, 10**15, 10**15, 10**15])))),
    Attack("a .npy file that claims 10^15 numbers",
           cache_file("offsets.npy", lambda path, folder: path.write_bytes(claiming_npy()))),
    Attack("skipped.json with other fields",
           cache_file("skipped.json", lambda path, folder: path.write_text('[{"__class__": "os"}]'))),
    Attack("ids.json with fewer rows", cache_file("ids.json", lambda path, folder: path.write_text("[]"))),
]


def claiming_npy() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    return file.getvalue() + bytes(8)


ATTACKS = [*LEGACY, *MODEL_FOLDERS, *CHECKPOINTS, *CACHES]
