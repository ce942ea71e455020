"""Model folders, weights and checkpoints that claim more than there is, or are too large for a library to open."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from data.prompts import PromptFormat
from data.token_cache import open_token_table
from model.language_model import LanguageModel, ModelError
from model.legacy import load_legacy_weights
from model.loading import build_model, load_language_model
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.faults.hostile_attack import MARK, Attack, Bomb
from tests.faults.hostile_models import AUTO_MAP, CODE, changed, config_with, edit
from tests.faults.hostile_pickles import call, checkpoint, instructions, legacy_bytes, model_folder, torch_zip, zip_of
from tests.faults.hostile_sizes import DEEP, GIGABYTE, sparse
from utils.checkpoint import load_state, verify
from utils.evaluation import fact_share

BILLION = 10**9


# -- config.json -----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64}
FAMILIES = {"gpt2": GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64),
            "llama": LlamaConfig(**SMALL), "qwen2": Qwen2Config(**SMALL), "gpt_neox": GPTNeoXConfig(**SMALL)}


def family_folder(folder: Path, family: str) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    LanguageModel(model, byte_tokenizer()).save(folder / "model")
    return folder / "model"


def every_number(family: str, value: int, from_scratch: bool = False):
    """Each whole number of a family's config.json in turn, and names that the library knows besides."""

    def run(folder: Path) -> None:
        model = family_folder(folder, family)
        config = json.loads((model / "config.json").read_text())
        keys = [key for key, number in config.items() if type(number) is int] + ["num_labels", "n_inner"]
        assert len(keys) > 5
        refused = 0
        for key in keys:
            (model / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                load_language_model(str(model), from_scratch=from_scratch)
            except ModelError as error:
                assert "\n" not in str(error)
                refused += 1
        assert refused >= 3, refused
        raise ModelError(f"{refused} of {len(keys)} refused")

    return run


def from_scratch(**values):
    def run(folder: Path) -> None:
        model = model_folder(folder)
        edit(model / "config.json", **values)
        load_language_model(str(model), from_scratch=True)

    return run


def with_legacy_weights(**values):
    """A config that claims much, and a `.pt` file of few weights to go into it."""

    def run(folder: Path) -> None:
        model = model_folder(folder)
        edit(model / "config.json", **values)
        torch.save(tiny_gpt2().state_dict(), folder / "old.pt")
        load_language_model(str(model), weights=folder / "old.pt")

    return run


def many_layers(folder: Path) -> None:
    build_model("gpt2", GPT2Config(n_layer=90_000, n_embd=2, n_head=1, vocab_size=9, n_positions=9))


CONFIGS = [
    *(Attack(f"every number in turn is 10^{digits}, family {family}", every_number(family, 10**digits), "refused",
             slow=digits != 9) for family in FAMILIES for digits in (7, 9, 15)),
    *(Attack(f"every number in turn is 10^12, random weights, family {family}", every_number(family, 10**12, True),
             "refused", slow=family != "gpt2") for family in FAMILIES),
    Attack("a vocabulary of 99 million, which lists do not show", changed(config_with(vocab_size=99_000_000)),
           "asks for .*its files hold 9,472 weights"),
    Attack("99 million positions", changed(config_with(n_positions=99_000_000)), "its files hold 9,472 weights"),
    Attack("99,999 layers", changed(config_with(n_layer=99_999)), "asks for more than", slow=True),
    Attack("90,000 layers of two numbers, random weights", many_layers, "more than .* 10,000 tensors", slow=True),
    Attack("a width of 99 million, random weights", from_scratch(n_embd=99_000_000), "this machine has no memory"),
    Attack("99 million positions beside a .pt file", with_legacy_weights(n_positions=99_000_000), "its files hold"),
    Attack("99,999 layers beside a .pt file", with_legacy_weights(n_layer=99_999), "asks for more than", slow=True),
    Attack("a billion labels", changed(config_with(num_labels=BILLION)), "num_labels is 1000000000: expected at most"),
    Attack("a number that is infinite", changed(config_with(n_layer=float("inf"))), "n_layer is inf"),
]


# -- texts of a model folder -----------------------------------------------------------------------------------


def text(name: str, write: Callable[[Path], object]):
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        write(model / name)

    return changed(change)


def of(content: bytes):
    return lambda path: path.write_bytes(content)


TEXTS = [
    *(Attack(f"{name} of 1 GB", text(name, lambda path: sparse(path, b'{"a": "', GIGABYTE)), "larger than 100 MB",
             slow=name not in ("config.json", "tokenizer.json"))
      for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
                   "special_tokens_map.json", "chat_template.jinja", "merges.txt")),
    *(Attack(f"{name} that is a named pipe", text(name, os.mkfifo), f"{name} is a pipe or a device",
             slow=not name.startswith("tokenizer"))
      for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                   "added_tokens.json", "model.safetensors")),
    *(Attack(f"{name} of lists within lists", text(name, of(DEEP[:2_000_000])), "cannot be loaded")
      for name in ("config.json", "tokenizer.json", "tokenizer_config.json")),
    *(Attack(f"{name} of 21 million empty lists", text(name, of(b'{"a":[' + b"[]," * 10_500_000 + b"1]}")),
             "more than 20,000,000 values|larger than 10 MB") for name in ("config.json", "tokenizer.json")),
    Attack("tokenizer_config.json with a number of a million digits",
           text("tokenizer_config.json", of(b'{"a": ' + b"9" * 10**6 + b"}")), "config.json cannot be loaded"),
    Attack("an index of two hundred thousand shards", changed(lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {f"k{number}": f"{number}.safetensors" for number in range(200_000)}})))),
        "model lacks 0.safetensors", slow=True),
]


