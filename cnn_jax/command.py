"""How a command of this project ends: in one line for a mistake, and in the exit code."""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from cnn_jax.errors import UserError, printable
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

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("interrupted; nothing was left half done", file=sys.stderr)
            sys.exit(130)
        except Stopped as stopped:
            print(f"{stopped}; the same command resumes", file=sys.stderr)
            sys.exit(stopped.exit_code)

    app.run(guarded, flags_parser=parse)


def _fail(line: str) -> NoReturn:
    print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(2)
