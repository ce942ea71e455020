"""The programs that write, each with a small input: what they are run with on failing disks."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from data import demo_news
from data.prompts import DEFAULT_TEMPLATE
from tests.conftest import tiny_gpt2, write_rows
from tests.faults.runs import Run
from tests.score_folders import write_evaluation
from tests.small_kd_runs import make_kd_project, save_model
from tests.small_runs import changed, make_project, make_rows

# What no two runs share, or what a run that was disturbed may leave.
PASSING = re.compile(r"^out/(tensorboard(/|$)|token_cache|teacher_cache|run\.lock|earlier-run)|^$")
TRAINING = {"epochs": 2, "n_batch_ckpt_save": 1, "keep_checkpoints": 2, "metrics": ["rouge"], "save_predictions": True,
            "precision": "float32", "monitor_train": True}


@dataclass(frozen=True)
class Case:
    """program: its name in `disk_child.MAINS`. output: how the arguments name the output. trains: has checkpoints.

    earlier: a folder whose content is in the output folder before. passing: names of what is not compared.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    output: tuple[str, ...] = ("--output_dir", "{}")
    trains: bool = False
    earlier: Path | None = None
    passing: re.Pattern = PASSING

    def command(self, output: Path) -> list[str]:
        return [*self.arguments, *(each.format(output) for each in self.output)]

    def prepare(self, run: Run, place: Path) -> None:
        """The folder that stands for the disk."""
        place.mkdir(parents=True)
        if self.earlier is not None:
            shutil.copytree(self.earlier, place / "out", symlinks=True)


def make_cases(folder: Path) -> dict[str, Case]:
    """Inputs in `folder`, and the programs by name."""
    made = (training(folder / "train"), distillation(folder / "hidden", "hidden", {"kind": "hidden"}),
            distillation(folder / "top-k", "top-k", {"kind": "top_k", "top_k": 8}), validation(folder / "validate"),
            demo(), tables(folder / "cnn"), comparison(folder / "compare", "csv"),
            comparison(folder / "compare-json", "json"))
    return {case.name: case for case in made}


def training(folder: Path) -> Case:
    """Checkpoints, log, curves, predictions, scores, a row left out, a token cache in the run folder."""
    folder.mkdir(parents=True)
    config = make_project(folder, rows=4, dropout=0.1)
    rows = make_rows(4)
    write_rows(folder / "train.csv", [*rows[:3], {**rows[0], "id": "empty", "article": ""}, *rows[3:]])
    return in_file(folder, "train", changed(
        config, trainer_kwargs=TRAINING, dataset_kwargs={"cache_dir": None, "on_bad_row": "skip"},
    ))


def distillation(folder: Path, name: str, cache: dict) -> Case:
    """With a teacher cache in the run folder."""
    folder.mkdir(parents=True)
    config = make_kd_project(folder, rows=4, kl_div="JS", teacher_cache=cache)
    kwargs = {**TRAINING, "metrics": [], "save_predictions": False}
    return in_file(folder, name, changed(config, trainer_kwargs=kwargs, dataset_kwargs={"cache_dir": None}))


def in_file(folder: Path, name: str, config: dict) -> Case:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    program = "train_kd" if "distillation_kwargs" in config else "train"
    return Case(name, program, ("--config", str(path)), ("--set", "trainer_kwargs.output_dir={}"), trains=True)


def validation(folder: Path) -> Case:
    """Over the results of an earlier one."""
    folder.mkdir(parents=True)
    model = save_model(folder / "model", tiny_gpt2(seed=3, std=0.3, positions=320), DEFAULT_TEMPLATE)
    table = write_rows(folder / "news.csv", make_rows(4))
    earlier = write_evaluation(folder / "earlier", [0.25, 0.5])
    arguments = ("--model_path", str(model), "--csv_path", str(table), "--device_id", "-1", "--precision", "float32",
                 "--max_generation_length", "4")
    return Case("validate", "validate_model", arguments, earlier=earlier)


def demo() -> Case:
    rows = [part for name in demo_news.SIZES for part in (f"--{name}_rows", "4")]
    return Case("demo", "demo_news", (*rows, "--vocab_size", "300"))


def tables(folder: Path) -> Case:
    """Local CSVs."""
    folder.mkdir(parents=True)
    table = write_rows(folder / "news.csv", make_rows(12))
    return Case("cnn", "cnn_dailymail", ("--from_csv", str(table), "--fraction", "0.5", "--overwrite"))


def comparison(folder: Path, form: str) -> Case:
    """Two evaluations, and a file for the table."""
    one, two = (str(write_evaluation(folder / name, scores)) for name, scores in
                (("one", [0.1, 0.2, 0.3]), ("two", [0.2, 0.3, 0.5])))
    arguments = (one, two, "--baseline", "one", "--format", form)
    return Case(f"compare-{form}", "compare", arguments, ("--output", "{}"))
