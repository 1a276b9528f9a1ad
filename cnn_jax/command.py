"""How a command of this project ends: in one line for a mistake, and in the exit code."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags

from cnn_jax.errors import UserError, one_line, printable
from cnn_jax.stop import Stopped


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `main` on the other arguments, the command's name first.

    Every mistake of the user's is one line on stderr and exit code 2; a run that was stopped ends
    with 128 + the signal.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            _fail(str(error).splitlines()[0])
        except SystemExit:
            sys.exit(0)  # absl has printed the help that was asked for, and would exit with 1

    app.run(lambda argv: guarded(main, argv), flags_parser=parse)


def guarded(main: Callable[..., None], *args: Any) -> None:
    """Runs `main(*args)`, and ends the process as `run` says."""
    try:
        main(*args)
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # of a disk that is full or gone, where nothing says it better
        _fail(one_line(error))
    except KeyboardInterrupt:
        print("interrupted; nothing was left half done", file=sys.stderr)
        sys.exit(130)
    except Stopped as stopped:
        print(f"{stopped}; the same command resumes", file=sys.stderr)
        sys.exit(stopped.exit_code)


def _fail(line: str) -> NoReturn:
    print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(2)
