"""The fine-tuning config (`config.json`) as pydantic models: every key, its type, range, default and meaning.

`config.schema.json` and docs/config.md are generated from the descriptions (`python -m utils.config.reference`).
Values are not converted; only an integer where a number is expected is accepted. Nothing here imports torch, so that a
wrong config is refused at once.
"""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from data.articles import DEFAULT_COLUMNS, complete_columns
from utils.config.checks import contradictions


class Section(BaseModel):
    """A part of a config: unknown keys are refused, values are not converted and do not change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


# -- types that several keys have --------------------------------------------------------------------------------


def check_name(name: str) -> str:
    if any(char < " " or char == "\x7f" for char in name):
        raise ValueError("should have no control characters")
    return os.path.expanduser(name)  # noqa: PTH111 (that of Path fails for an unknown ~user)


def minus_one_is(value) -> AfterValidator:
    return AfterValidator(lambda given: value if given == -1 else given)


def check_template(template: str) -> str:
    if template.count("{article}") != 1:
        raise ValueError("should contain the text {article} exactly once")
    return template


Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Beams = Annotated[int, Field(ge=1, le=1000)]
CountOrOff = Annotated[  # null, 0 and -1: None
    Annotated[int, Field(ge=-1)] | None, AfterValidator(lambda count: None if count in (0, -1) else count)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1), AfterValidator(check_name)]  # a path, file name or hub id
Columns = Annotated[  # a header may hold newlines
    dict[Literal["id", "article", "highlights"], Annotated[str, Field(min_length=1)] | None],
    AfterValidator(complete_columns)]
Template = Annotated[str, AfterValidator(check_template)]

# -- keys of both configs ----------------------------------------------------------------------------------------

EXACT = "if the model family supports it (GPT-2); does not change the result; false: only for debugging"
FromScratch = Annotated[bool, Field(description="start from random weights instead of pretrained ones")]
Architecture = Annotated[dict[str, int | float | bool | str], Field(
    description='with from_scratch: changes to the model\'s own config, such as {"n_layer": 6, "n_embd": 384}')]
TokenizerName = Annotated[Name | None, Field(description="hub id or folder; null: the model's own")]
Dropout = Annotated[float, Field(ge=0, lt=1)] | None
PackRows = Annotated[bool, Field(description=f"pack training rows without padding, {EXACT}")]
PruneLastBlock = Annotated[bool, Field(
    description=f"in the last block, compute queries, output projection and MLP only at label positions, {EXACT}")]


class GenerationKwargs(Section):
    """Decoding during evaluation."""

    max_generation_length: Count = Field(80, description="maximum number of tokens of a generated summary")
    num_beams: Beams = Field(1, description="1: greedy decoding; more: beam search")
    early_stopping: bool = Field(False, description="beam search ends as soon as num_beams summaries are complete")


# -- sections ----------------------------------------------------------------------------------------------------


class ModelArch(Section):
    """Which model is trained, and on which GPU."""

    lang_model: Name = Field(
        "gpt2", description="hub id (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or any other decoder-only "
        "causal LM), local folder, or built-in demo size (demo-teacher, demo-student)")
    gpu_device_id: Index | None = Field(
        0, description="GPU index; null: 0; ignored, with a notice, if there is no GPU")
    from_scratch: FromScratch = False
    architecture: Architecture = Field(default={})
    tokenizer: TokenizerName = None
    dropout: Dropout = Field(None, description="one value for all dropout layers; null: the model's own")
    pack_rows: PackRows = True
    prune_last_block: PruneLastBlock = True
    generation_kwargs: GenerationKwargs = Field(default_factory=GenerationKwargs)


class TrainerKwargs(Section):
    """The training loop: length, device, evaluation and checkpoints."""

    epochs: Count = Field(1, description="passes over the training set")
    max_steps: Count | None = Field(None, description="maximum number of optimizer steps; null: no limit")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a GPU if there is one, else the CPU")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of the forward pass; auto: bfloat16 if the hardware computes it natively, else "
        "float32")
    compile: bool = Field(
        False, description="compile the models with torch.compile: a minute longer to start, then faster steps")
    seed: int = Field(1234, ge=0, le=2**32 - 1, description="seed of all random numbers")
    gradient_clipping: Annotated[
        Annotated[float, Field(ge=0)] | None, AfterValidator(lambda norm: norm or None)
    ] = Field(1.0, description="maximum gradient norm; null or 0: no clipping")
    skip_nonfinite_steps: Index = Field(
        0, description="how many optimizer steps of a run may be skipped, with a notice, because their loss or "
        "gradient is NaN or infinite; the next one stops the run")
    gradient_accumulation_steps: Annotated[Index | None, AfterValidator(lambda steps: steps or 1)] = Field(
        1, description="micro-batches per optimizer step; null or 0: 1")
    output_dir: Name = Field("runs/fine_tune", description="folder for logs and checkpoints; created if missing")
    load_from_checkpoint: bool = Field(
        True, description="resume from output_dir if it has a checkpoint; false: start again and archive the old run")
    resume_from: Name | None = Field(None, description="resume from this checkpoint folder instead")
    keep_checkpoints: Count = Field(
        2, description="how many model_checkpoints/step-N folders are kept, besides the best one")
    n_batch_ckpt_save: CountOrOff = Field(
        None, description="save a checkpoint every N micro-batches; null, 0 or -1: only after each epoch")
    ckpt_training_batch: CountOrOff = Field(
        None, description="maximum number of micro-batches per epoch; null, 0 or -1: no limit")
    log_every: Count = Field(10, description="write a training line to metrics.jsonl every N optimizer steps")
    monitor_train: bool = Field(False, description="log the mean training loss after each epoch")
    monitor_val: bool = Field(True, description="evaluate on validation_dataset after each epoch")
    monitor_test: bool = Field(False, description="evaluate on test_dataset too")
    first_val_epoch: Index = Field(0, description="first epoch (from 0) after which to evaluate")
    metrics: list[Literal["rouge"]] = Field(
        default=["rouge"], description="metrics besides loss and perplexity, which are always computed; may be empty")
    save_predictions: bool = Field(False, description="save the predictions behind each ROUGE score in predictions/")
    adaptive_loss_scaling: bool = Field(
        False, description="every loss_scaling_batch micro-batches, score validation_subset and scale the loss by "
        "sigmoid(baseline - score); a better score becomes the baseline; with metric perplexity, scale by "
        "sigmoid(perplexity)")
    loss_scaling_batch: Annotated[Literal[-1] | Count, minus_one_is(1024)] = Field(
        1024, description="with adaptive_loss_scaling: micro-batches between two scores; -1: 1024")
    adaptive_loss_metric: Annotated[
        Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "perplexity", -1], minus_one_is("rougeL")
    ] = Field("rougeL", description="with adaptive_loss_scaling: the score; -1: rougeL")
    baseline_threshold: Annotated[Literal[-1] | Annotated[float, Field(ge=0)], minus_one_is(0.15)] = Field(
        0.15, description="with adaptive_loss_scaling: the first baseline; -1: 0.15")
    multi_gpu: bool = Field(False, description="data-parallel training, with one process per GPU")
    multi_gpu_ids: list[Index] = Field(default=[], description="with multi_gpu: GPU indices; empty: all")
    is_training: bool | None = Field(
        None, exclude=True, description="accepted without effect: training scripts train")
    use_cache: bool | None = Field(
        None, exclude=True, description="accepted without effect: the KV cache is always used")


class OptimizerKwargs(Section):
    """The optimizer."""

    type: Name = Field("AdamW", description="a class of torch.optim")
    kwargs: dict[str, JsonValue] = Field(
        default={}, description='its other arguments, such as {"weight_decay": 0.1, "amsgrad": true}')
    lm_lr: float = Field(5e-5, gt=0, description="peak learning rate of the language model")
    default_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of parameters outside the language model; fine-tuning has none")
    decay_all: bool = Field(False, description="apply weight decay to biases and layer norms too")


class LrSchedulerKwargs(Section):
    """The learning rate: linear warm-up, then decay, counted in optimizer steps."""

    type: Literal["linear", "cosine"] = Field("linear", description="shape of the decay")
    num_warmup_steps: int = Field(-1, ge=-1, description="warm-up steps; -1: a tenth of all steps")
    max_warmup_steps: Index | None = Field(
        None, description="maximum number of warm-up steps, also if num_warmup_steps is -1; null: no limit")
    num_training_steps: Literal[-1] | Count = Field(
        -1, description="steps until the decay ends; -1: computed from the data, epochs and max_steps")
    min_lr_ratio: Share = Field(0.0, description="learning rate at the end of the decay, as a share of lm_lr")
    increase_batch_size_on_plateau: bool = Field(
        False, description="after patience epochs without improvement, double the accumulation instead of stopping")


class StoppingKwargs(Section):
    """Early stopping, and what counts as best."""

    patience: Index | None = Field(None, description="epochs without improvement before stopping; null: never")
    mode: Literal["max", "min"] = Field("min", description="whether a higher or a lower metric is better")
    metric: Literal["loss", "perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"] | None = Field(
        None, description="monitored on the validation set; null: rougeL for mode max, loss for mode min")
    threshold: float = Field(0.0, ge=0, description="an improvement must be larger than this")
    save_final_model: bool = Field(True, description="keep the weights of the last epoch even if they are not the best")


class CallbacksKwargs(Section):
    """What happens after each epoch."""

    kwargs: StoppingKwargs = Field(default_factory=StoppingKwargs)


class DatasetKwargs(Section):
    """The tables with id, article and highlights (.csv, .tsv, .jsonl, each also .gz, or .parquet), and how rows become
    batches."""

    data_dir: Name = Field("data/cnn_dailymail", description="folder of the tables")
    train_dataset: Name = Field("train.csv", description="file in data_dir")
    validation_dataset: Name | None = Field("validation.csv", description="file in data_dir, for loss and perplexity")
    validation_subset: Name | None = Field(
        None, description="file in data_dir, for ROUGE, which takes longer; null: validation_dataset")
    test_dataset: Name | None = Field(None, description="file in data_dir, for monitor_test")
    train_batch_size: Count = Field(1, description="rows per micro-batch")
    val_batch_size: Count = Field(8, description="rows per batch in evaluation and decoding")
    tokens_per_batch: Count | None = Field(
        None, description="maximum number of tokens per micro-batch, padding included; the rows of a step "
        "(train_batch_size x gradient_accumulation_steps) are then split by this limit instead of by "
        "train_batch_size; null: no limit")
    prompt_template: Template = Field(
        "{article}\nTL;DR:", description="the prompt; contains {article} exactly once; special tokens in it, such as "
        "<|sum|> or those of a chat format, are read as special tokens")
    columns: Columns = Field(
        default=DEFAULT_COLUMNS, description="names of the columns in your tables; id may be null: rows are numbered")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="error: a bad row stops the run; skip: bad rows are skipped and listed")
    max_length: Count | None = Field(
        None, description="maximum number of tokens per row; longer articles are truncated at their end; null: the "
        "model's context")
    cache_dir: Name | None = Field(
        None, description="folder for tokenized rows, shared by runs; null: token_cache in output_dir")
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
        stopping = self.callbacks_kwargs.kwargs
        return stopping.metric or ("rougeL" if stopping.mode == "max" else "loss")

    @model_validator(mode="after")
    def check_together(self):
        if lines := "\n".join(contradictions(self)):
            raise ValueError(lines)
        return self
