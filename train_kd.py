"""Distil a teacher into a smaller student on article/highlights CSVs, as config_kd.json says."""

import sys
from pathlib import Path

from data.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt("train_kd.py")  # before the imports that take seconds

from data.console import put
from utils.cached_teacher import CachedTeacher
from utils.command_line import run_command, training_parser
from utils.config_files import config_json, load_config
from utils.config_kd import DistillConfig
from utils.datasets import Tables, make_prompt_format, measured_datasets
from utils.devices import Place
from utils.distillation import identity_of, make_objective, without_dropout
from utils.find_batch_size import find_batch_size
from utils.run_folder import Start
from utils.run_log import RunLog
from utils.student_start import load_student
from utils.teacher_source import check_student, find_teacher, load_teacher, teacher_device
from utils.training_run import Parts, in_run_folder, set_up_model

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

The teacher is fine-tuned first, with train.py, and named in trainer_kwargs.teacher_ckpt_path. The same command goes on
where an earlier one was stopped. README.md lists all keys.
"""


def main(arguments: list[str] | None = None) -> int:
    options = training_parser("train_kd.py", __doc__, EXAMPLES, "config_kd.json").parse_args(arguments)
    return run_command("train_kd.py", lambda: distil(options), options.debug)


def distil(options) -> int:
    config = without_dropout(load_config(options.config, options.set, DistillConfig))
    if options.print_config:
        put(config_json(config), end="")
        return 0
    do = find_batch_size if options.find_batch_size else in_run_folder
    return do(config, build, "model_arch.student_gpu_device_id")


def build(place: Place, config: DistillConfig, log: RunLog, start: Start, keep: bool = True) -> Parts:
    """The parts of a run. keep: whether the teacher's outputs may be kept on the disk, where the config says so."""
    kwargs = config.distillation_kwargs
    source, notices = find_teacher(config)
    device, device_notices = teacher_device(config, place)
    student = set_up_model(load_student(config, start, source), config, place, log, start)
    prompt_format = make_prompt_format(config, student)
    tables = Tables(config, prompt_format, place, log)
    texts = tables.first_texts(config.dataset_kwargs.train_dataset)
    vocabulary, size_notices = check_student(source, student, prompt_format, texts)
    for line in (*notices, *device_notices, *size_notices):
        log.say(line)
    log.say(f"teacher: {source.describe()}, on {device}")
    parameters = student.parameter_count() / 1e6
    log.say(f"student: {start.folder or config.model_arch.lang_model}, {parameters:.2f} M parameters")
    train_table = tables.open(config.dataset_kwargs.train_dataset)

    fingerprint = source.fingerprint()
    if kwargs.teacher_cache is None:
        teacher = load_teacher(source, config, place)
    else:
        folder = kwargs.teacher_cache.dir or Path(config.trainer_kwargs.output_dir) / "teacher_cache"
        teacher = CachedTeacher(
            lambda: load_teacher(source, config, place), fingerprint, source.width(), vocabulary, kwargs, folder, place,
            log.say,
        )
        if keep:
            for name in (config.dataset_kwargs.train_dataset, *measured_datasets(config)):
                teacher.open(tables.open(name))
        elif not teacher.is_complete(train_table):
            teacher.cache_dir = None
        teacher.load_if_needed()
    objective = make_objective(config, student, teacher, vocabulary, place, prompt_format, log)
    return Parts(objective, prompt_format, tables, train_table, identity_of(config, fingerprint))


if __name__ == "__main__":
    sys.exit(main())
