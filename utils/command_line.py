"""What the scripts share: arguments, quiet libraries, and errors told in one line."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from data.articles import DataError
from model.language_model import ModelError
from utils.checkpoint import CheckpointError
from utils.config_files import ConfigError
from utils.devices import DeviceError
from utils.signals import Stopped
from utils.trainer import TrainingError

USER_ERRORS = (ConfigError, DataError, ModelError, DeviceError, CheckpointError)


class OneLineParser(argparse.ArgumentParser):
    """Usage errors in one line, with exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def training_parser(name: str, description: str, examples: str, default_config: str) -> argparse.ArgumentParser:
    """The arguments of the training scripts."""
    parser = OneLineParser(
        name, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path(default_config), metavar="FILE",
                        help="JSON file with the settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one setting; may be given several times")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_command(name: str, command: Callable[[], int], debug: bool = False) -> int:
    """The exit code of a script: 2 for what the user can mend (config, data, model), 1 for what went wrong later.

    debug: show the traceback of an error.
    """
    quiet_libraries()
    try:
        return command()
    except Stopped as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        return fail(name, str(error), 2, debug)
    except torch.OutOfMemoryError:
        remedy = ("make the batch smaller (training: dataset_kwargs.train_batch_size, with as much more "
                  "gradient_accumulation_steps; validate_model.py: --batch_size)")
        return fail(name, f"the GPU's memory is full: {remedy}", 1, debug)
    except (TrainingError, OSError) as error:
        return fail(name, str(error), 1, debug)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def fail(name: str, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    for line in message.splitlines():
        print(f"{name}: error: {line}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """One progress bar a phase is ours; the libraries' own, and their advice, would hide it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
