"""The runs that are killed: small ones of each script that have everything a run can have a state of."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from data.prompts import DEFAULT_TEMPLATE
from tests.conftest import tiny_gpt2, write_rows
from tests.faults.runs import Outcome, Run
from tests.small_kd_runs import make_kd_project, save_model
from tests.small_runs import changed, make_project, make_rows


@dataclass(frozen=True)
class Case:
    """A command. script: its name in `crash_child.MAINS`. output_option: what comes before the output folder.

    earlier: arguments of a run with other results that is in the output folder before.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    output_option: tuple[str, ...] = ("--set", "trainer_kwargs.output_dir={}")
    earlier: tuple[str, ...] | None = None

    def command(self, output_dir: Path) -> list[str]:
        return [*self.arguments, *(each.format(output_dir) for each in self.output_option)]

    def prepare(self, run: Run, output_dir: Path) -> None:
        """What is in the output folder before the run."""
        if self.earlier is not None:
            arguments = [*self.earlier, *(each.format(output_dir) for each in self.output_option)]
            finished(run("tests.faults.crash_child:script", name=self.script, arguments=arguments))


def finished(outcome: Outcome) -> Outcome:
    """Raises RuntimeError where a run that was not killed did not end well."""
    if outcome.code != 0:
        raise RuntimeError(f"exit code {outcome.code} of a run that was not killed:\n{outcome.output[-3000:]}")
    return outcome


def make_cases(folder: Path) -> dict[str, Case]:
    """Models, CSVs and configs in `folder`, and the commands on them by name."""
    train = training(folder / "train")
    made = (train, anew(train), divergence(folder, "divergence", {"kind": "hidden"}),
            divergence(folder, "top-k", {"kind": "top_k", "top_k": 8}), policy(folder / "policy"),
            validation(folder / "validate"))
    return {case.name: case for case in made}


def training(folder: Path) -> Case:
    """Dropout, accumulation, adaptive loss scaling, a row left out, a checkpoint after each step of which one stays."""
    folder.mkdir(parents=True)
    config = make_project(folder, rows=7, dropout=0.1)
    rows = make_rows(7)
    write_rows(folder / "train.csv", [*rows[:3], {**rows[0], "id": "empty", "article": ""}, *rows[3:]])
    return in_file(folder, "train", changed(
        config,
        trainer_kwargs={**EVENTFUL, "gradient_accumulation_steps": 2, "monitor_train": True,
                        "adaptive_loss_scaling": True, "loss_scaling_batch": 3},
        dataset_kwargs={"cache_dir": None, "on_bad_row": "skip"},
        callbacks_kwargs={"kwargs": {"patience": 5}},
    ))


def anew(train: Case) -> Case:
    """A run that does not go on from the one that is there, which is set aside."""
    return replace(
        train, name="anew", arguments=(*train.arguments, "--set", "trainer_kwargs.load_from_checkpoint=false"),
        earlier=(*train.arguments, "--set", "trainer_kwargs.seed=5"),
    )


def divergence(parent: Path, name: str, cache: dict) -> Case:
    """Distillation from a teacher whose outputs are kept on disk."""
    folder = parent / name
    folder.mkdir(parents=True)
    config = make_kd_project(folder, rows=6, dropout=0.1, kl_div="JS", teacher_cache=cache)
    return in_file(folder, name, changed(config, trainer_kwargs=EVENTFUL, dataset_kwargs={"cache_dir": None}))


def policy(folder: Path) -> Case:
    """Policy gradient on the student's own summaries; a checkpoint at the end of each epoch alone."""
    folder.mkdir(parents=True)
    config = make_kd_project(folder, rows=4, method="policy_gradient", penalty=True)
    return in_file(folder, "policy", changed(
        config, trainer_kwargs={**EVENTFUL, "n_batch_ckpt_save": None}, dataset_kwargs={"cache_dir": None},
    ))


EVENTFUL = {"epochs": 2, "n_batch_ckpt_save": 1, "keep_checkpoints": 1, "metrics": ["rouge"], "save_predictions": True,
            "precision": "float32"}


def in_file(folder: Path, name: str, config: dict) -> Case:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    script = "train_kd" if "distillation_kwargs" in config else "train"
    return Case(name, script, ("--config", str(path)))


def validation(folder: Path) -> Case:
    """Predictions over those of an earlier run with other settings."""
    folder.mkdir(parents=True)
    model = save_model(folder / "model", tiny_gpt2(seed=3, std=0.3, positions=320), DEFAULT_TEMPLATE)
    table = write_rows(folder / "news.csv", make_rows(8))
    arguments = ("--model_path", str(model), "--csv_path", str(table), "--device_id", "-1", "--precision", "float32",
                 "--batch_size", "2")
    return Case(
        "validate", "validate_model", (*arguments, "--max_generation_length", "8"), ("--output_dir", "{}"),
        (*arguments, "--max_generation_length", "3"),
    )
