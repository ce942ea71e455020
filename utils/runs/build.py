"""The components of a run of train.py and of train_kd.py, built from its config."""

from functools import partial
from pathlib import Path

from model.fine_tuning import FineTuning
from model.vocabulary import real_tokens
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.distillation.cached_teacher import CachedTeacher
from utils.distillation.objective import identity_of, make_objective
from utils.distillation.student import load_student
from utils.distillation.teacher import check_student, check_template, find_teacher, load_teacher, teacher_device
from utils.evaluation.splits import TokenizedSplits, make_prompt_format
from utils.evaluation.validation import measured_datasets
from utils.runs.run import RunComponents
from utils.runs.run_folder import ResumePoint
from utils.runs.run_log import RunLog
from utils.training.distributed import DistributedContext
from utils.training.load_model import load_model, prepare_model


def build_fine_tuning(
    context: DistributedContext, config: FineTuneConfig, log: RunLog, start: ResumePoint, keep: bool = True
) -> RunComponents:
    """The components of a fine-tuning run; `keep` has no effect, since only tokenised rows are written."""
    language_model = prepare_model(load_model(config, start.folder), config, context, log, start.folder is not None)
    parameters = language_model.parameter_count() / 1e6
    log.info(f"model: {start.folder or config.model_arch.lang_model}, {parameters:.2f} M parameters")
    prompt_format = make_prompt_format(config, language_model)
    tables = TokenizedSplits(config, prompt_format, context, log)
    train_table = tables.open(config.dataset_kwargs.train_dataset)
    return RunComponents(FineTuning(language_model), prompt_format, tables, train_table, {})


def build_distillation(
    context: DistributedContext, config: DistillConfig, log: RunLog, start: ResumePoint, keep: bool = True
) -> RunComponents:
    """The components of a distillation run. keep: whether the teacher cache may be written, if the config has one."""
    kwargs = config.distillation_kwargs
    source = find_teacher(config)
    check_template(source, config, log)
    device, notices = teacher_device(config, context)
    student = load_student(config, start.folder, source)
    prepare_model(student, config, context, log, start.folder is not None)
    prompt_format = make_prompt_format(config, student)
    tables = TokenizedSplits(config, prompt_format, context, log)
    texts = tables.first_texts(config.dataset_kwargs.train_dataset)
    vocabulary = check_student(source, student, prompt_format, texts, log)
    for line in notices:
        log.info(line)
    log.info(f"teacher: {source.describe()}, on {device}")
    parameters = student.parameter_count() / 1e6
    log.info(f"student: {start.folder or config.model_arch.lang_model}, {parameters:.2f} M parameters")
    train_table = tables.open(config.dataset_kwargs.train_dataset)

    fingerprint, load, teacher = source.fingerprint(), partial(load_teacher, source, config, context, device), None
    if kwargs.teacher_cache is not None:
        # Earlier versions cached outputs for the gaps between ids too.
        gaps = sorted(set(range(vocabulary)) - real_tokens(source.tokenizer).keys())
        folder = kwargs.teacher_cache.dir or Path(config.trainer_kwargs.output_dir) / "teacher_cache"
        teacher = CachedTeacher(
            load, f"{fingerprint} without {gaps}" if gaps else fingerprint, source.width(), vocabulary, kwargs, folder,
            context, log.info,
        )
        measured = measured_datasets(config).values() if keep else []
        names = dict.fromkeys([config.dataset_kwargs.train_dataset, *measured])
        if keep or teacher.is_complete(train_table):
            teacher.prepare(map(tables.open, names), config.dataset_kwargs.train_batch_size,
                            config.dataset_kwargs.tokens_per_batch, student.tokenizer.pad_token_id)
        else:
            teacher = None
    objective = make_objective(config, student, teacher or load(), vocabulary, context, prompt_format, log)
    return RunComponents(objective, prompt_format, tables, train_table, identity_of(config, fingerprint))
