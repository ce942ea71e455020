"""Which teacher a distillation config means: checked before it is loaded, loaded when it is needed."""

import hashlib
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from data.prompts import PromptFormat
from model.errors import ModelError
from model.language_model import LanguageModel
from model.loading import (
    DEMO_SHAPES,
    check_same_architecture,
    has_tokenizer,
    load_language_model,
    load_tokenizer,
    model_config,
)
from model.teacher import Teacher
from model.verify import verify_model
from model.vocabulary import shared_vocabulary
from utils.config.distill import DistillConfig
from utils.config.load import ConfigError
from utils.files import sha256_file
from utils.manifest import check_model_folder
from utils.training.distributed import DistributedContext, choose_device

NOT_OF_THE_WEIGHTS = ("transformers_version", "_name_or_path", "dtype", "prompt_template", "prompt_max_length")
KEY = "trainer_kwargs.teacher_ckpt_path"
# Case, accents (composed and not), digits, white space, ligatures, scripts: what tokenizers read differently.
VARIED = (
    "The Mayor's CAFÉ won't re-open: 1,234.50 of 98765 people (3 %) paid £5… “naïve”, she said — 2019/20.",
    "e\u0301le\u0300ve ﬁne ½ Ａ  two  spaces\ttab\r\nline\n\n\nend ",
    "Здравствуйте 東京都 العربية 😀👍🏽 don’t I'M they'LL x=a_b[i]; http://a.b/c?d=1#e @user #tag",
)


@dataclass
class TeacherSource:
    """name: hub id, folder, or the architecture of `weights`. weights: a legacy state dict. key: of the config."""

    name: str
    weights: str | None
    key: str
    config: PreTrainedConfig
    tokenizer: object
    tokenizer_name: str

    def describe(self) -> str:
        return self.weights or self.name

    def fingerprint(self) -> str:
        """Changes with the weights: SHA-256 of the files of a folder or `.pt`, the commit of a hub model."""
        if self.weights is not None:
            files = [Path(self.weights)]
        elif Path(self.name).is_dir():
            endings = ("*.safetensors", "*.bin", "*.index.json")
            files = sorted(path for ending in endings for path in Path(self.name).glob(ending))
        else:
            return f"{self.name} {getattr(self.config, '_commit_hash', None)}"
        digests = [(path.name, sha256_file(path)) for path in files]
        shape = {key: value for key, value in self.config.to_dict().items() if key not in NOT_OF_THE_WEIGHTS}
        return hashlib.sha256(repr([digests, sorted(shape.items(), key=str)]).encode()).hexdigest()

    def width(self) -> int:
        """Of the hidden states that its head takes."""
        text = self.config.get_text_config()
        return getattr(text, "word_embed_proj_dim", None) or text.hidden_size

    def load(self) -> LanguageModel:
        try:
            language_model = load_language_model(self.name, tokenizer=self.tokenizer_name, weights=self.weights)
            verify_model(language_model)
            return language_model
        except ModelError as error:
            raise ModelError(f"{self.key}: {error}") from error


def find_teacher(config: DistillConfig) -> TeacherSource:
    """Reads its config and tokenizer, not its weights.

    Raises:
        ModelError: it is not there, has random weights, or is of another architecture than `teacher_lang_model`.
    """
    named, path = config.model_arch.teacher_lang_model, config.trainer_kwargs.teacher_ckpt_path
    key = KEY if path is not None else "model_arch.teacher_lang_model"
    legacy = path is not None and path.endswith(".pt")
    name = named if path is None or legacy else path
    try:
        if path is not None:
            check_weights_path(path, config.trainer_kwargs.output_dir, "train the teacher first, with train.py")
        if not legacy:
            check_model_folder(name, key)
        if not legacy and name in DEMO_SHAPES:
            raise ModelError(f"'{name}' has random weights, so it can teach nothing: train it (./demo.sh does), and "
                             f"name its checkpoint in {KEY}")
        teacher_config = model_config(name, without_hub=legacy)
        if path is not None and not legacy and named is not None:
            check_same_architecture(teacher_config, named)
        own_tokenizer = named is None or legacy or not Path(name).is_dir() or has_tokenizer(name)
        of_tokenizer = name if own_tokenizer else named
        return TeacherSource(
            name, path if legacy else None, key, teacher_config, load_tokenizer(of_tokenizer), of_tokenizer
        )
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


