"""Convolutional image classifiers in JAX: train, evaluate, inspect and use them.

python -m cnn_jax.main --config=NAME [--set=section.field=value ...] [--workdir=DIR] [--mode=MODE]
"""

import sys
from pathlib import Path

from absl import flags

from cnn_jax import command, config, configs
from cnn_jax.config import Config
from cnn_jax.errors import UserError

MODES = (
    "train",
    "evaluate",
    "summary",
    "predict",
    "verify",
    "features",
    "figures",
    "export",
    "find_rate",
)
OF_A_RUN = ("evaluate", "summary", "predict", "verify", "features", "figures", "export")
"""The modes that read a trained workdir, and take its config where none is named."""

_CONFIG = flags.DEFINE_string("config", "quickstart", f"The config, one of:\n{configs.listing()}")
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "A field to change, as section.field=value; may be repeated. Fields:\n  "
    + " ".join(config.all_fields()),
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder. Default: runs/CONFIG, with the changed fields in its name."
)
_MODE = flags.DEFINE_string(
    "mode",
    "train",
    "train: train, or resume, and evaluate on the test set once; "
    "evaluate: evaluate a workdir's network again; "
    "summary: print layers, shapes, parameters and FLOPs; "
    "predict: classify the image files and folders named after the flags; "
    "verify: train a finished workdir's run anew elsewhere and compare the bits of the parameters; "
    "features: write the activations of features.layer, and train features.classifier on them; "
    "figures: draw a finished run, and write its report.html anew; "
    "export: write the predictor for use without this project; "
    "find_rate: train a few steps with a rising learning rate, and suggest one.",
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    None,
    ["latest", "best"],
    "Which parameters the modes of a trained workdir use. Default: those the run reported on.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Train with other processes, which srun or mpirun started."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Without srun or mpirun: HOST:PORT where process 0 listens."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Without srun or mpirun: how many processes there are."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Without srun or mpirun: this process' number, from 0."
)
_JSON = flags.DEFINE_bool("json", False, "Print predictions as JSON.")


def main(argv: list[str]) -> None:
    """Runs one mode."""
    mode = _MODE.value
    if mode not in MODES:
        raise UserError(f"--mode={mode}: expected {'|'.join(MODES)}{config.nearest(mode, MODES)}")
    if argv[1:] and mode != "predict":
        raise UserError(f"unexpected argument {argv[1]}; fields are changed by --set=field=value")
    base = configs.get(_CONFIG.value)
    from_workdir = mode in OF_A_RUN and bool(_WORKDIR.value) and not _CONFIG.present
    if from_workdir:
        base = config.load(Path(str(_WORKDIR.value)) / "config.json")
    wanted = config.with_overrides(base, _SET.value)
    workdir = Path(_WORKDIR.value or default_workdir(wanted, _SET.value))
    if _DISTRIBUTED.value and mode != "train":
        raise UserError(f"--distributed is for --mode=train, not {mode}")

    # These import JAX, so they wait until the flags are known to be right.
    from cnn_jax import devices, modes, transfer

    if wanted.init.checkpoint and not from_workdir:
        wanted = config.with_overrides(transfer.adopt(base, wanted.init), _SET.value)
    modes.set_up_jax(wanted)
    if _DISTRIBUTED.value:
        devices.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    else:
        devices.use_cores(wanted.train.batch_size)
    if mode == "train":
        modes.train(wanted, workdir)
    elif mode == "summary":
        modes.summary(wanted)
    elif mode == "evaluate":
        modes.evaluate(wanted, workdir, _CHECKPOINT.value or "")
    elif mode == "verify":
        sys.exit(0 if modes.verify(wanted, workdir) else 1)
    elif mode == "features":
        modes.features(wanted, workdir, _CHECKPOINT.value or "")
    elif mode == "figures":
        modes.figures(wanted, workdir, _CHECKPOINT.value or "")
    elif mode == "find_rate":
        modes.find_rate(wanted, workdir)
    elif mode == "export":
        modes.export(wanted, workdir, _CHECKPOINT.value or "")
    else:
        modes.predict(wanted, workdir, _CHECKPOINT.value or "", argv[1:], _JSON.value)


def default_workdir(wanted: Config, overrides: list[str]) -> str:
    """Returns runs/NAME, followed by the overrides that make the run another one."""
    changed = [o.replace("/", "_") for o in overrides if not o.startswith(config.NOT_OF_A_RUN)]
    return "runs/" + "-".join([wanted.name, *changed])


def run() -> None:
    """The command, as a script of its own."""
    command.run(main)


if __name__ == "__main__":
    run()
