"""From a command line to the tool that it asks for: `python -m cnn_jax.main --help`."""

import importlib
import sys
from dataclasses import replace

from cnn_jax import command
from cnn_jax.errors import UserError, one_line


def main(argv: list[str]) -> None:
    """Runs one mode of `tools`. `argv` starts with the command's name."""
    request = command.parse(argv[1:])
    try:  # These import JAX, so they wait until the flags are known to be right.
        from cnn_jax import backend, pretrained
    except ValueError as error:  # A variable of the environment, such as JAX_ENABLE_X64=maybe.
        raise UserError(f"JAX can't be imported: {one_line(error)}") from None

    if request.adopts:
        config = pretrained.adopt(request.config, request.given)
        request = replace(request, config=config)
    backend.set_up(request.config, one_of_several=request.distributed)
    if request.distributed:
        from cnn_jax.runs import processes

        processes.join(request.coordinator, request.num_processes, request.process_id)
    backend.check_devices()
    importlib.import_module(f"cnn_jax.tools.{request.mode}").run(request)


def run() -> None:
    """Runs the command, and ends the process with its exit code."""
    command.guarded(main, sys.argv)


if __name__ == "__main__":
    run()
