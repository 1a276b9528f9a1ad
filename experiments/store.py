"""The runs of an experiment, and the rows of those that are done: in workdirs and in results/.

A row belongs to the whole config of its run, and to the images by their SHA-256. Fields that do
not change a result, such as the section `runtime`, are not part of either.
"""

import csv
import functools
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cnn_jax
from cnn_jax import data, fields, files
from cnn_jax.config import Config, DataConfig
from cnn_jax.errors import UserError, one_line
from cnn_jax.runs.outcome import write_json
from experiments.spec import PRETRAINED, Experiment
from experiments.tables import CURVE, PROVENANCE, RESULTS, TEXTS, Row, Table


@functools.lru_cache(maxsize=1)
def load_data(config: DataConfig, cache_dir: str) -> data.ImageDataset:
    """Returns the images of a config. The last ones are kept, since most runs share them."""
    return data.load(config, cache_dir)


@dataclass(frozen=True)
class Run:
    """One training: a variant's name and its config, seed included."""

    variant: str
    config: Config
    pretraining: Config | None = None
    """The config of the network that `init.checkpoint=PRETRAINED` stands for."""

    @property
    def name(self) -> str:
        """The name of its workdir."""
        return f"{self.variant}-seed{self.config.seed}"

    @functools.cached_property
    def key(self) -> str:
        """A text that is equal for equal configs, whatever the variant is called."""
        configs = [self.config, self.pretraining] if self.pretraining else [self.config]
        return json.dumps([fields.identity(one) for one in configs], sort_keys=True)


class Store:
    """The rows of an experiment, from its workdirs and from committed results.

    A run with an equal config in the results of `others` counts as well, unless it lacks something
    that this experiment measures.
    """

    def __init__(
        self, experiment: Experiment, workdirs: Path, results: Path, others: Iterable[Path] = ()
    ) -> None:
        self.experiment = experiment
        self._workdirs = workdirs
        self._rows: dict[str, list[Row]] = {}
        self.images: dict[DataConfig, str] = {}
        """SHA-256 of the images of each config that was loaded here. Rows of the same config but
        of other images no longer count."""
        seeds = [
            row["seed"]
            for row in read_csv(results / "results.csv")
            if row["variant"] in experiment.variants
        ]
        self.seeds = 1 + max(seeds, default=-1)
        """One more than the largest seed in the committed results."""
        for folder in (*sorted(workdirs.glob("*/")), results, *others):
            for key, row in _read(folder):
                if self._is_complete(row):
                    self._rows.setdefault(key, []).append(row)

    def _is_complete(self, row: Row) -> bool:
        """Returns whether a row has all that the experiment measures and draws."""
        watched = [line for line in row["curve"] if line["test_accuracy"] is not None]
        every_epoch = len(row["curve"]) == len(watched) >= (row["epochs"] or 0)
        has_curve = every_epoch or not self.experiment.figure.watch_test
        return has_curve and set(self.experiment.measured) <= set(row)

    def workdir(self, run: Run) -> Path:
        """Returns the folder that a run is trained in."""
        return self._workdirs / run.name

    def row(self, run: Run) -> Row | None:
        """Returns a run's row, or None if it is not done."""
        images = self.images.get(run.config.data)
        for row in self._rows.get(run.key, []):
            if images in (None, row["data_sha256"]):
                name = {"variant": run.variant, "seed": run.config.seed}
                return row | name | {"curve": [line | name for line in row["curve"]]}
        return None

    def keep(self, run: Run, row: Row) -> Row:
        """Writes a new row into the run's workdir, and returns it with the run's name."""
        known = [one for rows in self._rows.values() for one in rows]
        names = {one["data_sha256"]: one["data"] for one in known}
        row |= {"data": names.get(row["data_sha256"], row["data"])}
        self._rows.setdefault(run.key, []).insert(0, row)
        row = self.row(run) or row
        self.write(self.workdir(run), {run: row})
        return row

    def write(self, folder: Path, rows: Mapping[Run, Row], **about: Any) -> None:
        """Writes results.csv, curves.csv, and about.json with the configs of all runs."""
        folder.mkdir(parents=True, exist_ok=True)
        curves = [line for row in rows.values() for line in row["curve"]]
        columns = (*RESULTS, *self.experiment.measured, *PROVENANCE)
        write_csv(folder / "curves.csv", ("variant", "seed", *CURVE), curves)
        write_csv(folder / "results.csv", columns, rows.values())
        write_json(folder / "about.json", {**about, "configs": _configs_to_json(rows)})

    def runs(self, variant: str, seeds: int) -> tuple[list[Run], list[Run]]:
        """Returns the runs that tune a variant, and one of each seed once its rate is known.

        Raises:
            UserError: training diverged at every learning rate.
        """
        tuning = self._tuning_runs(variant)
        final = self._final_runs(variant, seeds, tuning)
        if variant in self.experiment.borrowed:
            final = [run for run in final if run.key in self._rows] or final[:1]
        return tuning, final

    def pretraining_run(self) -> Run | None:
        """Returns the run that trains the network that others start from."""
        config = self.experiment.pretraining
        return Run("pretrained", config) if config else None

    def all_runs(self, variants: Iterable[str], seeds: int) -> list[Run]:
        """Returns every run of these variants that is known so far, each once."""
        runs = [run for variant in variants for part in self.runs(variant, seeds) for run in part]
        if any(run.pretraining for run in runs) and (pretraining := self.pretraining_run()):
            runs.insert(0, pretraining)
        return list({run.name: run for run in runs}.values())

    def _tuning_runs(self, variant: str) -> list[Run]:
        rates = self.experiment.rates.get(variant, ())
        if isinstance(rates, str):
            return self._tuning_runs(rates)
        runs = []
        for rate in rates:
            config = self.experiment.tuning(self.experiment.variants[variant])
            config = replace(config, optim=replace(config.optim, learning_rate=rate))
            runs.append(self._run(f"{variant}-lr{rate:g}", config))
        return runs

    def _final_runs(self, variant: str, seeds: int, tuning: list[Run]) -> list[Run]:
        config = self.experiment.variants[variant]
        if tuning:
            rows = [row for run in tuning if (row := self.row(run))]
            if len(rows) < len(tuning):
                return []
            accuracies = [row["validation_accuracy"] for row in rows]
            if all(accuracy is None for accuracy in accuracies):
                raise UserError(f"{variant}: training diverged at every learning rate; add others")
            best = max(accuracy for accuracy in accuracies if accuracy is not None)
            rate = tuning[accuracies.index(best)].config.optim.learning_rate  # the smallest of ties
            config = replace(config, optim=replace(config.optim, learning_rate=rate))
        configs = [replace(config, seed=seed) for seed in range(seeds)]
        if self.experiment.split_by_seed:
            configs = [replace(c, data=replace(c.data, split_seed=c.seed)) for c in configs]
        return [self._run(variant, config) for config in configs]

    def _run(self, variant: str, config: Config) -> Run:
        starts_pretrained = config.init.checkpoint == PRETRAINED
        return Run(variant, config, self.experiment.pretraining if starts_pretrained else None)

    def table(self, seeds: int) -> Table:
        """Returns all that is known of the variants."""
        final = {variant: self.runs(variant, seeds)[1] for variant in self.experiment.variants}
        return Table(
            configs={name: [run.config for run in runs] for name, runs in final.items()},
            rows={
                name: [row for row in map(self.row, runs) if row] for name, runs in final.items()
            },
        )

    def different_images(self, runs: Iterable[Run]) -> str:
        """Names two runs with equal data configs but rows of different images; "" if none have."""
        first: dict[DataConfig, tuple[Run, Row]] = {}
        for run in runs:
            if row := self.row(run):
                other, other_row = first.setdefault(replace(run.config.data, dir=""), (run, row))
                if row["data_sha256"] != other_row["data_sha256"]:
                    return f"{other.name} ({other_row['data']}) and {run.name} ({row['data']})"
        return ""

    def state(self, run: Run) -> str:
        """Returns how far a run is, in a few words."""
        if row := self.row(run):
            return "done" if row["epochs"] is not None else "diverged"
        saved = self.workdir(run).glob("**/checkpoints/latest/*")
        steps = [int(path.name) for path in saved if path.name.isdigit()]
        return f"interrupted at step {max(steps)}" if steps else "missing"