# -- weights ---------------------------------------------------------------------------------------------------


def safetensors(header: bytes, length: int | None = None, size: int = 0):
    """Weights of that header, which says that it is of that length, in a file of that size."""

    def change(model: Path) -> None:
        start = struct.pack("<Q", len(header) if length is None else length) + header
        sparse(model / "model.safetensors", start, max(size, len(start) + 1))

    return changed(change)


def tensor(shape: list[int], end: int) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


def allocating(power: int) -> bytes:
    """A state dict of the old format whose one storage is said to hold 2^power numbers."""
    count = 1 << power
    storage = (b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
               b"\x8a\x08" + count.to_bytes(8, "little") + b"NtQ")
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage[1:] + b"K\x00(K\x01t(K\x01t\x89}tR"
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    system = (b"\x80\x02}(X\x10\x00\x00\x00protocol_versionM\xe9\x03X\r\x00\x00\x00little_endian\x88X\n\x00\x00\x00"
              b"type_sizes}u.")
    return (magic + b"\x80\x02M\xe9\x03." + system + b"\x80\x02}X\x01\x00\x00\x00a" + built + b"s."
            + b"\x80\x02]X\x01\x00\x00\x000a." + count.to_bytes(8, "little") + bytes(64))


def deflated(folder: Path) -> bytes:
    """100 MB of zeros in 100 kB."""
    pickled = b"\x80\x02}."
    return zip_of([("old/data.pkl", pickled), ("old/version", b"3\n"), ("old/data/0", bytes(100_000_000))],
                  zipfile.ZIP_DEFLATED)


def many_records(folder: Path) -> bytes:
    """The end of a zip file that says its list of records is of 4 GB."""
    content = torch_zip(b"\x80\x02}.")
    return content[:-10] + (0xFFFFFFF0).to_bytes(4, "little") + content[-6:]


def sparse_weights(folder: Path) -> None:
    """A file that holds 5 * 10^11 numbers on a disk that has no room for them, and a config for as many."""
    model = model_folder(folder)
    edit(model / "config.json", vocab_size=99_000_000, n_embd=5000)
    size = 99_000_000 * 5000 * 4
    header = tensor([99_000_000, 5000], size)
    sparse(model / "model.safetensors", struct.pack("<Q", len(header)) + header, 8 + len(header) + size)
    load_language_model(str(model))


WEIGHTS = [
    Attack("a safetensors header of 2^63 bytes", safetensors(b"{}", 1 << 63), "model cannot be loaded"),
    Attack("a safetensors header of 99 MB", safetensors(b"{", 99_000_000, 99_000_010), "model cannot be loaded"),
    Attack("a safetensors header of lists within lists", safetensors(DEEP[:2_000_000]), "model cannot be loaded"),
    Attack("a safetensors tensor of 10^15 numbers", safetensors(tensor([10**15], 4 * 10**15)), "cannot be loaded"),
    Attack("a safetensors tensor whose size overflows", safetensors(tensor([2**32, 2**32, 4], 4)), "cannot be loaded"),
    Attack("weights of 2 TB of nothing, and a vocabulary for them", sparse_weights, "no memory|cannot be loaded"),
    Attack("a .pt file of 100 MB in 100 kB", legacy_bytes(deflated), "compressed", slow=True),
    Attack("a .pt file with a list of records of 4 GB", legacy_bytes(many_records), "more than 200,000 records"),
    Attack("a .pt file of the old format with 2^40 numbers", legacy_bytes(lambda folder: allocating(40)), "damaged"),
    Attack("a .pt file: bytearray(2^40)", legacy_bytes(
        lambda folder: instructions(call("__builtin__ bytearray", b"\x8a\x06" + (1 << 40).to_bytes(6, "little")))),
        "names __builtin__.bytearray"),
    Attack("a .pt file of 2 GB of nothing", lambda folder: load_legacy_weights(
        tiny_gpt2(), sparse(folder / "old.pt", b"PK\x03\x04", 2 * GIGABYTE)), "old.pt is damaged"),
    Attack("a .pt file that is a named pipe", lambda folder: (
        os.mkfifo(folder / "old.pt"), load_legacy_weights(tiny_gpt2(), folder / "old.pt")), "a pipe or a device"),
]


