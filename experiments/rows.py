"""What is run and what came of it: runs, their rows and curves, in workdirs and in CSV files.

A row tells everything of a run that a report needs. It is found in the run's workdir or in the
committed results, and counts only while the config it was made with is the one that is wanted.
"""

import csv
import fnmatch
import functools
import hashlib
import io
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnn_jax import config, data, files, models, runs
from cnn_jax.config import Config, nearest
from cnn_jax.errors import UserError, one_line
from cnn_jax.run_log import read_metrics
from experiments.spec import (
    TUNING_FRACTION,
    AgainstField,
    AgainstMeasured,
    Bars,
    Experiment,
    Points,
)

Row = dict[str, Any]

COLUMNS = (
    "variant",
    "seed",
    "config_sha256",
    "test_accuracy",
    "test_accuracy_plain",
    "test_loss",
    "train_accuracy",
    "train_loss",
    "validation_accuracy",
    "best_epoch",
    "epochs",
    "steps",
    "param_count",
    "flops_per_image",
    "images_per_second",
    "seconds",
    "params_sha256",
)
SURROUNDINGS = ("data", "device", "versions")
CURVE = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
)
# What an older version did not note is None.
_BLANK: Row = dict.fromkeys((*COLUMNS, *SURROUNDINGS))
# SHA-256 of test images, and what they are called beside a result; the source says where they lie.
_DATA_NAMES = {
    "57364becc1e313e9d0642408700f2d3dce05dbdf2d312658433226d9da72f76c": "CIFAR-10 (JPEG copy)"
}
_TEXTS = {"variant", "config_sha256", "params_sha256", *SURROUNDINGS}

DERIVED: Mapping[str, Callable[[Row], float]] = {
    "train_flops": lambda row: (
        3 * row["flops_per_image"] * row["images_per_second"] * row["seconds"]
    )
}
"""Columns that follow from the others. Training an image is counted as three times classifying it,
since the gradients by inputs and by kernels are products of the same size as the forward one."""

EPOCHS_RUN = "epochs_run"
"""Epochs until training stopped, where `epochs` says of which one the result is: the lines of the
run's curve."""

Images = tuple[str, int, tuple[str, ...]]
"""What of a config chooses the images, as far as their name beside a result goes."""

load_data = functools.lru_cache(maxsize=1)(data.load)
"""Experiments go through their variants one by one, and most share the images."""


@dataclass(frozen=True)
class Run:
    """One training: a variant's name and its config, seed included."""

    variant: str
    config: Config

    @property
    def name(self) -> str:
        """The name of its workdir."""
        return f"{self.variant}-seed{self.config.seed}"

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of its config."""
        return config_sha256(self.config)


def config_sha256(wanted: Config) -> str:
    """Returns 16 hex digits that stand for all that a run depends on beside the code.

    Only values that are not the default's play a part, so a field that is added to the config
    later, with a default that changes nothing, makes no result void.
    """
    found, default = config.flatten(wanted), config.flatten(Config())
    unlike = {
        name: value
        for name, value in found.items()
        if value != default[name] and name != "name" and not name.startswith(config.NOT_OF_A_RUN)
    }
    return hashlib.sha256(json.dumps(unlike, sort_keys=True).encode()).hexdigest()[:16]


def chosen_variants(experiment: Experiment, pattern: str) -> list[str]:
    """Returns the variants whose names match an fnmatch pattern, in the order of running.

    Raises:
        UserError: none does.
    """
    names = experiment.order or tuple(experiment.variants)
    chosen = fnmatch.filter(names, pattern)
    if not chosen:
        known = ", ".join(names)
        raise UserError(f"--only={pattern} matches no variant{nearest(pattern, names)}: {known}")
    return chosen


def tuning_runs(experiment: Experiment, variant: str) -> list[Run]:
    """Returns the runs that the variant's learning rate is chosen by; none if it is not tuned."""
    base = experiment.variants[variant]
    held_out = replace(base.data, validation=TUNING_FRACTION)
    return [
        Run(
            f"{variant}-lr{rate:g}",
            replace(base, data=held_out, optim=replace(base.optim, learning_rate=rate)),
        )
        for rate in experiment.rates.get(variant, ())
    ]


