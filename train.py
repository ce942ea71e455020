"""Fine-tune a language model on article/highlights CSVs, as config.json says."""

import sys
from pathlib import Path

from model.fine_tuning import FineTuning
from utils.checkpoint import Checkpoints
from utils.command_line import run_command, training_parser
from utils.config import FineTuneConfig
from utils.config_files import config_json, load_config, warnings_of
from utils.datasets import Tables, make_prompt_format, make_validation
from utils.devices import Place, find_place, launch_group
from utils.optimization import build_optimizer
from utils.random_state import seed_everything
from utils.run_folder import (
    check_resumable,
    claimed,
    find_start,
    how_to_go_on,
    identity,
    load_model,
    open_run_folder,
    restore_best,
)
from utils.run_log import RunLog
from utils.signals import StopRequest
from utils.trainer import Trainer

EXAMPLES = """\
examples:
  python train.py                                      the recipe in config.json: gpt2-medium on CNN/DailyMail
  python train.py --config demo/train_teacher.json     the demo: no hub, no GPU
  python train.py --set model_arch.lang_model=gpt2 --set trainer_kwargs.output_dir=runs/gpt2
  python train.py --print_config                       what would be run, with all defaults

The same command goes on where an earlier one was stopped. A run makes everything in trainer_kwargs.output_dir;
the model is in model_checkpoints/best and model_checkpoints/last there. README.md lists all keys.
"""


def main(arguments: list[str] | None = None) -> int:
    options = training_parser("train.py", __doc__, EXAMPLES, "config.json").parse_args(arguments)
    return run_command("train.py", lambda: train(options), options.debug)


def train(options) -> int:
    config = load_config(options.config, options.set, FineTuneConfig)
    if options.print_config:
        print(config_json(config), end="")
        return 0
    arch, trainer_kwargs = config.model_arch, config.trainer_kwargs
    launch_group(trainer_kwargs.device, trainer_kwargs.multi_gpu, trainer_kwargs.multi_gpu_ids)
    place = find_place(
        trainer_kwargs.device, arch.gpu_device_id, trainer_kwargs.precision, trainer_kwargs.multi_gpu,
        trainer_kwargs.multi_gpu_ids,
    )
    with claimed(Path(trainer_kwargs.output_dir), place.is_main), StopRequest(how_to_go_on(config)) as stop:
        return train_at(place, config, stop)


def train_at(place: Place, config: FineTuneConfig, stop: StopRequest) -> int:
    """Build the parts, in the run folder that this process holds, and start them."""
    arch, trainer_kwargs, output_dir = config.model_arch, config.trainer_kwargs, Path(config.trainer_kwargs.output_dir)
    log = RunLog(output_dir, place.is_main)
    start = place.from_main(find_start(config) if place.is_main else None)
    for line in (*warnings_of(config), *place.notices, place.describe(), *start.notices):
        log.say(line)

    seed_everything(trainer_kwargs.seed)
    language_model = load_model(config, start).to(place.device)
    language_model.check_family()
    log.say(f"model: {start.folder or arch.lang_model}, {language_model.parameter_count() / 1e6:.2f} M parameters")
    prompt_format = make_prompt_format(config, language_model)
    tables = Tables(config, prompt_format, place, log)
    train_table = tables.open(config.dataset_kwargs.train_dataset)

    objective = FineTuning(language_model)
    if trainer_kwargs.compile:
        language_model.model.base_model.compile(dynamic=True)
    optimizer_kwargs = config.optimizer_kwargs
    optimizer = build_optimizer(
        objective, optimizer_kwargs.type, optimizer_kwargs.kwargs, optimizer_kwargs.lm_lr, optimizer_kwargs.decay_all
    )
    validation = make_validation(config, objective, prompt_format, tables, place, log)
    checkpoints = Checkpoints(output_dir / "model_checkpoints", start.run_id, trainer_kwargs.keep_checkpoints)
    trainer = Trainer(
        objective, language_model, optimizer, config, train_table, validation, place, log, checkpoints, stop
    )
    if start.folder is not None:
        check_resumable(identity(config, train_table), start.state)
        for line in trainer.restore(start.state, start.tensors):
            log.say(line)
    if place.is_main:
        restore_best(checkpoints, trainer.state.best_step)
    if ended_by := trainer.what_ended():
        log.say(f"already finished at step {trainer.state.step}: {output_dir}; to go on, raise {ended_by}; to start "
                "anew, set trainer_kwargs.load_from_checkpoint to false")
        return 0
    if place.is_main:
        for line in open_run_folder(config, start):
            log.say(line)
        restore_best(checkpoints, trainer.state.best_step)
        tables.write_skipped(output_dir)
    place.wait_for_all()
    log.open(trainer.state.step, trainer.state.evaluation_pending)
    try:
        trainer.fit()
    finally:
        log.close()
    log.say(f"finished at step {trainer.state.step}: {output_dir / 'model_checkpoints' / 'last'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
