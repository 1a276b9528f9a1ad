"""--mode=verify: trains a finished run again in a temporary folder, and compares the parameters."""

import sys
import tempfile
from pathlib import Path

from rich.console import Console

from cnn_jax import fields, trees
from cnn_jax.errors import UserError
from cnn_jax.fit import fit
from cnn_jax.runs import outcome
from cnn_jax.runs.folder import RunFolder, check_config
from cnn_jax.runs.log import RunLog
from cnn_jax.runs.stop import Stopped
from cnn_jax.tools import Request
from cnn_jax.tools.evaluate import load_dataset


def run(request: Request) -> None:
    """Prints whether the parameters are reproduced bit by bit; exits with 1 if they are not.

    Raises:
        UserError: the run is not finished, or its config or images have changed since.
    """
    config, workdir = request.config, request.workdir
    check_config(workdir, config)
    outcome.check_single(workdir)
    finished = outcome.read(workdir)
    if finished is None:
        raise UserError(f"{workdir} is not finished, so there is nothing to compare with")
    if (workdir / "classifier.json").exists():
        raise UserError(f"{workdir} was not trained by --mode=train, but by --mode=features")
    if changes := fields.differences(fields.from_dict(finished["config"]), config):
        raise UserError(f"{workdir} reports on another config ({'; '.join(changes)})")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    dataset = load_dataset(config, console)
    if dataset.sha256 != finished["data"]["sha256"]:
        raise UserError(f"the images are not those that {workdir} was trained on")
    with tempfile.TemporaryDirectory(prefix="cnn_jax_verify_") as name:
        folder = RunFolder(Path(name), lambda path: RunLog(path, console))
        try:
            result = fit(config, dataset, folder)
        except Stopped as stopped:
            console.print("verification stopped; it starts from the beginning next time")
            sys.exit(stopped.exit_code)
    found = trees.sha256(result.state.eval_variables["params"])
    if found == finished["params_sha256"]:
        console.print(f"params_sha256 matches: {found}")
        return
    console.print(f"params_sha256 differs: {finished['params_sha256']} in {workdir}, {found} now")
    changes = outcome.environment_changes(finished)
    console.print("\n".join(changes) or "versions and device are the same")
    sys.exit(1)