def final_runs(
    experiment: Experiment, variant: str, seeds: int, tuned: Iterable[Row | None]
) -> list[Run]:
    """Returns the variant's run of each seed; none while a row of its `tuning_runs` is missing.

    Raises:
        UserError: no learning rate gave a finite loss.
    """
    base, tuned = experiment.variants[variant], list(tuned)
    if rates := experiment.rates.get(variant, ()):
        found = [row for row in tuned if row]
        if len(found) < len(rates):
            return []
        finite = [
            (row["validation_accuracy"], rate)
            for row, rate in zip(found, rates, strict=True)
            if row["validation_accuracy"] is not None
        ]
        if not finite:
            raise UserError(f"{variant}: every learning rate diverged; try smaller ones")
        _, rate = max(finite, key=lambda pair: pair[0])  # of equals the first, so the smallest
        base = replace(base, optim=replace(base.optim, learning_rate=rate))
    return [Run(variant, replace(base, seed=seed)) for seed in range(seeds)]


def value(row: Row, column: str) -> float | None:
    """Returns what a row has in a column of a report: NaN if nothing, None if its run diverged."""
    if row["test_accuracy"] is None:
        return None
    known = {name: math.nan if found is None else found for name, found in row.items()}
    return DERIVED[column](known) if column in DERIVED else known[column]


def check_columns(experiment: Experiment) -> None:
    """Refuses a column or a field of the table or the figure that no run can have.

    Raises:
        UserError: names the nearest that there is.
    """
    fields = {name for name in config.flatten(Config()) if "." in name}
    columns = {*COLUMNS, EPOCHS_RUN, *DERIVED, *experiment.measured} - _TEXTS
    figure = experiment.figure
    wanted = [(name, fields if "." in name else columns) for name in experiment.columns]
    if isinstance(figure, Bars | AgainstMeasured):
        wanted += [(name, columns) for name in figure.columns]
    elif isinstance(figure, Points):
        wanted.append((figure.column, columns))
    elif isinstance(figure, AgainstField):
        wanted.append((figure.name, fields))
    for name, known in wanted:
        if name not in known:
            kind = "field" if known is fields else "column"
            raise UserError(
                f"{experiment.question} There is no {kind} {name}{nearest(name, known)}"
            )


