"""Options of validate_model.py: flags, and the same names in a JSON file (`--config`; flags win)."""

import argparse
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from utils.cli import OneLineParser, user_path
from utils.config.fine_tune import MOST_BEAMS, ColumnName, Name, check_template
from utils.config.load import ConfigError, parse, read_json, validate_model
from utils.text import shorten

LEAD_3 = "lead-3"
DEFAULT_LENGTH = 100  # tokens of a summary, where neither the user nor the model says another number

EXAMPLES = """\
examples:
  python validate_model.py --csv_path test.csv --model_path runs/gpt2-medium-cnn/model_checkpoints/best
  python validate_model.py --csv_path test.csv --model_path old.pt --model_name gpt2-medium
  python validate_model.py --csv_path test.csv --model_path lead-3      the first three sentences, as a baseline
"""


class ValidateOptions(BaseModel):
    """What to decode, with what, and how."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    csv_path: Name = Field(description="table with id, article, highlights: .csv, .tsv, .jsonl (also .gz) or .parquet")
    model_path: Name = Field(
        description="checkpoint folder, save_pretrained folder, hub id, legacy .pt file, or lead-3 (a baseline)"
    )
    model_name: Name | None = Field(
        None, description="architecture and tokenizer, needed for a .pt file; otherwise checked against the model"
    )
    device_id: int | None = Field(None, ge=-1, description="GPU number; -1 is the CPU; default: a GPU if there is one")
    output_dir: Name = Field("predictions", description="folder for predictions.json and scores.json")
    max_generation_length: int | None = Field(
        None, ge=1,
        description=f"most tokens of a summary; default: what the model's folder records, else {DEFAULT_LENGTH}",
    )
    batch_size: int = Field(8, ge=1, description="articles decoded together")
    num_beams: int = Field(1, ge=1, le=MOST_BEAMS, description="1 is greedy decoding, more is beam search")
    early_stopping: bool = Field(False, description="beam search ends when num_beams summaries are complete")
    on_bad_row: Literal["error", "skip"] = Field("error", description="a bad row of the CSV stops, or is left out")
    columns: dict[Literal["id", "article", "highlights"], ColumnName | None] | None = Field(
        None, description='other column names, as JSON: {"article": "text", "id": null} (null: rows are numbered)'
    )
    prompt_template: Annotated[str, AfterValidator(check_template)] | None = Field(
        None, description="default: the one that the model was trained on"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the forward pass")

    @property
    def is_legacy_file(self) -> bool:
        return Path(self.model_path).is_file() or self.model_path.endswith(".pt")


def validate_parser(description: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        "validate_model.py", description=description, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--config", type=user_path, metavar="FILE", help="JSON object with the same names; flags win")
    for name, field in ValidateOptions.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **argument_kind(name, field.annotation),
                            help=(field.description + default).replace("%", "%%"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def argument_kind(name: str, annotation) -> dict:
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if annotation in (int, int | None):
        return {"type": int, "metavar": "N"}
    if name == "columns":
        return {"type": json_object, "metavar": "JSON"}
    if choices := getattr(annotation, "__args__", None) if name in ("on_bad_row", "precision") else None:
        return {"choices": choices}
    return {"metavar": name.upper()}


def json_object(text: str) -> dict:
    try:
        value = parse(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        like = '\'{"article": "text"}\''
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not a JSON object: write such as {like}")
    return value


def read_options(arguments: argparse.Namespace) -> ValidateOptions:
    """Options of the file, then of the flags.

    Raises:
        ConfigError: the file cannot be read, an unknown name, a value of another type, or a name that is missing.
    """
    flags = {name: value for name, value in vars(arguments).items() if name in ValidateOptions.model_fields}
    source = shorten(str(arguments.config), 200) if arguments.config else "arguments"
    values = read_json(arguments.config) if arguments.config else {}

    def origin(path: tuple) -> str:
        return f"--{path[0]}" if path and path[0] in flags else source

    options = validate_model(ValidateOptions, {**values, **flags}, source, origin)
    if options.is_legacy_file and options.model_name is None:
        raise ConfigError(
            f"{options.model_path} is a state dict without its architecture: give --model_name, such as gpt2-medium, "
            "or a folder with config.json and tokenizer"
        )
    return options
