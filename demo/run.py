"""The demo's steps: news, a teacher, students with and without it, predictions, a table. Started by ./demo.sh.

Importing torch and transformers takes longer than some of the steps. So the libraries are imported once, and each step
is a forked child that calls a script's `main`, two at a time. The equivalent command is printed, to be copied. This
process computes nothing and touches no GPU: neither thread pools nor a CUDA context survive a fork.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

PARALLEL = 2  # steps at a time: models this small gain little from a second core
LIBRARIES = ("train", "train_kd", "validate_model", "utils.runs.build", "utils.runs.run", "utils.runs.find_batch_size",
             "utils.runs.score_table", "utils.compare", "data.demo_news", "transformers.models.gpt2.modeling_gpt2")
# --full: optimizer steps by config; the default demo takes those of the config files.
FULL_STEPS = {"train_teacher_short": 450, "train_teacher": 700, "train_student_short": 300, "train_student": 450,
              "continue_student": 150, "distil_student": 150, "on_policy": 150, "policy_gradient": 150}
EQUAL_TIME_STEPS = 600  # of fine-tuning: they take as long as policy gradient's 150 (benchmarks/RESULTS.md)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# What trains the student further: row of the table, folder, config, the tables that have it (of the default demo, of
# --full with noisy labels, with clean ones), changes to the config. Near equality JS is about a quarter of KL.
METHODS = [
    ("fine-tuning", "fine_tuning", "continue_student", "default noisy clean", {}),
    ("forward KL", "forward", "distil_student", "noisy clean",
     {"distillation_kwargs.kl_div": "forward", "distillation_kwargs.kd_weight": 0.5}),
    ("reverse KL", "reverse", "distil_student", "noisy clean",
     {"distillation_kwargs.kl_div": "reverse", "distillation_kwargs.kd_weight": 0.5}),
    ("JS", "JS", "distil_student", "default noisy clean",
     {"distillation_kwargs.kl_div": "JS", "distillation_kwargs.kd_weight": 0.9}),
    ("on-policy JS", "on_policy", "on_policy", "noisy", {}),
    ("policy gradient", "policy_gradient", "policy_gradient", "noisy", {"distillation_kwargs.penalty": False}),
    ("PG + penalties", "policy_gradient_penalties", "policy_gradient", "default noisy", {}),
    ("longer tuning", "fine_tuning_longer", "continue_student", "noisy",
     {"trainer_kwargs.epochs": 20, "trainer_kwargs.max_steps": EQUAL_TIME_STEPS}),
]


class Step(NamedTuple):
    """command: what one would type after `python`. after: names of the steps that must be finished before it.
    result, source: the step is skipped if `result` exists and is newer than `source` (if any)."""

    name: str
    command: list[str]
    after: tuple[str, ...] = ()
    result: Path | None = None
    source: Path | None = None

    def is_done(self) -> bool:
        if self.result is None or not self.result.exists():
            return False
        return self.source is None or self.result.stat().st_mtime > self.source.stat().st_mtime


# -- what is run ---------------------------------------------------------------------------------------------------


class Plan:
    """The steps of the demo, in order of preference, and the tables to print at the end: (title, command).

    max_steps: optimizer steps of every training; 0: as the configs say.
    """

    def __init__(self, full: bool, max_steps: int = 0):
        self.full, self.max_steps, self.root = full, max_steps, Path("runs/demo/full" if full else "runs/demo")
        self.steps = [Step("news", ["-m", "data.demo_news", "--output_dir", "data/demo"])]
        self.tables: list[tuple[str, list[str]]] = []
        self.train("teacher_short", "train_teacher_short", "teacher_short.csv")
        self.train("teacher", "train_teacher", "teacher.csv", "teacher_short")
        for labels in ("noisy", "clean") if full else ("noisy",):
            self.add_students(labels)
        self.predict("teacher")
        self.predict("lead-3")

    def add_students(self, labels: str) -> None:
        """A student, and each method from its weights on. labels: "noisy" or "clean" highlights."""
        folder, ending = f"{labels}/" if self.full else "", "_noisy.csv" if labels == "noisy" else ".csv"
        student = f"{folder}student"
        self.train(f"{student}_short", "train_student_short", f"student_short{ending}")
        self.train(student, "train_student", f"student{ending}", f"{student}_short")
        rows = {}
        for title, name, config, tables, settings in METHODS:
            if (labels if self.full else "default") in tables.split():
                rows[title] = folder + name
                self.train(folder + name, config, f"student{ending}", student, settings)
        for name in rows.values():
            self.predict(name)
        rows = {"lead-3": "lead-3", "teacher": "teacher", **rows}
        self.tables.append((
            f"students trained on {labels} highlights (the teacher on clean ones)",
            ["-m", "utils.compare", "--teacher", "teacher", "--baseline", "fine-tuning",
             *(f"{title}={self.root}/predictions/{name}" for title, name in rows.items())],
        ))

    def train(self, name: str, config: str, rows: str, start: str | None = None, settings: dict | None = None) -> None:
        """A training that writes to `root/name`. Settings that the config has already are left out of the command.

        start: the training whose weights it starts from; None: random weights.
        """
        own = json.loads(Path(f"demo/{config}.json").read_text(encoding="utf-8"))
        script, after, models = "train.py", ("news",), {}
        if "distillation_kwargs" in own:
            script, after = "train_kd.py", (start, "teacher")
            models = {"trainer_kwargs.student_ckpt_path": self.last(start),
                      "trainer_kwargs.teacher_ckpt_path": self.last("teacher")}
        elif start:
            after, models = (start,), {"model_arch.lang_model": self.last(start)}
        settings = {"trainer_kwargs.output_dir": f"{self.root}/{name}", "dataset_kwargs.train_dataset": rows,
                    **({"trainer_kwargs.max_steps": FULL_STEPS[config]} if self.full else {}), **models,
                    **(settings or {}), **({"trainer_kwargs.max_steps": self.max_steps} if self.max_steps else {})}
        command = [script, "--config", f"demo/{config}.json"]
        for key, value in settings.items():
            section, option = key.split(".")
            if own[section].get(option) != value:
                command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        self.steps.append(Step(name, command, after))

    def predict(self, name: str) -> None:
        """Highlights of the test articles by a trained model, or by lead-3, and their scores."""
        lead, folder = name == "lead-3", f"{self.root}/predictions/{name}"
        model = name if lead else self.last(name)
        command = ["validate_model.py", "--config", "demo/validate.json", "--model_path", model, "--output_dir", folder]
        self.steps.append(Step(f"predictions/{name}", command, ("news",) if lead else (name,),
                               Path(folder, "scores.json"), None if lead else Path(model, "trainer_state/state.json")))

    def last(self, name: str) -> str:
        return f"{self.root}/{name}/model_checkpoints/last"


# -- how it is run -------------------------------------------------------------------------------------------------


def call_main(command: list[str]) -> int:
    """What `python COMMAND` does, in this process. Returns the exit code."""
    name, *arguments = command[1:] if command[0] == "-m" else command
    return importlib.import_module(name.removesuffix(".py")).main(arguments)


def run_child(command: list[str], log: Path) -> None:
    """The body of a child: the command, with its output in the log."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which stops every child once
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    sys.exit(call_main(command))