class Store:
    """The rows and curves of an experiment, from workdirs and from committed results.

    A run of the same config in the results of `others` counts as well, unless this experiment
    looks at its runs in ways that the other did not.
    """

    def __init__(
        self, experiment: Experiment, workdirs: Path, results: Path, others: Iterable[Path] = ()
    ) -> None:
        check_columns(experiment)  # Not only once all is trained and waits to be reported.
        self.experiment = experiment
        self._workdirs = workdirs
        self._committed: dict[tuple[int, str], tuple[Row, list[Row]]] = {}
        own = _read_results(results)
        self._images: dict[Images, str] = {}
        self.seeds = 1 + max((row["seed"] or 0 for row, _ in own), default=-1)
        """One more than the largest seed in the committed results."""
        for row, curve in (*own, *(pair for path in others for pair in _read_results(path))):
            if self._tells_enough(row, curve):
                self._committed.setdefault((row["seed"], row["config_sha256"]), (row, curve))

    def _tells_enough(self, row: Row, curve: list[Row]) -> bool:
        return set(self.experiment.measured) <= set(row) and self._watched(row["epochs"], curve)

    def _watched(self, epochs: int | None, curve: list[Row]) -> bool:
        """Whether the test figures of every epoch are known, where they are asked for.

        `epochs` is None if the run diverged, which has no curve.
        """
        known = [line for line in curve if line["test_accuracy"] is not None]
        return not self.experiment.watch_test or (
            len(known) == len(curve) and len(known) >= (epochs or 0)
        )

    def workdir(self, run: Run) -> Path:
        """Returns the folder that a run is trained in."""
        return self._workdirs / run.name

    def count_only(self, run: Run) -> None:
        """Lets only rows of the images that the run is trained on here count from now on.

        A config names its images, but not which copy of them: that is known once they are read.
        Rows of configs that name others count as before.
        """
        if (images := _images(run)) not in self._images:
            self._images[images] = data_name(load_data(run.config.data))

    def unlike(self, wanted: Iterable[Run]) -> str:
        """Names two of the runs whose rows are of different images by one name; empty if none."""
        first: dict[Images, tuple[str, str]] = {}
        for run in wanted:
            if row := self.row(run):
                name, images = first.setdefault(_images(run), (run.name, row["data"]))
                if images != row["data"]:
                    return f"{name} is of {images}, {run.name} of {row['data']}"
        return ""

    def find(self, run: Run) -> tuple[Row, list[Row]] | None:
        """Returns a run's row and its lines of the curve, or None if it is not done."""
        images = self._images.get(_images(run))
        known = [pair for pair in self._known(run) if images in (None, pair[0]["data"])]
        if not known:
            return None
        row, curve = known[0]
        known = len(curve) if row["test_accuracy"] is not None else None  # None: it diverged.
        row = row | _identity(run) | {EPOCHS_RUN: known}
        return row, [line | {"variant": run.variant} for line in curve]

    def row(self, run: Run) -> Row | None:
        """Returns a run's row, or None if it is not done."""
        found = self.find(run)
        return found[0] if found else None

    def runs(self, variant: str, seeds: int) -> tuple[list[Run], list[Run]]:
        """Returns the runs that tune a variant, and those of its seeds as far as known."""
        tuning = tuning_runs(self.experiment, variant)
        final = final_runs(self.experiment, variant, seeds, map(self.row, tuning))
        if variant in self.experiment.borrowed:
            final = [run for run in final if self._known(run)] or final[:1]
        return tuning, final

    def _known(self, run: Run) -> list[tuple[Row, list[Row]]]:
        """Returns what a workdir and the committed results have of a run, of whatever images."""
        found = self._in_workdir(run), self._committed.get((run.config.seed, run.sha256))
        return [pair for pair in found if pair]

    def _in_workdir(self, run: Run) -> tuple[Row, list[Row]] | None:
        workdir = self.workdir(run)
        path = workdir / "row.json"
        if path.exists():
            row, curve = _read_row(path)
            if row["config_sha256"] == run.sha256 and self._tells_enough(row, curve):
                return row, curve
        if not (workdir / "summary.json").exists() or self.other_config(run) or self.unwatched(run):
            return None
        return self.keep(run, _summarize(self.experiment, run, workdir), _curve(run, workdir))

    def keep(self, run: Run, row: Row, curve: list[Row]) -> tuple[Row, list[Row]]:
        """Writes a row and its curve into the run's workdir, and returns them."""
        runs.write_json(self.workdir(run) / "row.json", {"row": row, "curve": curve})
        return row, curve

    def keep_diverged(self, run: Run, reason: str) -> None:
        """Notes that a run has no result because its loss was no longer finite."""
        row = {name: None for name in (*COLUMNS, *self.experiment.measured)}
        row |= _identity(run) | _surroundings(run, runs.device(), runs.versions())
        self.keep(run, row, [])
        (self.workdir(run) / "diverged.txt").write_text(reason + "\n")

    def other_config(self, run: Run) -> list[str]:
        """Returns the fields in which a workdir's config differs from the run's."""
        path = self.workdir(run) / "config.json"
        return config.differences(config.load(path), run.config) if path.exists() else []

    def unwatched(self, run: Run) -> bool:
        """Whether a finished workdir lacks test figures of epochs that the experiment asks for.

        They can't be made up for: the parameters of past epochs are gone.
        """
        workdir = self.workdir(run)
        summary = runs.finished(workdir)
        return bool(summary) and not self._watched(summary["epochs"], _curve(run, workdir))

    def state(self, run: Run) -> str:
        """Says in a few words how far a run is."""
        if row := self.row(run):
            return "done" if row["test_accuracy"] is not None else "diverged"
        if self.other_config(run):
            return "missing; its workdir is another config's"
        if self.unwatched(run):
            return "missing; its workdir has no test accuracy by epoch"
        saved = self.workdir(run) / "checkpoints/latest"
        steps = [int(p.name) for p in saved.glob("*") if p.name.isdigit()]
        return f"interrupted at step {max(steps)}" if steps else "missing"


def _images(run: Run) -> Images:
    wanted = run.config.data
    return wanted.name, wanted.image_size, wanted.classes


