"""What the scripts share: arguments, exit codes, and errors in one line. Imports nothing of torch or transformers."""

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from utils.errors import describe
from utils.text import one_line

INTERRUPTED = 128 + signal.SIGINT


def user_path(name: str) -> Path:
    """A path of the command line; `~` in front is the user's home, also in `--flag=~/x`."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (that of Path fails for an unknown ~user)


class OneLineParser(argparse.ArgumentParser):
    """Usage errors in one line, with exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")


def training_parser(name: str, description: str, examples: str, default_config: str) -> argparse.ArgumentParser:
    """The arguments of the training scripts."""
    parser = OneLineParser(
        name, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=user_path, default=Path(default_config), metavar="FILE",
                        help="JSON file with the settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one setting; may be given several times")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--find_batch_size", action="store_true",
                        help="on a GPU: try steps on the longest rows, print the largest batch that fits, and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_command(name: str, command: Callable[[], int], debug: bool = False) -> int:
    """The exit code of a script, with errors printed in one line each.

    Our own exceptions have an `exit_code`: 2 for what the user can correct (config, data, model), 1 for what fails
    later, 128 + the number of the signal that stopped the run. debug: print the traceback, too.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if code > 128:
            print(f"{name}: {error}", file=sys.stderr)
            return code
        if debug:
            traceback.print_exc()
        for line in str(error).split("\n") if getattr(error, "one_line_each", False) else [message_of(error)]:
            print(f"{name}: error: {one_line(line)}", file=sys.stderr)
        return code
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def message_of(error: Exception) -> str:
    """The message for the user."""
    if isinstance(error, OSError):
        return describe(error)
    message = str(error)
    if "\nOriginal Traceback" in message:  # raised in a DataLoader worker: the last line is "Type: message"
        message = message.strip().splitlines()[-1].partition(": ")[2]
    if hasattr(error, "exit_code"):
        return message
    if message.startswith("DataLoader worker"):
        return f"{message.rstrip('. ')}: the system may be out of memory: lower dataset_kwargs.num_workers"
    return f"unexpected {type(error).__name__}: {' '.join(message.split())}; --debug shows the traceback"


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars and advice: the only progress bar is ours."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
