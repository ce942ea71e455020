"""Fine-tune a language model on article/highlights CSVs, as config.json says."""

import sys

from utils.cli import run_command, training_parser
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import config_json, load_config

EXAMPLES = """\
examples:
  python train.py                                      the recipe in config.json: gpt2-medium on CNN/DailyMail
  python train.py --config demo/train_teacher.json     the demo: no hub, no GPU
  python train.py --set model_arch.lang_model=gpt2 --set trainer_kwargs.output_dir=runs/gpt2
  python train.py --print_config                       what would be run, with all defaults
  python train.py --find_batch_size                    the largest train_batch_size that fits into the GPU

The same command resumes a run that was stopped. A run writes everything into trainer_kwargs.output_dir;
the model is in model_checkpoints/best and model_checkpoints/last there. docs/config.md lists all keys.
"""


def main(arguments: list[str] | None = None) -> int:
    options = training_parser("train.py", __doc__, EXAMPLES, "config.json").parse_args(arguments)
    return run_command("train.py", lambda: train(options), options.debug)


def train(options) -> int:
    config = load_config(options.config, options.set, FineTuneConfig)
    if options.print_config:
        print(config_json(config), end="")
        return 0
    # torch and transformers take seconds to import: only once the config is valid.
    from utils.runs.build import build_fine_tuning
    from utils.runs.find_batch_size import find_batch_size
    from utils.runs.run import run_training

    return (find_batch_size if options.find_batch_size else run_training)(config, build_fine_tuning)


if __name__ == "__main__":
    sys.exit(main())
