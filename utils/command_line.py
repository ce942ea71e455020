"""What the scripts share: quiet libraries, and errors told in one line."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable

import torch
import transformers

from data.articles import DataError
from model.language_model import ModelError
from utils.checkpoint import CheckpointError
from utils.config import ConfigError
from utils.devices import DeviceError
from utils.signals import Stopped
from utils.trainer import TrainingError

USER_ERRORS = (ConfigError, DataError, ModelError, DeviceError, CheckpointError)


def run_command(name: str, command: Callable[[], int], debug: bool = False) -> int:
    """The exit code of a script: 2 for what the user can mend (config, data, model), 1 for what went wrong later.

    debug: let errors through with their traceback.
    """
    quiet_libraries()
    try:
        return command()
    except Stopped as stopped:
        print(f"{name}: {stopped}; the same command goes on from there", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        return fail(name, str(error), 2, debug)
    except torch.OutOfMemoryError:
        remedy = "lower dataset_kwargs.train_batch_size, tokens_per_batch or max_length (accumulation keeps the step's size)"
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
    """One progress bar a phase is ours; the libraries' own and their advice would hide it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