def check_weights_path(path: str, output_dir: str, otherwise: str) -> None:
    """Raises ModelError if there are no weights, or they lie in the folder of this run, which it replaces."""
    if not Path(path).exists():
        raise ModelError(f"{path} does not exist: expected a checkpoint folder, a save_pretrained folder or a .pt "
                         f"state dict; {otherwise}")
    if Path(path).resolve().is_relative_to(Path(output_dir).resolve()):
        raise ModelError(f"{path} lies in trainer_kwargs.output_dir, which this run writes: choose another output_dir")


def check_template(source: TeacherSource, config: DistillConfig, log) -> None:
    """Raises ConfigError if the teacher says that it was trained on another prompt template. log: a `RunLog`."""
    template = getattr(source.config, "prompt_template", None)
    own = config.dataset_kwargs.prompt_template
    if template is not None and template != own:
        raise ConfigError(f"{source.key}: the teacher {source.describe()} was trained on the prompt_template "
                          f"{template!r}, and dataset_kwargs.prompt_template is {own!r}: write the teacher's there")
    if template is None and source.key != KEY:
        log.info(f"the teacher {source.describe()} was not fine-tuned by train.py: a teacher that knows the task "
                 f"teaches more; fine-tune it first and name its checkpoint in {KEY}")
    elif template is None:
        log.info(f"the teacher {source.describe()} does not say which prompt it was trained on: is it {own!r}?")


def check_student(
    source: TeacherSource, student: LanguageModel, prompt_format: PromptFormat, texts: list[str], log
) -> int:
    """The number of tokens that both have. texts: examples of what is read. log: a `RunLog`.

    Raises:
        ModelError: they do not fit together.
    """
    try:
        vocabulary = shared_vocabulary(source.tokenizer, student.tokenizer)
        student.limit_vocabulary(vocabulary)
        check_same_reading(source.tokenizer, prompt_format, [*VARIED, *texts])
        context = getattr(source.config, "max_position_embeddings", None)
        if context is not None and context < prompt_format.max_length:
            raise ModelError(f"the teacher's context is {context} tokens, the rows have up to "
                             f"{prompt_format.max_length}: set dataset_kwargs.max_length to the teacher's context")
    except ModelError as error:
        raise ModelError(f"{source.key}: {error}") from error
    size, own = (text.num_hidden_layers * text.hidden_size**2 for text in (
        source.config.get_text_config(), student.model.config.get_text_config()))
    if size <= own:
        log.info("the teacher is not bigger than its student: a bigger one has more to teach")
    ends = [tokenizer.eos_token for tokenizer in (source.tokenizer, student.tokenizer)]
    if ends[0] != ends[1]:
        log.info(f"the teacher ends a text with {ends[0]!r}, the student with {ends[1]!r}: the teacher was not trained "
                 "to end there")
    return vocabulary


def check_same_reading(teacher_tokenizer, prompt_format: PromptFormat, texts: list[str]) -> None:
    """Raises ModelError, with the first difference, if the teacher's tokenizer gives a row other ids than the student's
    `prompt_format`: the teacher would be asked about text that it never learnt to read."""
    teacher_format = PromptFormat(teacher_tokenizer, prompt_format.template, prompt_format.max_length)
    for text in texts:
        theirs, ours = (reader.prediction_prompts([text], 0)[0] + reader.encode_highlights([text])[0]
                        for reader in (teacher_format, prompt_format))
        if theirs != ours:
            first = next(index for index, pair in enumerate(zip_longest(theirs, ours)) if pair[0] != pair[1])
            tokens = [teacher_tokenizer.convert_ids_to_tokens(ids[first : first + 4]) for ids in (theirs, ours)]
            raise ModelError(
                f"teacher and student have the same tokens but read text differently: in {text!r}, from token {first} "
                f"on, the teacher reads {tokens[0]} and the student {tokens[1]}: distil between models of one tokenizer"
            )


def load_teacher(
    source: TeacherSource, config: DistillConfig, context: DistributedContext, device: torch.device
) -> Teacher:
    """The teacher on its `device`, its head on the student's."""
    language_model = source.load().to(device)
    arch = config.model_arch
    language_model.pack_rows, language_model.prune_last_block = arch.pack_rows, arch.prune_last_block
    if config.trainer_kwargs.compile:
        language_model.compile_forward()
    return Teacher(language_model, context.device, context.autocast)


def teacher_device(config: DistillConfig, context: DistributedContext) -> tuple[torch.device, list[str]]:
    """Where the teacher resides, and notices; beside the student in each process of a group, and on a CPU."""
    if context.world_size > 1:
        return context.device, []
    key, number = "model_arch.teacher_gpu_device_id", config.model_arch.teacher_gpu_device_id
    return choose_device(config.trainer_kwargs.device, number, key)
