"""Options of validate_model.py: flags, and the same names in a JSON file (`--config`; flags win)."""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import Field

from utils.cli import OneLineParser, user_path
from utils.config.fine_tune import Beams, Columns, Count, Name, Section, Template
from utils.config.load import ConfigError, read_json, validate_model, without_duplicates
from utils.text import shorten

LEAD_3 = "lead-3"
DEFAULT_LENGTH = 100  # maximum tokens of a summary if neither the user nor the model says

EXAMPLES = """\
examples:
  python validate_model.py --csv_path test.csv --model_path runs/gpt2-medium-cnn/model_checkpoints/best
  python validate_model.py --csv_path test.csv --model_path old.pt --model_name gpt2-medium
  python validate_model.py --csv_path test.csv --model_path lead-3      the first three sentences, as a baseline
"""


class ValidateOptions(Section):
    """What to decode, with which model, and how."""

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
        None, ge=1, description=f"maximum tokens of a summary; default: the model's own, else {DEFAULT_LENGTH}"
    )
    batch_size: Count = Field(8, description="articles decoded together")
    num_beams: Beams = Field(1, description="1 is greedy decoding, more is beam search")
    early_stopping: bool = Field(False, description="beam search ends when num_beams summaries are complete")
    on_bad_row: Literal["error", "skip"] = Field("error", description="a bad row of the table is an error, or skipped")
    columns: Columns | None = Field(
        None, description='other column names, as JSON: {"article": "text", "id": null} (null: number the rows)'
    )
    prompt_template: Template | None = Field(
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
        options = {"metavar": name.upper()}
        if field.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif field.annotation in (int, int | None):
            options = {"type": int, "metavar": "N"}
        elif get_origin(field.annotation) is Literal:
            options = {"choices": get_args(field.annotation)}
        elif name == "columns":
            options = {"type": json_object, "metavar": "JSON"}
        text = (field.description + default).replace("%", "%%")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def json_object(text: str) -> dict:
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text, object_pairs_hook=without_duplicates), dict):
            return value
    example = '\'{"article": "text"}\''
    raise argparse.ArgumentTypeError(f"{shorten(text)} is not a JSON object: write such as {example}")


def read_options(arguments: argparse.Namespace) -> ValidateOptions:
    """Options of the file, overridden by the flags.

    Raises:
        ConfigError: the file cannot be read, or a name or value is unknown, missing or of another type.
    """
    flags = {name: value for name, value in vars(arguments).items() if name in ValidateOptions.model_fields}
    source = shorten(str(arguments.config), 200) if arguments.config else "arguments"
    values = {**(read_json(arguments.config) if arguments.config else {}), **flags}
    options = validate_model(
        ValidateOptions, values, lambda path: f"--{path[0]}" if path and path[0] in flags else source)
    if options.is_legacy_file and options.model_name is None:
        raise ConfigError(
            f"{options.model_path} is a state dict without its architecture: give --model_name, such as gpt2-medium, "
            "or a folder with config.json and tokenizer"
        )
    return options
