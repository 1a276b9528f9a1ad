"""The modes of the command: one module each, with a function `run(request: Request) -> None`."""

from dataclasses import dataclass
from pathlib import Path

from cnn_jax.config import Config


@dataclass(frozen=True)
class Mode:
    """What the command line needs to know about a mode."""

    help: str
    """Its sentence in `--help`."""
    reads_run: bool = True
    """Whether it uses an existing run: without --config, the config is that of --workdir."""
    takes_paths: bool = False
    """Whether arguments may follow the flags."""


MODES = {
    "train": Mode("Train or resume a run, and evaluate it on the test set once.", reads_run=False),
    "evaluate": Mode("Evaluate a run on the test set, class by class."),
    "predict": Mode(
        "Classify the image files and folders that follow the flags.", takes_paths=True
    ),
    "summary": Mode("Print the layers with shapes, parameters and FLOPs, and what is frozen."),
    "figures": Mode("Draw the figures of a finished run, and write its report.html."),
    "features": Mode("Write the outputs of --layer, and train --classifier on them."),
    "compare": Mode(
        "Compare the configs and results of the runs that follow the flags.",
        reads_run=False,
        takes_paths=True,
    ),
    "verify": Mode("Reproduce a finished run, and compare the parameters bit by bit."),
    "export": Mode("Write the trained network for use without this project."),
    "find_rate": Mode(
        "Train a few steps with a rising learning rate, and suggest one.", reads_run=False
    ),
}
"""The modes by name, in the order of `--help`."""

CLASSIFIERS = ("svm", "random_forest", "mlp", "logistic", "knn")
"""The classifiers of scikit-learn that --classifier names."""


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    mode: str
    config: Config
    workdir: Path
    given: frozenset[str] = frozenset()
    """Dotted names of the fields that flags set."""
    adopts: bool = False
    """Whether `config` still needs the network of `init.checkpoint` (`pretrained.adopt`)."""
    checkpoint: str = ""
    """"latest", "best", or "" for the checkpoint that the run itself reported on."""
    paths: tuple[str, ...] = ()
    """The arguments that follow the flags."""
    json: bool = False
    top_k: int = 1
    min_probability: float = 0.0
    output: str = ""
    explain: str = ""
    layer: str = ""
    classifier: str = ""
    format: str = "jax"
    hooks: tuple[str, ...] = ()
    """Functions in the user's own files, as "my_file.py:name"."""
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
