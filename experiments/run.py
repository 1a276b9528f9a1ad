"""Experiments: see how far one is, train what is missing of it, and report on it.

python -m experiments.run NAME (list | run | report) [--only=PATTERN] [--seeds=N] [--runs=DIR]

`run` trains or resumes what is neither in experiments/results nor finished in DIR/NAME;
`report` writes what is known to experiments/results/NAME. NAME is a file of this folder that has an
EXPERIMENT, such as chapter, airbench or dropout.
"""

import importlib
import math
import shlex
from pathlib import Path

from absl import flags

from cnn_jax import command
from cnn_jax.config import nearest
from cnn_jax.errors import UserError

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
EXPERIMENTS = tuple(
    sorted(path.stem for path in FOLDER.glob("*.py") if "\nEXPERIMENT = " in path.read_text())
)
COMMANDS = ("list", "run", "report")

_ONLY = flags.DEFINE_string("only", "*", "Variants to list or run: a pattern such as 'vgg*'.")
_SEEDS = flags.DEFINE_integer("seeds", None, "Seeds of each variant: 0, 1, ...", lower_bound=1)
_RUNS = flags.DEFINE_string("runs", "runs/experiments", "The folder of the runs' workdirs.")


def main(argv: list[str]) -> None:
    """Runs one command."""
    if len(argv) != 3:
        raise UserError(f"expected NAME and one of {'|'.join(COMMANDS)}; see --help")
    name, what = argv[1:]
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise UserError(f"unknown experiment {name}{nearest(name, EXPERIMENTS)}; known: {known}")
    if what not in COMMANDS:
        raise UserError(f"{what}: expected {'|'.join(COMMANDS)}{nearest(what, COMMANDS)}")
    if what == "report" and _ONLY.present:
        raise UserError("report is on all variants; --only is for list and run")

    # These import JAX, so they wait until the names are known to be right.
    from rich.console import Console

    from cnn_jax import devices, modes
    from experiments import rows, runner

    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    variants = rows.chosen_variants(experiment, _ONLY.value)
    others = [RESULTS / other for other in EXPERIMENTS if other != name]
    store = rows.Store(experiment, Path(_RUNS.value) / name, RESULTS / name, others)
    seeds = _SEEDS.value or experiment.seeds
    modes.set_up_jax(experiment.variants[variants[0]])
    sizes = [variant.train.batch_size for variant in experiment.variants.values()]
    devices.use_cores(math.gcd(*sizes))
    console = Console(highlight=False, soft_wrap=True)
    if what == "list":
        console.print(runner.states(store, variants, seeds))
    elif what == "run":
        with runner.Board(console) as board:
            runner.train_missing(store, variants, seeds, board)
        again = f"python -m experiments.run {name} report{_given()}"
        console.print(f"{again} writes this to {RESULTS / name}", markup=False)
    else:
        from experiments import report  # Matplotlib tells of its fonts until JAX is set up.

        seeds = max(seeds, store.seeds)
        report.write(name, store, seeds, RESULTS / name)
        console.print((RESULTS / name / "results.md").read_text(), markup=False)


def _given() -> str:
    """Returns the options that `report` needs as well to find what `run` has trained."""
    seeds = f" --seeds={_SEEDS.value}" if _SEEDS.value is not None else ""
    elsewhere = _RUNS.value != _RUNS.default
    return seeds + (f" --runs={shlex.quote(_RUNS.value)}" if elsewhere else "")


if __name__ == "__main__":
    command.run(main)
