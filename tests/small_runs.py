"""Small training runs for the tests: a tiny byte-level GPT-2 on rows of very different lengths."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from tests.conftest import ROOT, byte_tokenizer, tiny_gpt2, write_rows

WORDS = "storm court mayor rain harbour trial vote bridge wind fire town judge".split()


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Articles of 2 to 30 words with highlights of 1 to 6."""
    rng = random.Random(seed)
    return [
        {"id": f"row-{number}", "article": " ".join(rng.choices(WORDS, k=rng.choice([2, 3, 10, 30]))),
         "highlights": " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))}
        for number in range(count)
    ]


def make_project(folder: Path, rows: int = 40, dropout: float = 0.0, width: int = 16, layers: int = 1) -> dict:
    """A model folder and CSVs in `folder`, and the config of a run on them (a dict to change and write)."""
    model = tiny_gpt2(width=width, layers=layers, dropout=dropout, positions=320)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.csv", make_rows(rows))
    write_rows(folder / "validation.csv", make_rows(6, seed=1))
    return {
        "model_arch": {"lang_model": str(folder / "model"), "generation_kwargs": {"max_generation_length": 8}},
        "trainer_kwargs": {"output_dir": str(folder / "run"), "metrics": [], "device": "cpu", "log_every": 1,
                           "precision": "float32"},
        "optimizer_kwargs": {"lm_lr": 0.01},
        "lr_scheduler_kwargs": {},
        "callbacks_kwargs": {"kwargs": {}},
        "dataset_kwargs": {"data_dir": str(folder), "train_batch_size": 2, "cache_dir": str(folder / "cache")},
    }


def changed(config: dict, **sections: dict) -> dict:
    """The config with some keys of some sections changed."""
    return {**config, **{section: {**config[section], **values} for section, values in sections.items()}}


def write_config(folder: Path, config: dict) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def run(folder: Path, config: dict) -> int:
    """`train.py --config`, in this process; the exit code."""
    return train.main(["--config", str(write_config(folder, config))])


RANKS = """
import os, runpy, socket, sys
import utils.runs.build, utils.runs.run  # once, before the processes are forked

script, config, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
sys.argv = [script, "--config", config]
children = []
for rank in range(processes):
    children.append(os.fork())
    if not children[-1]:
        os.environ.update(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        runpy.run_path(script, run_name="__main__")
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def launch(script: str, folder: Path, config: dict, processes: int, torchrun: bool = False) -> str:
    """A training script in a group of processes (gloo); what it prints on stderr.

    torchrun: started by torch's launcher, which imports the libraries once per process and takes as much longer.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, "--config"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = str(write_config(folder, config))
    command = [*launcher, path] if torchrun else ["-c", RANKS, script, path, str(processes)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def error_line(capsys) -> str:
    """The one error of a script."""
    [line] = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if ".py: error: " in line]
    return line


def metrics(output_dir: Path, split: str = "train") -> list[dict]:
    """Lines of one split without their speed, which no two runs share."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if key != "tokens_per_second"} for line in lines if line["split"] == split]


def assert_equal_weights(left: dict, right: dict) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def largest_difference(left: dict, right: dict) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)
