"""Distil a teacher into a smaller student on article/highlights CSVs, as config_kd.json says."""

import sys

from utils.cli import run_command, training_parser
from utils.config.distill import DistillConfig, without_dropout
from utils.config.load import config_json, load_config

EXAMPLES = """\
examples:
  python train_kd.py                                       the recipe in config_kd.json: gpt2-medium into gpt2
  python train_kd.py --config demo/distil_student.json     the demo (after ./demo.sh): no hub, no GPU
  python train_kd.py --set distillation_kwargs.kl_div=JS --set trainer_kwargs.output_dir=runs/js
  python train_kd.py --set 'distillation_kwargs.teacher_cache={"kind": "hidden"}'
                                                           compute the teacher's outputs once, for several epochs
  python train_kd.py --set distillation_kwargs.method=policy_gradient --set distillation_kwargs.penalty=true
                                                           on the student's own summaries, rewarded by the teacher
  python train_kd.py --print_config                        what would be run, with all defaults
  python train_kd.py --find_batch_size                     the largest train_batch_size that fits into the GPU

The teacher is fine-tuned first, with train.py, and named in trainer_kwargs.teacher_ckpt_path. The same command resumes
a run that was stopped. docs/config.md lists all keys.
"""


def main(arguments: list[str] | None = None) -> int:
    options = training_parser("train_kd.py", __doc__, EXAMPLES, "config_kd.json").parse_args(arguments)
    return run_command("train_kd.py", lambda: distil(options), options.debug)


def distil(options) -> int:
    config = without_dropout(load_config(options.config, options.set, DistillConfig))
    if options.print_config:
        print(config_json(config), end="")
        return 0
    # torch and transformers take seconds to import: only once the config is valid.
    from utils.runs.build import build_distillation
    from utils.runs.find_batch_size import find_batch_size
    from utils.runs.run import run_training

    return (find_batch_size if options.find_batch_size else run_training)(config, build_distillation)


if __name__ == "__main__":
    sys.exit(main())