def _configs_to_json(runs: Iterable[Run]) -> dict[str, Any]:
    """Returns the identities of runs by name: what is common to all of them, and the rest."""
    identities = {run.name: fields.identity(run.config) for run in runs}
    sources = [fields.identity(run.pretraining) for run in runs if run.pretraining]
    every = list(identities.values())
    first = every[0] if every else {}
    common = {k: v for k, v in first.items() if all(one[k] == v for one in every)}
    rest = {
        name: {k: v for k, v in one.items() if k not in common} for name, one in identities.items()
    }
    source = sources[0] if sources else None
    return {
        "version": cnn_jax.__version__,
        "common": common,
        "runs": rest,
        "pretraining": source,
    }


def _keys(configs: Mapping[str, Any]) -> dict[str, str]:
    """Returns `Run.key` by name from what `configs_to_json` returned.

    A config that this version can't read has none: no run of today is equal to it.
    """
    version, keys = configs["version"], {}
    source = configs["pretraining"]
    for name, rest in configs["runs"].items():
        try:
            config = _config({**configs["common"], **rest}, version)
            starts_pretrained = config.init.checkpoint == PRETRAINED
            pretraining = _config(source, version) if starts_pretrained else None
        except UserError:
            continue
        keys[name] = Run("", config, pretraining).key
    return keys


def _config(identity: Mapping[str, Any], version: str) -> Config:
    tree: dict[str, Any] = {"version": version}
    for name, value in identity.items():
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = value
    return fields.from_dict(tree)


def _read(folder: Path) -> Iterator[tuple[str, Row]]:
    """Yields the key and the row of every run in a folder that `Store.write` wrote.

    Raises:
        UserError: a file is damaged.
    """
    path = folder / "about.json"
    if not path.exists():
        return
    try:
        keys = _keys(json.loads(path.read_text())["configs"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} can't be read: {one_line(error)}; restore or remove it") from None
    curves: dict[str, list[Row]] = {}
    for line in read_csv(folder / "curves.csv"):
        curves.setdefault(_name(line), []).append(line)
    for row in read_csv(folder / "results.csv"):
        if key := keys.get(_name(row)):
            curve = curves.get(_name(row), [])
            yield key, dict.fromkeys((*RESULTS, *PROVENANCE)) | row | {"curve": curve}


def _name(row: Row) -> str:
    return f"{row['variant']}-seed{row['seed']}"


def read_csv(path: Path) -> list[Row]:
    """Returns the rows of a file that `write_csv` wrote, or none if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return []

    def value(name: str, text: str) -> Any:
        return None if text == "" else text if name in TEXTS else json.loads(text)

    try:
        with path.open(newline="") as file:
            return [{k: value(k, v) for k, v in line.items()} for line in csv.DictReader(file)]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} can't be read: {error}; restore or remove it") from None


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Row]) -> None:
    """Writes those columns atomically; None is an empty cell, and floats keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, text.getvalue())
