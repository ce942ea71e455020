"""The fine-tuning config (`config.json`) as pydantic models: every key, its type, range, default and meaning.

The descriptions below are the only reference: `config.schema.json` and docs/config.md are generated from them
(`python -m utils.config.reference`). Values are never converted: only a whole number where a number is expected is
taken as it is. The config of train_kd.py, `utils/config/distill.py`, is made of the same sections. Nothing here imports
torch, so that a wrong config is refused at once.
"""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from utils.config.checks import contradictions, monitored_metric

COLUMNS = ("id", "article", "highlights")
MOST_BEAMS = 1000
NO_EFFECT = ("is_training", "use_cache")
DEFAULT_SCALING_BATCH, DEFAULT_SCALING_METRIC, DEFAULT_BASELINE = 1024, "rougeL", 0.15


def check_name(name: str) -> str:
    """A path, file name or hub id; `~` in front is the home folder."""
    name = os.path.expanduser(name)  # noqa: PTH111 (that of Path fails for an unknown ~user)
    if any(sign < " " or sign == "\x7f" for sign in name):
        raise PydanticCustomError("name", "expected a name without line ends, tabs and other control characters")
    lengths = [len(part.encode("utf-8", "replace")) for part in name.split("/")]
    if max(lengths) > 255 or sum(lengths) + len(lengths) > 4096:
        raise PydanticCustomError("name", "expected a shorter name: file systems take 255 bytes, and 4095 with folders")
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(check_name)]
ColumnName = Annotated[str, Field(min_length=1)]  # a header may hold line ends


def check_template(template: str) -> str:
    if template.count("{article}") != 1:
        raise PydanticCustomError("template", "expected the text {article} in it exactly once")
    return template


def complete_columns(columns: dict[str, str | None]) -> dict[str, str | None]:
    """All three columns: those not named have the name of their key."""
    for key in ("article", "highlights"):
        if columns.get(key, key) is None:
            raise PydanticCustomError("columns", f"{key} is null: expected the name of a column; only id may be null")
    return {key: columns.get(key, key) for key in COLUMNS}