class Runner:
    """Runs steps, PARALLEL at a time, each as soon as the steps before it are finished."""

    def __init__(self, steps: list[Step], logs: Path):
        # macOS's own libraries do not survive a fork: there each child imports everything by itself.
        self.context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
        self.waiting, self.logs = list(steps), logs
        self.running: dict[str, tuple[multiprocessing.Process, float]] = {}  # with the start time
        self.finished: set[str] = set()
        self.started = self.shown = time.monotonic()

    def run(self) -> int:
        """0, or the exit code of the step that failed. However this ends, no child is left."""
        try:
            while self.waiting or self.running:
                self.start_ready()
                wait([process.sentinel for process, _ in self.running.values()], timeout=1)
                self.show_progress()
                for name, (process, started) in list(self.running.items()):
                    if process.exitcode is None:
                        continue
                    del self.running[name]
                    if code := process.exitcode:
                        code = code if code > 0 else 128 - code
                        self.say(f"failed {name} with exit code {code}; the end of {self.log(name)}:")
                        print("\n".join(self.lines(name)[-15:]), file=sys.stderr)
                        return code
                    self.finished.add(name)
                    result = self.lines(name)[-1].partition(";")[0]
                    self.say(f"done   {name} ({time.monotonic() - started:.0f} s): {result}")
            return 0
        finally:
            if self.running:
                self.say(f"stopping {', '.join(self.running)}")
            for process, _ in self.running.values():
                process.terminate()  # a training writes a checkpoint first
            for process, _ in self.running.values():
                process.join()

    def start_ready(self) -> None:
        for step in list(self.waiting):
            if len(self.running) == PARALLEL or not self.finished.issuperset(step.after):
                continue
            self.waiting.remove(step)
            if step.is_done():
                self.finished.add(step.name)
                self.say(f"done   {step.name}: already there")
                continue
            self.say(f"start  {step.name}: python {shlex.join(step.command)}")
            self.log(step.name).parent.mkdir(parents=True, exist_ok=True)
            process = self.context.Process(target=run_child, args=(step.command, self.log(step.name)))
            process.start()
            self.running[step.name] = process, time.monotonic()

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def lines(self, name: str) -> list[str]:
        """The step's log, of a progress bar only the last state."""
        text = self.log(name).read_bytes().decode("utf-8", "replace") if self.log(name).exists() else ""
        return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n") if line.strip()] or [""]

    def say(self, line: str) -> None:
        seconds = int(time.monotonic() - self.started)
        print(f"[{seconds // 60}:{seconds % 60:02}] {line}", flush=True)

    def show_progress(self) -> None:
        """How far the running steps are, every 15 seconds."""
        if self.running and time.monotonic() - self.shown > 15:
            self.shown = time.monotonic()
            bars = {name: re.sub(r"\|.*\|", "", self.lines(name)[-1]) for name in self.running}
            self.say("       " + "   ".join(f"{name}: {bar[:60]}" for name, bar in bars.items()))


