"""Distil a teacher into a smaller student on article/highlights CSVs, as config_kd.json says."""

import sys
from pathlib import Path

from model.teacher_student import TeacherStudent
from utils.cached_teacher import CachedTeacher
from utils.command_line import run_command, training_parser
from utils.config_files import config_json, load_config
from utils.config_kd import NUMBERS, DistillConfig
from utils.datasets import Tables, make_prompt_format, measured_datasets
from utils.devices import Place
from utils.run_folder import Start
from utils.run_log import RunLog
from utils.signals import StopRequest
from utils.student_start import load_student
from utils.teacher_source import check_student, find_teacher, load_teacher, teacher_device
from utils.training_run import in_run_folder, set_up_model, train_objective

EXAMPLES = """\
examples:
  python train_kd.py                                       the recipe in config_kd.json: gpt2-medium into gpt2
  python train_kd.py --config demo/distil_student.json     the demo (after ./demo.sh): no hub, no GPU
  python train_kd.py --set distillation_kwargs.kl_div=JS --set trainer_kwargs.output_dir=runs/js
  python train_kd.py --set 'distillation_kwargs.teacher_cache={"kind": "hidden"}'
                                                           compute the teacher's outputs once, for several epochs
  python train_kd.py --print_config                        what would be run, with all defaults

The teacher is fine-tuned first, with train.py, and named in trainer_kwargs.teacher_ckpt_path. The same command goes on
where an earlier one was stopped. README.md lists all keys.
"""


def main(arguments: list[str] | None = None) -> int:
    options = training_parser("train_kd.py", __doc__, EXAMPLES, "config_kd.json").parse_args(arguments)
    return run_command("train_kd.py", lambda: distil(options), options.debug)


def distil(options) -> int:
    config = load_config(options.config, options.set, DistillConfig)
    if options.print_config:
        print(config_json(config), end="")
        return 0
    return in_run_folder(config, distil_at, "model_arch.student_gpu_device_id")


def distil_at(place: Place, config: DistillConfig, stop: StopRequest, log: RunLog, start: Start) -> int:
    """Build the parts, in the run folder that this process holds, and start them."""
    kwargs = config.distillation_kwargs
    source, notices = find_teacher(config)
    device, device_notices = teacher_device(config, place)
    student = set_up_model(load_student(config, start, source), config, place)
    prompt_format = make_prompt_format(config, student)
    vocabulary, size_notices = check_student(source, student, prompt_format.max_length)
    for line in (*notices, *device_notices, *size_notices):
        log.say(line)
    log.say(f"teacher: {source.describe()}, on {device}")
    parameters = student.parameter_count() / 1e6
    log.say(f"student: {start.folder or config.model_arch.lang_model}, {parameters:.2f} M parameters")
    tables = Tables(config, prompt_format, place, log)
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
        for name in (config.dataset_kwargs.train_dataset, *measured_datasets(config)):
            teacher.open(tables.open(name))
        teacher.load_if_needed()
    objective = TeacherStudent(
        student, teacher, kwargs.kl_div, kwargs.temperature, kwargs.kd_weight, kwargs.beta, kwargs.lambda_, kwargs.mu,
        kwargs.chunk_size, vocabulary,
    )
    return train_objective(
        objective, config, place, stop, log, start, prompt_format, tables, train_table,
        identity_of(config, fingerprint),
    )


def identity_of(config: DistillConfig, fingerprint: str) -> dict:
    """What decides start and loss, so must be the same for a checkpoint to be continued; an exact cache does not."""
    kwargs = config.distillation_kwargs
    cache = kwargs.teacher_cache
    keys = ["student_init", "student_layers", "kl_div", "temperature", "kd_weight"]
    keys += [key for key, names in NUMBERS.items() if kwargs.kl_div in names]
    return {
        "the teacher's weights": fingerprint,
        "trainer_kwargs.student_ckpt_path": config.trainer_kwargs.student_ckpt_path,
        **{f"distillation_kwargs.{key.rstrip('_')}": getattr(kwargs, key) for key in keys},
        "distillation_kwargs.teacher_cache.top_k": cache.top_k if cache and cache.kind == "top_k" else None,
        "distillation_kwargs.teacher_cache.dtype":
            cache.dtype if cache and cache.kind == "hidden" and cache.dtype == "bfloat16" else None,
    }


if __name__ == "__main__":
    sys.exit(main())