class Section(BaseModel):
    """A part of a config: unknown keys are refused, nothing is converted, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class GenerationKwargs(Section):
    """Decoding during evaluation."""

    max_generation_length: int = Field(80, ge=1, description="maximum number of tokens of a generated summary")
    num_beams: int = Field(1, ge=1, le=MOST_BEAMS, description="1 is greedy decoding, more is beam search")
    early_stopping: bool = Field(False, description="beam search ends as soon as num_beams summaries are complete")


# Keys that the configs of both scripts have.
EXACT = "if the family supports it (GPT-2); exact; false: for debugging"
FromScratch = Annotated[bool, Field(description="random weights of that architecture instead of trained ones")]
Architecture = Annotated[dict[str, int | float | bool | str], Field(
    description="with from_scratch: values of the model's own config to change, such as n_layer, n_embd"
)]
TokenizerName = Annotated[Name | None, Field(description="hub id or folder; null: the model's own")]
Dropout = Annotated[Annotated[float, Field(ge=0, lt=1)] | None, Field(
    description="one value for all dropouts; null: the model's own"
)]
PackRows = Annotated[bool, Field(
    description=f"training rows are packed, without padding, {EXACT}"
)]
PruneLastBlock = Annotated[bool, Field(
    description=f"the last block computes queries, output projection and MLP only at label positions, {EXACT}"
)]
GpuNumber = Annotated[Annotated[int, Field(ge=0)] | None, Field(
    description="index of the GPU; null: 0; without a GPU ignored, with a notice"
)]
Columns = Annotated[dict[Literal["id", "article", "highlights"], ColumnName | None], AfterValidator(complete_columns)]


class ModelArch(Section):
    """Which model is trained, and on which GPU."""

    lang_model: Name = Field(
        "gpt2", description="hub id (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or any decoder-only causal "
        "LM), local folder, or a built-in demo size (demo-teacher, demo-student)"
    )
    gpu_device_id: GpuNumber = 0
    from_scratch: FromScratch = False
    architecture: Architecture = Field(default={})
    tokenizer: TokenizerName = None
    dropout: Dropout = None
    pack_rows: PackRows = True
    prune_last_block: PruneLastBlock = True
    generation_kwargs: GenerationKwargs = Field(default_factory=GenerationKwargs)


class TrainerKwargs(Section):
    """The training loop: length, device, evaluation and checkpoints."""

    epochs: int = Field(1, ge=1, description="passes over the training set")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="maximum number of optimizer steps; null: no limit"
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a GPU if there is one")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass; auto: bfloat16 if the hardware computes it natively"
    )
    compile: bool = Field(
        False, description="compile model and teacher with torch.compile: a minute slower to start, then faster steps"
    )
    seed: int = Field(1234, ge=0, le=2**32 - 1, description="of all random numbers")
    gradient_clipping: Annotated[float, Field(ge=0)] | None = Field(
        1.0, description="maximum norm of the gradient of an optimizer step; null or 0: off"
    )
    skip_nonfinite_steps: int = Field(
        0, ge=0, description="maximum number of optimizer steps per run that are skipped, with a notice, because their "
        "loss or gradient is NaN or infinite; one more stops the run; 0: the first stops it"
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=0)] | None = Field(
        1, description="micro-batches (of train_batch_size rows) per optimizer step; null or 0: 1"
    )
    output_dir: Name = Field("runs/fine_tune", description="folder for logs and checkpoints; created if missing")
    load_from_checkpoint: bool = Field(
        True, description="resume from output_dir if it has a checkpoint; false: start again, and keep the old run"
    )
    resume_from: Name | None = Field(None, description="resume from this checkpoint folder instead")
    keep_checkpoints: int = Field(2, ge=1, description="how many model_checkpoints/step-N are kept, besides the best")
    n_batch_ckpt_save: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="save a checkpoint every N micro-batches; null, 0 or -1: only after each epoch"
    )
    ckpt_training_batch: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="maximum number of micro-batches per epoch; null, 0 or -1: all"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between two training lines of metrics.jsonl")
    monitor_train: bool = Field(False, description="after each epoch, log the mean training loss of the epoch")
    monitor_val: bool = Field(True, description="after each epoch, measure validation_dataset")
    monitor_test: bool = Field(False, description="after each epoch, measure test_dataset too")
    first_val_epoch: int = Field(0, ge=0, description="first epoch (from 0) after which anything is measured")
    metrics: list[Literal["rouge"]] = Field(
        default=["rouge"], description="metrics besides loss and perplexity, which are always measured; may be empty"
    )
    save_predictions: bool = Field(False, description="keep the predictions behind each ROUGE score in predictions/")
    adaptive_loss_scaling: bool = Field(
        False, description="score validation_subset during the epoch and scale the loss by sigmoid(baseline - score); "
        "a better score becomes the baseline; with metric perplexity, scale by sigmoid(perplexity)"
    )
    loss_scaling_batch: Literal[-1] | Annotated[int, Field(ge=1)] = Field(
        DEFAULT_SCALING_BATCH, description="micro-batches between two such scores; -1: 1024"
    )
    adaptive_loss_metric: Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "perplexity", -1] = Field(
        DEFAULT_SCALING_METRIC, description="the score; -1: rougeL"
    )
    baseline_threshold: Literal[-1] | Annotated[float, Field(ge=0)] = Field(
        DEFAULT_BASELINE, description="the first baseline; -1: 0.15"
    )
    multi_gpu: bool = Field(False, description="data-parallel training over several GPUs, by torch's own launcher")
    multi_gpu_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="with multi_gpu: indices of the GPUs; empty: all"
    )
    is_training: bool | None = Field(None, description="accepted without effect: training scripts train")
    use_cache: bool | None = Field(None, description="accepted without effect: the KV cache is always used")

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in an optimizer step, at least 1."""
        return self.gradient_accumulation_steps or 1

    @property
    def clip_norm(self) -> float | None:
        """Largest gradient norm; None = off."""
        return self.gradient_clipping or None

    @property
    def checkpoint_every(self) -> int | None:
        """Micro-batches between two checkpoints on the way; None = off."""
        return count_or_off(self.n_batch_ckpt_save)

    @property
    def batches_per_epoch(self) -> int | None:
        """Most micro-batches in an epoch; None = all."""
        return count_or_off(self.ckpt_training_batch)

    @property
    def loss_scaling_interval(self) -> int:
        """Micro-batches between two scores of adaptive loss scaling."""
        return DEFAULT_SCALING_BATCH if self.loss_scaling_batch == -1 else self.loss_scaling_batch

    @property
    def scaling_metric(self) -> str:
        """The score of adaptive loss scaling."""
        return DEFAULT_SCALING_METRIC if self.adaptive_loss_metric == -1 else self.adaptive_loss_metric

    @property
    def scaling_baseline(self) -> float:
        """The first baseline of adaptive loss scaling."""
        return DEFAULT_BASELINE if self.baseline_threshold == -1 else self.baseline_threshold


def count_or_off(count: int | None) -> int | None:
    return None if count in (None, 0, -1) else count