def stop(number: int, frame) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser("./demo.sh", description="A teacher, students with and without it, and a table.")
    parser.add_argument("--full", action="store_true", help="longer trainings, all methods, noisy and clean labels")
    options = parser.parse_args()
    plan = Plan(options.full, int(os.environ.get("DEMO_STEPS") or 0))
    for number in SIGNALS:
        signal.signal(number, stop)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // PARALLEL)))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's pool would start at its import
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to look for a GPU must not start CUDA before the fork
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    print(f"importing torch and transformers (output of the steps: {plan.root}/logs)", flush=True)
    for name in LIBRARIES:
        importlib.import_module(name)
    if code := Runner(plan.steps, plan.root / "logs").run():
        return code
    print("\nresults on 200 test articles, which no model was trained on")
    for title, command in plan.tables:
        print(f"\n{title}\n", flush=True)
        if code := call_main(command):
            return code
    if options.full:
        print(f"\nlonger tuning: {EQUAL_TIME_STEPS} steps, about as long a time as policy gradient's 150 with rollouts")
    seconds = int(time.monotonic() - started)
    print(f"\ntook {seconds // 60} min {seconds % 60} s, without the installation")
    print(f"models:       {plan.root}/NAME/model_checkpoints/last (folders for AutoModelForCausalLM.from_pretrained)")
    print(f"predictions:  {plan.root}/predictions/NAME/predictions.json")
    print("curves:       .venv/bin/tensorboard --logdir runs/demo")
    print("configs:      demo/*.json: copy one and change it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
