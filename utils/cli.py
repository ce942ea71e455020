"""What the scripts share: arguments, quiet libraries, and errors in one line.

Nothing here imports torch or transformers: `--help` and errors of a config are there at once.
"""

import argparse
import difflib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from utils.config.strict_json import ConfigError
from utils.errors import describe
from utils.text import one_line, printable, shorten
from utils.training.signals import Stopped

LOST_WORKER = "DataLoader worker"  # how torch's messages begin, of a process that was killed
LONGEST = 50  # signs of an unknown argument that are compared
INTERRUPTED = 128 + signal.SIGINT


def user_path(name: str) -> Path:
    """A path of the command line; `~` in front is the user's home, also in `--flag=~/x`."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (that of Path fails for an unknown ~user)


class OneLineParser(argparse.ArgumentParser):
    """Usage errors in one line, with exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """For an unknown argument, names the flag that it resembles."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            wrong = next((text for text in unknown if text.startswith("--")), unknown[0]).partition("=")[0]
            near = difflib.get_close_matches(wrong[:LONGEST], self._option_string_actions, n=1)
            self.error(f"unknown argument {shorten(wrong) or repr(wrong)}"
                       + (f": did you mean {near[0]}?" if near else ""))
        return options


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
    """The exit code of a script: 2 for what the user can mend (config, data, model), 1 for what went wrong later.

    An exception of ours says which in its `exit_code`. debug: show the traceback of an error.
    """
    try:
        return command()
    except Stopped as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        return fail(name, describe(error), 1, debug)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is not None:
            # Only a config has several lines, one for each error.
            return fail(name, str(error) if isinstance(error, ConfigError) else printable(told(error)), code, debug)
        if told(error).startswith(LOST_WORKER):
            return fail(name, f"{told(error).strip().rstrip('.')}: most often because memory is full: lower "
                        "dataset_kwargs.num_workers or end other programs, and start the same command again",
                        1, debug)
        # no kind that is foreseen, so a fault of this program
        what = f"unexpected {type(error).__name__}: {' '.join(told(error).split())}"
        return fail(name, f"{what}; this is a fault of the program: --debug shows where it is", 1, debug)
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def told(error: Exception) -> str:
    """Its message; of an error in a worker process without the traceback that torch puts before it."""
    text = str(error)
    if "\nOriginal Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def fail(name: str, message: str, code: int, debug: bool) -> int:
    if debug:
        print("\n".join(map(printable, traceback.format_exc().split("\n"))), file=sys.stderr)
    for line in message.split("\n"):
        print(f"{name}: error: {one_line(line)}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """One progress bar a phase is ours; the libraries' own, and their advice, would hide it."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
