"""Lists, trains and reports an experiment.

python -m experiments.run NAME (list | run | report) [--only=PATTERN] [--seeds=N] [--runs=DIR]

`run` trains or resumes what is neither in experiments/results nor finished in DIR/NAME; `report`
writes all results to experiments/results/NAME. NAME is a file of this folder that defines
EXPERIMENT, such as chapter, airbench or dropout.
"""

import fnmatch
import importlib
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from cnn_jax import command
from cnn_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from experiments.spec import Experiment

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
EXPERIMENTS = sorted(
    path.stem for path in FOLDER.glob("*.py") if "\nEXPERIMENT = " in path.read_text()
)
COMMANDS = ("list", "run", "report")

_ONLY = flags.DEFINE_string("only", "*", "Variants to list or run: a pattern such as 'vgg*'.")
_SEEDS = flags.DEFINE_integer("seeds", None, "Seeds of each variant: 0, 1, ...", lower_bound=1)
_RUNS = flags.DEFINE_string("runs", "runs/experiments", "The folder of the runs' workdirs.")


def load(name: str) -> "Experiment":
    """Returns the experiment of that name."""
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def main(argv: list[str]) -> None:
    """Runs one command."""
    if len(argv) != 3:
        raise UserError(f"expected NAME and one of {'|'.join(COMMANDS)}; see --help")
    name, what = argv[1:]
    if name not in EXPERIMENTS:
        guess = nearest(name, EXPERIMENTS)
        raise UserError(f"unknown experiment {name}{guess}; known: {', '.join(EXPERIMENTS)}")
    if what not in COMMANDS:
        raise UserError(f"{what}: expected {'|'.join(COMMANDS)}{nearest(what, COMMANDS)}")
    if what == "report" and _ONLY.present:
        raise UserError("report covers all variants; --only is for list and run")
    logging.set_verbosity(logging.WARNING)  # Matplotlib logs its fonts at INFO

    # These import JAX, so they wait until the names are checked.
    from rich.console import Console

    from cnn_jax import backend
    from experiments import publish, training
    from experiments.store import Store

    experiment = load(name)
    variants = chosen_variants(experiment, _ONLY.value)
    others = [RESULTS / other for other in EXPERIMENTS if other != name]
    store = Store(experiment, Path(_RUNS.value) / name, RESULTS / name, others)
    seeds = _SEEDS.value or experiment.seeds
    base = experiment.variants[variants[0]]
    sizes = [config.train.batch_size for config in experiment.variants.values()]
    backend.set_up(replace(base, train=replace(base.train, batch_size=math.gcd(*sizes))))
    console = Console(highlight=False, soft_wrap=True)
    if what == "list":
        console.print(training.states(store, variants, seeds))
    elif what == "run":
        training.train_missing(store, variants, seeds, console)
        following = f"python -m experiments.run {name} report{_options()}"
        console.print(f"{following} writes this to {RESULTS / name}", markup=False)
    else:
        publish.write(name, store, max(seeds, store.seeds), RESULTS / name)
        console.print((RESULTS / name / "results.md").read_text(), markup=False)


def chosen_variants(experiment: "Experiment", pattern: str) -> list[str]:
    """Returns the variants whose names match an fnmatch pattern.

    Raises:
        UserError: there is none.
    """
    chosen = fnmatch.filter(experiment.variants, pattern)
    if not chosen:
        known = ", ".join(experiment.variants)
        guess = nearest(pattern, experiment.variants)
        raise UserError(f"--only={pattern} matches no variant{guess}: {known}")
    return chosen


def _options() -> str:
    """Returns the options that `report` needs as well to find what `run` has trained."""
    seeds = f" --seeds={_SEEDS.value}" if _SEEDS.value is not None else ""
    elsewhere = _RUNS.value != _RUNS.default
    return seeds + (f" --runs={shlex.quote(_RUNS.value)}" if elsewhere else "")


if __name__ == "__main__":
    command.run(main)
