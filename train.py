"""Fine-tune a language model on article/highlights CSVs, as config.json says."""

import sys
from pathlib import Path

from model.fine_tuning import FineTuning
from model.language_model import LanguageModel
from model.loading import load_language_model
from utils.checkpoint import Checkpoints
from utils.command_line import run_command, training_parser
from utils.config import FineTuneConfig
from utils.config_files import config_json, load_config, warnings_of
from utils.datasets import Tables, evaluation_sets, make_prompt_format
from utils.devices import find_place, launch_group
from utils.evaluation import Generation
from utils.optimization import build_optimizer
from utils.random_state import seed_everything
from utils.run_folder import Start, check_resumable, find_start, open_run_folder
from utils.run_log import RunLog
from utils.signals import StopRequest
from utils.trainer import Trainer
from utils.validation import Validation

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
    output_dir = Path(trainer_kwargs.output_dir)
    log = RunLog(output_dir, place.is_main)
    start = place.from_main(find_start(config) if place.is_main else None)
    for line in (*warnings_of(config), *place.notices, place.describe(), *start.notices):
        log.say(line)

    seed_everything(trainer_kwargs.seed)
    language_model = load_model(config, start).to(place.device)
    language_model.check_family()
    log.say(f"model: {arch.lang_model}, {language_model.parameter_count() / 1e6:.2f} M parameters")
    prompt_format = make_prompt_format(config, language_model)
    tables = Tables(config, prompt_format, place, log)
    train_table = tables.open(config.dataset_kwargs.train_dataset)
    sets = evaluation_sets(config, tables)

    objective = FineTuning(language_model)
    if trainer_kwargs.compile:
        language_model.model.base_model.compile(dynamic=True)
    optimizer_kwargs, decoding = config.optimizer_kwargs, arch.generation_kwargs
    optimizer = build_optimizer(
        objective, optimizer_kwargs.type, optimizer_kwargs.kwargs, optimizer_kwargs.lm_lr, optimizer_kwargs.decay_all
    )
    generation = Generation(
        decoding.max_generation_length, decoding.num_beams, decoding.early_stopping,
        config.dataset_kwargs.val_batch_size,
    )
    if any(each.articles for each in sets):
        prompt_format.prediction_prompts([], generation.max_new_tokens)  # refuses a length that leaves no room
    validation = Validation(
        objective, prompt_format, sets, generation, place, log, output_dir, trainer_kwargs.save_predictions
    )
    checkpoints = Checkpoints(output_dir / "model_checkpoints", start.run_id, trainer_kwargs.keep_checkpoints)
    with StopRequest() as stop:
        trainer = Trainer(
            objective, language_model, optimizer, config, train_table, validation, place, log, checkpoints, stop
        )
        if start.folder is not None:
            check_resumable(trainer.identity(), start.state)
            for line in trainer.restore(start.state, start.tensors):
                log.say(line)
            if trainer.finished():
                log.say(f"already finished at step {trainer.state.step}: {output_dir}; raise trainer_kwargs.epochs to "
                        "go on, or set load_from_checkpoint to false to start anew")
                return 0
        if place.is_main:
            for line in open_run_folder(config, start):
                log.say(line)
            tables.write_skipped(output_dir)
        place.wait_for_all()
        log.open(trainer.state.step, trainer.state.evaluation_pending)
        try:
            trainer.fit()
        finally:
            log.close()
    log.say(f"finished at step {trainer.state.step}: {output_dir / 'model_checkpoints' / 'last'}")
    return 0


def load_model(config: FineTuneConfig, start: Start) -> LanguageModel:
    """The checkpoint's model where one is resumed, else what model_arch asks for."""
    arch = config.model_arch
    if start.folder is not None:
        return load_language_model(str(start.folder), dropout=arch.dropout)
    return load_language_model(
        arch.lang_model, tokenizer=arch.tokenizer, from_scratch=arch.from_scratch, architecture=arch.architecture,
        dropout=arch.dropout,
    )


if __name__ == "__main__":
    sys.exit(main())
