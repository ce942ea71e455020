"""Small models and real data for the tests."""

import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from model.language_model import LanguageModel
from utils.cli import quiet_libraries

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
END = 256  # id of <|endoftext|> in the byte tokenizer

quiet_libraries()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer without merges: token id = byte value, 256 = <|endoftext|>."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = {sign: byte for byte, sign in signs.items()} | {"<|endoftext|>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )


def tiny_gpt2(seed: int = 1, width: int = 16, layers: int = 1, positions: int = 128, dropout: float = 0.0,
              std: float = 0.02) -> GPT2LMHeadModel:
    """A random GPT-2 over the byte tokenizer's 257 tokens."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=257, n_positions=positions, n_embd=width, n_layer=layers, n_head=2, bos_token_id=END,
        eos_token_id=END, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=std,
    ))


def tiny_language_model(**shape) -> LanguageModel:
    return LanguageModel(tiny_gpt2(**shape), byte_tokenizer())


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A CSV file of the rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory) -> Iterator[None]:
    """What is put into the system's temporary folder, by programs started here too, is cleared with pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("system")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture
def one_thread():
    """Sums of float32 in one order, for what must be equal bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared() -> Path:
    """The folder with real articles and GPT-2's vocabulary, which is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real articles are not here (folder shared/data beside the project)")
    return SHARED
