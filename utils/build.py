"""What a run of train.py and one of train_kd.py are built of, from the config to the objective."""

from pathlib import Path

from model.fine_tuning import FineTuning
from model.language_model import real_tokens
from utils.cached_teacher import CachedTeacher
from utils.config import FineTuneConfig
from utils.config_kd import DistillConfig
from utils.datasets import Tables, make_prompt_format, measured_datasets
from utils.devices import Place
from utils.distillation import identity_of, make_objective
from utils.run_folder import Start, load_model
from utils.run_log import RunLog
from utils.student_start import load_student
from utils.teacher_source import check_student, find_teacher, load_teacher, teacher_device
from utils.training_run import Parts, set_up_model


def build_fine_tuning(
    place: Place, config: FineTuneConfig, log: RunLog, start: Start, keep: bool = True
) -> Parts:
    """The parts of a run. keep: nothing is kept here but tokenised rows, so it changes nothing."""
    language_model = set_up_model(load_model(config, start), config, place, log, start)
    parameters = language_model.parameter_count() / 1e6
    log.say(f"model: {start.folder or config.model_arch.lang_model}, {parameters:.2f} M parameters")
    prompt_format = make_prompt_format(config, language_model)
    tables = Tables(config, prompt_format, place, log)
    train_table = tables.open(config.dataset_kwargs.train_dataset)
    return Parts(FineTuning(language_model), prompt_format, tables, train_table, {})


def build_distillation(
    place: Place, config: DistillConfig, log: RunLog, start: Start, keep: bool = True
) -> Parts:
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
    # A cache of a version that took the gaps between ids for tokens is another one.
    gaps = sorted(set(range(vocabulary)) - real_tokens(source.tokenizer).keys())
    if kwargs.teacher_cache is None:
        teacher = load_teacher(source, config, place)
    else:
        folder = kwargs.teacher_cache.dir or Path(config.trainer_kwargs.output_dir) / "teacher_cache"
        teacher = CachedTeacher(
            lambda: load_teacher(source, config, place), f"{fingerprint} without {gaps}" if gaps else fingerprint,
            source.width(), vocabulary, kwargs, folder, place, log.say,
        )
        if keep:
            for name in (config.dataset_kwargs.train_dataset, *measured_datasets(config)):
                teacher.open(tables.open(name))
        elif not teacher.is_complete(train_table):
            teacher.cache_dir = None
        teacher.load_if_needed()
    objective = make_objective(config, student, teacher, vocabulary, place, prompt_format, log)
    return Parts(objective, prompt_format, tables, train_table, identity_of(config, fingerprint))