def _identity(run: Run) -> Row:
    return {"variant": run.variant, "seed": run.config.seed, "config_sha256": run.sha256}


def check_images(workdir: Path, dataset: data.ImageDataset) -> None:
    """Refuses a workdir whose finished run is of other images; an unfinished one passes.

    Raises:
        UserError: says to remove it.
    """
    summary = runs.finished(workdir)
    if summary and summary["data"]["sha256"] != dataset.sha256:
        raise UserError(
            f"{workdir} was trained on other images; remove it, or choose another --runs"
        )


def _summarize(experiment: Experiment, run: Run, workdir: Path) -> Row:
    """Returns the row of a finished run, with what the experiment measures on its network."""
    check_images(workdir, load_data(run.config.data))
    summary = runs.finished(workdir) or {}
    image_shape, n_classes = data.describe(run.config.data)
    layers = models.summarize(models.build(run.config.model, n_classes), image_shape)
    validated = {x["epoch"]: x["validation_accuracy"] for x in _curve(run, workdir)}
    row = {
        **_identity(run),
        **{name: summary[name] for name in COLUMNS if name in summary and name != "seed"},
        "validation_accuracy": validated.get(summary["epochs"]),
        "flops_per_image": sum(layer.flops for layer in layers),
    }
    measured = {}
    if experiment.measure:
        trained = runs.load_trained(workdir, run.config)
        measured = experiment.measure(trained, load_data(run.config.data))
    surroundings = _surroundings(run, summary["device"], summary["versions"])
    row = {name: row[name] for name in COLUMNS} | measured | surroundings
    infinite = [x for x, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    return row | dict.fromkeys(infinite)  # None, as CSV and JSON hold nothing else.


def _curve(run: Run, workdir: Path) -> list[Row]:
    """Returns a line an epoch, with None for what was not evaluated."""
    identity = {"variant": run.variant, "seed": run.config.seed}
    return [
        {**identity, **{name: line.get(name) for name in CURVE}}
        for line in read_metrics(workdir)
        if "epoch" in line
    ]


def _surroundings(run: Run, device: dict[str, Any], versions: dict[str, str]) -> Row:
    """Returns in words what a run learnt from, what it ran on, and the versions of what ran it."""
    where = f"{device['count']} x {device['kind']}, {device['cpu_count']} cores"
    return {
        "data": data_name(load_data(run.config.data)),
        "device": f"{where} of {platform.machine()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def data_name(dataset: data.ImageDataset) -> str:
    """Returns what images are called beside a result."""
    images = hashlib.sha256(dataset.test.images.tobytes()).hexdigest()
    return _DATA_NAMES.get(images, dataset.source)


def _read_row(path: Path) -> tuple[Row, list[Row]]:
    """Returns what `Store.keep` wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        known = json.loads(path.read_text())
        row, curve = known["row"], known["curve"]
        needed = {"config_sha256", "test_accuracy", "data"}
        if needed <= set(row) and all(set(CURVE) <= set(line) for line in curve):
            return _BLANK | row, curve
        problem = "it is not what a run has left"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = one_line(error)
    raise UserError(f"{path} can't be read: {problem}; remove it, and it is made anew")


def _read_results(folder: Path) -> list[tuple[Row, list[Row]]]:
    """Returns the rows of a folder that a report was written to, each with its curve."""
    curves: dict[tuple[str, int], list[Row]] = {}
    for line in read_csv(folder / "curves.csv"):
        curves.setdefault((line["variant"], line["seed"]), []).append(line)
    rows = [_BLANK | row for row in read_csv(folder / "results.csv")]
    return [(row, curves.get((row["variant"], row["seed"]), [])) for row in rows]


def read_csv(path: Path) -> list[Row]:
    """Returns the rows of a file that `write_csv` wrote; none where there is no file.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [
                {name: _value(name, text) for name, text in line.items()}
                for line in csv.DictReader(file)
            ]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def _value(name: str, text: str) -> Any:
    if text == "":
        return None
    return text if name in _TEXTS else json.loads(text)


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Row]) -> None:
    """Writes those columns as a whole or not at all; None is an empty cell, floats keep bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, text.getvalue())
