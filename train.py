"""Fine-tune a language model on article/highlights CSVs, as config.json says."""

import sys

from data.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt("train.py")  # before the imports that take seconds

from data.console import put
from model.fine_tuning import FineTuning
from utils.command_line import run_command, training_parser
from utils.config import FineTuneConfig
from utils.config_files import config_json, load_config
from utils.datasets import Tables, make_prompt_format
from utils.devices import Place
from utils.find_batch_size import find_batch_size
from utils.run_folder import Start, load_model
from utils.run_log import RunLog
from utils.training_run import Parts, in_run_folder, set_up_model

EXAMPLES = """\
examples:
  python train.py                                      the recipe in config.json: gpt2-medium on CNN/DailyMail
  python train.py --config demo/train_teacher.json     the demo: no hub, no GPU
  python train.py --set model_arch.lang_model=gpt2 --set trainer_kwargs.output_dir=runs/gpt2
  python train.py --print_config                       what would be run, with all defaults
  python train.py --find_batch_size                    the largest train_batch_size that fits into the GPU

The same command goes on where an earlier one was stopped. A run makes everything in trainer_kwargs.output_dir;
the model is in model_checkpoints/best and model_checkpoints/last there. README.md lists all keys.
"""


def main(arguments: list[str] | None = None) -> int:
    options = training_parser("train.py", __doc__, EXAMPLES, "config.json").parse_args(arguments)
    return run_command("train.py", lambda: train(options), options.debug)


def train(options) -> int:
    config = load_config(options.config, options.set, FineTuneConfig)
    if options.print_config:
        put(config_json(config), end="")
        return 0
    return (find_batch_size if options.find_batch_size else in_run_folder)(config, build)


def build(place: Place, config: FineTuneConfig, log: RunLog, start: Start, keep: bool = True) -> Parts:
    """The parts of a run. keep: nothing is kept here but tokenised rows, so it changes nothing."""
    language_model = set_up_model(load_model(config, start), config, place, log, start)
    parameters = language_model.parameter_count() / 1e6
    log.say(f"model: {start.folder or config.model_arch.lang_model}, {parameters:.2f} M parameters")
    prompt_format = make_prompt_format(config, language_model)
    tables = Tables(config, prompt_format, place, log)
    train_table = tables.open(config.dataset_kwargs.train_dataset)
    return Parts(FineTuning(language_model), prompt_format, tables, train_table, {})


if __name__ == "__main__":
    sys.exit(main())