class OptimizerKwargs(Section):
    """The optimizer."""

    type: Name = Field("AdamW", description="a class of torch.optim")
    kwargs: dict[str, JsonValue] = Field(
        default={}, description='its other arguments, such as {"weight_decay": 0.1, "amsgrad": true}'
    )
    lm_lr: float = Field(5e-5, gt=0, description="peak learning rate of the language model")
    default_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of parameters outside the language model; fine-tuning has none"
    )
    decay_all: bool = Field(False, description="weight decay on biases and layer norms too")


class LrSchedulerKwargs(Section):
    """The learning rate: linear warm-up, then decay, counted in optimizer steps."""

    type: Literal["linear", "cosine"] = Field("linear", description="shape of the decay")
    num_warmup_steps: int = Field(-1, ge=-1, description="optimizer steps of warm-up; -1: a tenth of all steps")
    max_warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="maximum number of warm-up steps, also for the tenth; null: no limit"
    )
    num_training_steps: Literal[-1] | Annotated[int, Field(ge=1)] = Field(
        -1, description="optimizer steps until the decay ends; -1: computed from the data, epochs and max_steps"
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="share of lm_lr at which the decay ends")
    increase_batch_size_on_plateau: bool = Field(
        False, description="after patience epochs without improvement, double the accumulation instead of stopping"
    )


class StoppingKwargs(Section):
    """Early stopping, and what counts as best."""

    patience: Annotated[int, Field(ge=0)] | None = Field(
        None, description="epochs without improvement before stopping; null: never"
    )
    mode: Literal["max", "min"] = Field("min", description="whether the metric is better when higher or when lower")
    metric: Literal["loss", "perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"] | None = Field(
        None, description="monitored on the validation set; null: rougeL for mode max, loss for mode min"
    )
    threshold: float = Field(0.0, ge=0, description="an improvement must be larger than this")
    save_final_model: bool = Field(True, description="keep the weights of the last epoch even if they are not the best")


class CallbacksKwargs(Section):
    """What happens after each epoch."""

    kwargs: StoppingKwargs = Field(default_factory=StoppingKwargs)


class DatasetKwargs(Section):
    """The tables with id, article and highlights (.csv, .tsv, .jsonl, each also .gz, or .parquet), and how rows become
    batches."""

    data_dir: Name = Field("data/cnn_dailymail", description="folder of the tables")
    train_dataset: Name = Field("train.csv", description="file name in data_dir")
    validation_dataset: Name | None = Field("validation.csv", description="file name in data_dir; for loss, perplexity")
    validation_subset: Name | None = Field(
        None, description="file name in data_dir; for ROUGE, which takes longer; null: validation_dataset"
    )
    test_dataset: Name | None = Field(None, description="file name in data_dir; for monitor_test")
    train_batch_size: int = Field(1, ge=1, description="rows in a micro-batch")
    val_batch_size: int = Field(8, ge=1, description="rows measured or decoded together")
    tokens_per_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="maximum number of tokens, padding included, of a micro-batch; the rows of a step "
        "(train_batch_size x accumulation) are then split by it instead of by train_batch_size; null: no limit"
    )
    prompt_template: Annotated[str, AfterValidator(check_template)] = Field(
        "{article}\nTL;DR:", description="the prompt; contains {article} exactly once; special tokens "
        "in it, such as <|sum|> or those of a chat format, are read as special tokens"
    )
    columns: Columns = Field(
        default={key: key for key in COLUMNS},
        description="names of the columns in your tables; id may be null: rows are numbered",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a bad row stops the run, or is skipped and listed"
    )
    max_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description="maximum number of tokens of a row; longer articles are truncated at their end; null: the "
        "model's context"
    )
    cache_dir: Name | None = Field(
        None, description="folder for tokenised rows, shared by runs; null: token_cache in output_dir"
    )
    num_workers: int = Field(0, ge=0, le=256, description="processes that prepare batches; 0: the main process")


class FineTuneConfig(Section):
    """Config of train.py."""

    model_arch: ModelArch = Field(default_factory=ModelArch)
    trainer_kwargs: TrainerKwargs = Field(default_factory=TrainerKwargs)
    optimizer_kwargs: OptimizerKwargs = Field(default_factory=OptimizerKwargs)
    lr_scheduler_kwargs: LrSchedulerKwargs = Field(default_factory=LrSchedulerKwargs)
    callbacks_kwargs: CallbacksKwargs = Field(default_factory=CallbacksKwargs)
    dataset_kwargs: DatasetKwargs = Field(default_factory=DatasetKwargs)

    @property
    def monitored_metric(self) -> str:
        """The validation metric that decides about best and about stopping."""
        return monitored_metric(self.callbacks_kwargs.kwargs)

    @model_validator(mode="after")
    def check_together(self) -> "FineTuneConfig":
        if lines := contradictions(self):
            raise PydanticCustomError("contradiction", "{lines}", {"lines": "\n".join(lines)})
        return self
