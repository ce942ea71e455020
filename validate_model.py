"""Decode the articles of a CSV with a model and score the highlights: predictions.json and scores.json."""

import sys

from utils.cli import run_command
from utils.config.validate_options import read_options, validate_parser


def main(arguments: list[str] | None = None) -> int:
    options = validate_parser(__doc__).parse_args(arguments)
    return run_command("validate_model.py", lambda: validate(options), options.debug)


def validate(arguments) -> int:
    options = read_options(arguments)
    # torch and transformers take seconds to import: only once the options are valid.
    from utils.runs.score_table import score_table

    return score_table(options)


if __name__ == "__main__":
    sys.exit(main())