# -- checkpoints -----------------------------------------------------------------------------------------------


def of_checkpoint(name: str, write: Callable[[Path], object], read: Callable[[Path], object] = verify):
    def run(folder: Path) -> None:
        step = checkpoint(folder)
        (step / name).unlink()
        write(step / name)
        read(step)

    return run


MANIFEST, STATE = "trainer_state/manifest.json", "trainer_state/state.json"


def entries(count: int):
    def write(path: Path) -> None:
        entry = {"bytes": 1, "sha256": ""}
        path.write_text(json.dumps({"format_version": 1, "files": {str(each): entry for each in range(count)}}))

    return write


CHECKPOINTS = [
    Attack("a manifest of 1 GB", of_checkpoint(MANIFEST, lambda path: sparse(path, b"{", GIGABYTE)), "larger than 10"),
    Attack("a manifest of a million files", of_checkpoint(MANIFEST, entries(10**6)), "larger than 10 MB", slow=True),
    Attack("a manifest of two hundred thousand files", of_checkpoint(MANIFEST, entries(200_000)),
           "lists 200,000 files, more than 10,000", slow=True),
    Attack("a manifest of lists within lists", of_checkpoint(MANIFEST, of(DEEP[:9_000_000])), "cannot be read as JSON"),
    Attack("a manifest that is a named pipe", of_checkpoint(MANIFEST, os.mkfifo), "manifest.json: missing"),
    Attack("a state.json of 1 GB", of_checkpoint(STATE, lambda path: sparse(path, b"{", GIGABYTE)), "changed"),
    Attack("a state.json that is a device", of_checkpoint(STATE, lambda path: path.symlink_to("/dev/zero")), "missing"),
    Attack("an optimizer.pt that is a named pipe", of_checkpoint("trainer_state/optimizer.pt", os.mkfifo, load_state),
           "optimizer.pt: missing"),
]


# -- the hub's models in the machine's cache -------------------------------------------------------------------


def cached(change: Callable[[Path], object]):
    """An attack by a model of the hub that was downloaded before."""

    def run(folder: Path) -> None:
        commit = folder.name.rjust(40, "0")
        place = Path(os.environ["HF_HUB_CACHE"], f"models--evil--model{folder.name}")
        model = model_folder(folder)
        (model / "strange.py").write_text(CODE.format(mark=str(folder / MARK)))
        change(model)
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(commit)
        (place / "snapshots").mkdir()
        model.rename(place / "snapshots" / commit)
        load_language_model(f"evil/model{folder.name}")

    return run


def pickled_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"a": Bomb(model.parent)}, model / "pytorch_model.bin")


HUB = [
    Attack("a model of the hub, as it should be", cached(lambda model: None)),
    Attack("a model of the hub with a billion labels", cached(config_with(num_labels=BILLION)), "num_labels is"),
    Attack("a model of the hub with code of its own", cached(config_with(auto_map=AUTO_MAP, model_type="strange")),
           "never run"),
    Attack("a model of the hub with code for a family of the library", cached(config_with(auto_map=AUTO_MAP))),
    Attack("a model of the hub with pickled weights", cached(pickled_weights), "cannot get"),
    Attack("a model of the hub with a tokenizer.json of 1 GB",
           cached(lambda model: sparse(model / "tokenizer.json", b"{", GIGABYTE)), "larger than 100 MB"),
    Attack("a model of the hub of a width of 99 million", cached(config_with(n_embd=99_000_000)), "no memory for that"),
]


# -- long rows -------------------------------------------------------------------------------------------------


def long_rows(folder: Path) -> None:
    """Articles of 2 million characters and highlights of 300,000: few tokens of each are used."""
    with (folder / "rows.csv").open("w") as file:
        file.write("id,article,highlights\n")
        for number in range(8):
            file.write(f"{number},{'word ' * 400_000},{'h ' * 150_000 if number else 'short'}\n")
    format_ = PromptFormat(byte_tokenizer(), max_length=64)
    table = open_token_table(folder / "rows.csv", format_, folder / "cache", on_bad_row="skip")
    assert len(table) == 1 and len(table.skipped) == 7
    assert format_.prediction_prompts(["word " * 400_000] * 40, 8)[0][:5] == list(b"word ")


def deep_facts(folder: Path) -> None:
    assert fact_share(["text"], ["[" * 1_000_000]) is None
    assert fact_share(["a text"], [json.dumps(["text", "tex", "", "x" * 10_000_000])]) == 0.25


ROWS = [
    Attack("rows of 2 million characters", long_rows, slow=True),
    Attack("facts of lists within lists, and long ones", deep_facts),
]
ATTACKS = [*CONFIGS, *TEXTS, *WEIGHTS, *CHECKPOINTS, *HUB, *ROWS]
