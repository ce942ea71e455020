"""The runs that are disturbed: a small one of each script with everything that a run can have a state of."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import tiny_gpt2, write_rows
from tests.faults.results import Results, differences, read_results
from tests.faults.runs import Outcome, Run
from tests.score_folders import write_evaluation
from tests.small_kd_runs import make_kd_project, save_model
from tests.small_runs import changed, make_project, make_rows

EVENTFUL = {"epochs": 2, "n_batch_ckpt_save": 1, "keep_checkpoints": 2, "metrics": ["rouge"], "save_predictions": True,
            "precision": "float32"}
VALIDATE = ["--model_path", "model", "--csv_path", "news.csv", "--output_dir", "run", "--device_id", "-1",
            "--precision", "float32", "--batch_size", "2", "--max_generation_length"]


@dataclass
class Case:
    """A command that writes into the folder `run` of its working folder. earlier: arguments of a run with other
    results that is in there before. expected: what an undisturbed run leaves; seconds: its processor time."""

    name: str
    script: str
    arguments: list[str]
    start: Path
    place: Path
    earlier: list[str] | None = None
    expected: Results | None = None
    seconds: float = 0.0

    def restart(self) -> None:
        """The working folder as it is before the run."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place, symlinks=True)

    def run(self, run: Run, arguments: list[str] | None = None, **options) -> Outcome:
        return run(self.script, self.arguments if arguments is None else arguments, self.place, **options)

    def prepare(self, run: Run) -> None:
        """Two undisturbed runs. Raises RuntimeError if they fail, or differ in more than times and names."""
        if self.expected is not None:
            return
        self.restart()
        if self.earlier is not None:
            finished(self.run(run, self.earlier))
            shutil.rmtree(self.start)
            shutil.copytree(self.place, self.start, symlinks=True)
        found = []
        for _ in range(2):
            self.restart()
            outcome = finished(self.run(run))
            found.append(read_results(self.place / "run"))
        if lines := differences(*found):
            raise RuntimeError(f"{self.name}: two undisturbed runs differ: {lines[:5]}")
        self.expected, self.seconds = found[0], outcome.seconds

    def problems(self, outcome: Outcome) -> list[str]:
        """Of a run that must bring what an undisturbed one brings."""
        if outcome.code != 0:
            return [f"exit code {outcome.code}: {outcome.errors[-500:]}"]
        return differences(self.expected, read_results(self.place / "run"))


def finished(outcome: Outcome) -> Outcome:
    if outcome.code != 0:
        raise RuntimeError(f"exit code {outcome.code} of an undisturbed run:\n{outcome.errors[-3000:]}")
    return outcome


def make_cases(folder: Path) -> dict[str, Case]:
    """The cases by name, with their models, tables and configs below `folder`."""
    folder = folder.resolve()
    made = (training(folder, "train"), training(folder, "train again"), divergence(folder, "hidden cache", "hidden"),
            divergence(folder, "top-k cache", "top_k"), policy(folder), validation(folder))
    return {case.name: case for case in made}


def in_folder(folder: Path, name: str, script: str, config: dict | None, arguments: tuple = (), earlier=None) -> Case:
    """config: its paths below `folder / name` are made relative, so that the folder can be copied."""
    start = folder / name
    if config is not None:
        (start / "config.json").write_text(json.dumps(config).replace(f"{start}/", "").replace(str(start), "."))
        arguments = ("--config", "config.json", *arguments)
        earlier = earlier and [*arguments, *earlier]
    return Case(name, script, list(arguments), start, folder / f"{name}-place", earlier)


def training(folder: Path, name: str) -> Case:
    """Dropout, accumulation, adaptive loss scaling, a skipped row, a token cache, a checkpoint after each step; "again"
    with `load_from_checkpoint` false over another run."""
    start = folder / name
    start.mkdir(parents=True)
    config = make_project(start, rows=7, dropout=0.1)
    rows = make_rows(7)
    write_rows(start / "train.csv", [*rows[:3], {**rows[0], "id": "empty", "article": ""}, *rows[3:]])
    config = changed(
        config,
        trainer_kwargs={**EVENTFUL, "gradient_accumulation_steps": 2, "monitor_train": True,
                        "adaptive_loss_scaling": True, "loss_scaling_batch": 3},
        dataset_kwargs={"cache_dir": None, "on_bad_row": "skip"},
        callbacks_kwargs={"kwargs": {"patience": 5}},
    )
    if name == "train":
        return in_folder(folder, name, "train.py", config)
    return in_folder(folder, name, "train.py", config, ("--set", "trainer_kwargs.load_from_checkpoint=false"),
                     ["--set", "trainer_kwargs.seed=5"])


def divergence(folder: Path, name: str, kind: str) -> Case:
    """Distillation from a teacher whose outputs are kept on disk."""
    (folder / name).mkdir(parents=True)
    cache = {"kind": kind, **({"top_k": 8} if kind == "top_k" else {})}
    config = make_kd_project(folder / name, rows=6, dropout=0.1, kl_div="JS", teacher_cache=cache)
    config = changed(config, trainer_kwargs=EVENTFUL, dataset_kwargs={"cache_dir": None})
    return in_folder(folder, name, "train_kd.py", config)


def policy(folder: Path) -> Case:
    """Policy gradient on the student's own summaries; a checkpoint only after each epoch."""
    (folder / "policy").mkdir(parents=True)
    config = make_kd_project(folder / "policy", rows=4, method="policy_gradient", penalty=True)
    config = changed(config, trainer_kwargs={**EVENTFUL, "n_batch_ckpt_save": None},
                     dataset_kwargs={"cache_dir": None})
    return in_folder(folder, "policy", "train_kd.py", config)


def validation(folder: Path) -> Case:
    """Predictions over those of an earlier run with other settings."""
    start = folder / "validate"
    start.mkdir(parents=True)
    save_model(start / "model", tiny_gpt2(seed=3, std=0.3, positions=320), "{article}\nTL;DR:")
    write_rows(start / "news.csv", make_rows(8))
    return in_folder(folder, "validate", "validate_model.py", None, (*VALIDATE, "8"), [*VALIDATE, "3"])


def tools(folder: Path) -> dict[str, Case]:
    """The other programs that write, into a folder with an earlier result or without one."""
    folder = folder.resolve()
    for name in ("demo", "tables", "comparison"):
        (folder / name).mkdir(parents=True)
    write_rows(folder / "tables/news.csv", make_rows(12))
    for name, scores in (("one", [0.1, 0.2, 0.3]), ("two", [0.2, 0.3, 0.5])):
        write_evaluation(folder / "comparison" / name, scores)
    (folder / "comparison/run").mkdir()
    made = (
        in_folder(folder, "demo", "data.demo_news", None,
                  ("--max_rows", "4", "--vocab_size", "300", "--output_dir", "run")),
        in_folder(folder, "tables", "data.cnn_dailymail", None,
                  ("--from_csv", "news.csv", "--fraction", "0.5", "--output_dir", "run")),
        in_folder(folder, "comparison", "utils.compare", None,
                  ("one", "two", "--baseline", "one", "--format", "csv", "--output", "run/table.csv")),
    )
    return {case.name: case for case in made}
