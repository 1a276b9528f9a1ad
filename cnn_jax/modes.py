"""What `--mode` names: each function does one thing a user asks for, and prints what came of it."""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from cnn_jax import config as configuration
from cnn_jax import (
    data,
    devices,
    loop,
    losses,
    models,
    optim,
    photos,
    rate_finder,
    report,
    runs,
    trees,
    weights,
)
from cnn_jax import evaluate as evaluation
from cnn_jax import export as exporting
from cnn_jax import features as extraction
from cnn_jax.config import Config
from cnn_jax.errors import UserError, printable
from cnn_jax.run_log import RunLog, SilentLog
from cnn_jax.stop import Stopped

# The last of equal flags counts, so this one stands after the user's own.
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

_MOST_WRONG = 10
"""Photos named of those that the network is wrong about."""
_MATRIX_CLASSES = 12
"""Up to so many classes the whole confusion matrix fits on a terminal."""


def set_up_jax(config: Config) -> None:
    """Sets what JAX reads once; to be called before the first array is made.

    The compilation cache lies in $JAX_COMPILATION_CACHE_DIR, or else beside the decoded images.
    """
    if config.train.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()
    logging.set_verbosity(logging.WARNING)  # orbax tells of every save at INFO
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_dir(config.data) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def train(config: Config, workdir: Path) -> None:
    """Trains or resumes a run, and prints its result and where it lies."""
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not devices.is_main())
    if summary := runs.finished(workdir):
        _check_photos(config, workdir, summary)
    with runs.claim(workdir, config):
        summary = runs.finished(workdir)
        if summary:
            console.print(f"{workdir} is finished; another --workdir or --set trains anew")
        else:
            dataset = _load_data(config, console)
            devices.check_same_data(dataset.sha256)
            log_in = partial(_log, console)
            if config.train.seeds == 1:
                summary = runs.run(loop.Trainer(config, dataset), workdir, log_in)
            else:
                summary = runs.run_seeds(config, dataset, workdir, log_in)
            if dataset.test.files and summary.get("steps") and jax.process_count() == 1:
                _print_evaluation(console, runs.load_trained(workdir, config), dataset)
    if "runs" in summary:
        for one in summary["runs"]:
            console.print(f"seed {one['seed']}: {_result(one)}")
        console.print(
            f"{len(summary['runs'])} seeds: test accuracy {summary['test_accuracy_mean']:.2%}, "
            f"standard deviation {summary['test_accuracy_std']:.2%}"
        )
    else:
        console.print(_result(summary))
    console.print(f"everything about this run is in {workdir}")


def _check_photos(config: Config, workdir: Path, summary: dict[str, Any]) -> None:
    """Refuses to pass off a finished run as one of photos that have come, gone or changed since."""
    if config.data.name != "folder" or not Path(config.data.dir).is_dir():
        return
    trained_on = summary.get("runs", [summary])[0]["data"]["sha256"]
    if data.load(config.data).sha256 != trained_on:
        raise UserError(
            f"{workdir} is finished, and was trained on other photos than {config.data.dir} holds "
            "now; another --workdir trains on them"
        )


def _log(console: Console, workdir: Path, beside: bool = False) -> RunLog:
    return RunLog(workdir, console, beside) if devices.is_main() else SilentLog()


def _load_data(config: Config, console: Console) -> data.ImageDataset:
    dataset = data.load(config.data)
    counts = ", ".join(f"{n:,} {name}" for name, n in dataset.counts.items() if n)
    line = f"{dataset.source}: {counts} images, {len(dataset.class_names)} classes"
    console.print(printable(line))
    return dataset


def _result(summary: dict[str, Any]) -> str:
    line = f"test accuracy {summary['test_accuracy']:.2%}, test loss {summary['test_loss']:.4f}"
    if summary["steps"]:
        line += (
            f" after {summary['epochs']} epochs ({summary['seconds']:.1f} s of training, "
            f"{summary['images_per_second']:,.0f} images/s)"
        )
    return line


def evaluate(config: Config, workdir: Path, kind: str) -> None:
    """Evaluates a workdir's network on the test set and prints accuracy, class by class."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    runs.check_config(workdir, config)
    trained = runs.load_trained(workdir, config, kind)
    dataset = _load_data(config, console)
    runs.check_classes(workdir, trained, dataset)
    _print_evaluation(console, trained, dataset)


def _print_evaluation(
    console: Console, trained: runs.TrainedModel, dataset: data.ImageDataset
) -> None:
    """Prints accuracy, confusion and, of photos, the files that the network is most wrong about."""
    logits = trained.logits(dataset.test.images)
    result = evaluation.score(logits, dataset.test.labels, losses.from_config(trained.config.train))
    console.print(
        f"step {trained.step}: test accuracy {result.accuracy:.2%}, test loss {result.loss:.4f}"
    )
    console.print(_confusion_table(dataset.class_names, result.confusion))
    probabilities = evaluation.softmax(logits)
    wrong = evaluation.most_wrong(probabilities, dataset.test.labels, _MOST_WRONG)
    if dataset.test.files and len(wrong):
        console.print("most wrong:")
        of_test = dataset.test.labels, dataset.test.files, dataset.class_names
        for line in evaluation.tell_mistakes(wrong, probabilities, *of_test):
            console.print(printable(f"  {line}"))


def _confusion_table(class_names: tuple[str, ...], confusion: np.ndarray) -> Table:
    """Returns a row a class: images, accuracy, and what they are taken for."""
    few = len(class_names) <= _MATRIX_CLASSES
    others = class_names if few else ("most taken for",)
    table = Table("class", "images", "accuracy", *(printable(name) for name in others))
    taken = evaluation.most_taken_for(confusion, class_names)
    for label, row in enumerate(confusion):
        accuracy = f"{row[label] / row.sum():.2%}" if row.sum() else "-"
        cells = [str(count) for count in row] if few else [taken[label]]
        table.add_row(*map(printable, (class_names[label], str(row.sum()), accuracy, *cells)))
    return table


def features(config: Config, workdir: Path, kind: str) -> None:
    """Writes a layer's activations for every image, and trains a classifier on them if asked to.

    They are those of the workdir's network; where it has none yet, of `init.checkpoint`'s.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    dataset = _load_data(config, console)
    settings = {"mean": config.data.mean, "std": config.data.std}
    own = None
    if config.init.checkpoint and not (workdir / "checkpoints").is_dir():
        with runs.claim(workdir, config):
            trainer = loop.Trainer(config, dataset)
            variables = trainer.start(RunLog(workdir, console)).eval_variables
            model = trainer.recipe.model
    else:
        runs.check_config(workdir, config)
        trained = runs.load_trained(workdir, config, kind)
        runs.check_classes(workdir, trained, dataset)
        model, variables = trained.model, trained.variables
        predicted = trained.logits(dataset.test.images).argmax(axis=1)
        own = float(np.mean(predicted == dataset.test.labels))
    found = extraction.extract(model, variables, dataset, config.features.layer, **settings)
    stem = workdir / "features" / found.layer.replace("/", ".")
    found.save(stem.with_name(stem.name + ".npz"))
    shapes = ", ".join(f"{n} {list(array.shape)}" for n, array in found.arrays.items())
    console.print(f"{found.layer}: {shapes} in {stem}.npz")
    if not config.features.classifier:
        return
    result = extraction.classify(found, config.features.classifier, config.seed)
    result |= {"network_test_accuracy": own, "data_sha256": dataset.sha256}
    runs.write_json(stem.with_name(f"{stem.name}-{config.features.classifier}.json"), result)
    console.print(
        f"{result['classifier']} on {found.layer}: test accuracy {result['test_accuracy']:.2%} "
        f"(cross-validation on train {result['cross_validation_accuracy']:.2%}, "
        f"{', '.join(f'{k}={v}' for k, v in result['settings'].items())}); "
        + (
            "the network has no head for these classes yet"
            if own is None
            else f"the network itself: {own:.2%}"
        )
    )


def export(config: Config, workdir: Path, kind: str) -> None:
    """Writes a trained network for use without this project, below `export` in its workdir."""
    runs.check_config(workdir, config)
    trained = runs.load_trained(workdir, config, kind)
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    serialized = exporting.predictor(
        trained.model,
        trained.variables,
        trained.image_shape,
        mean=config.data.mean,
        std=config.data.std,
        test_time=config.augment.test_time,
    )
    (folder / "predictor.jax").write_bytes(serialized)
    about = {
        "class_names": trained.class_names,
        "input": ["uint8", ["n", *trained.image_shape]],
        "output": ["float32", ["n", len(trained.class_names)]],
        "platforms": exporting.PLATFORMS,
        "params_sha256": trees.sha256(trained.variables["params"]),
        "jax": runs.versions()["jax"],
    }
    runs.write_json(folder / "predictor.json", about)
    written = ["predictor.jax", "predictor.json"]
    if config.model.name == "vgg16":
        weights.write(trained.variables["params"], folder / "vgg16.safetensors")
        written.append("vgg16.safetensors")
    print(f"{', '.join(written)} in {folder}")


def figures(config: Config, workdir: Path, kind: str) -> None:
    """Draws a finished run, below `figures` in its workdir, and writes its report.html anew.

    The report stays as it is where `kind` names other parameters than those it tells of.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    runs.check_config(workdir, config)
    ended = runs.load_ended(workdir, config, _load_data(config, console), kind)
    with runs.claim(workdir, config):
        for path in report.write_pictures(workdir, ended):
            console.print(printable(path))
        if kind in ("", config.train.reported_kind):
            report.write(workdir, ended)
            console.print(printable(str(workdir / "report.html")))


def find_rate(config: Config, workdir: Path) -> None:
    """Trains a few steps with a rising learning rate, draws the losses, and suggests a rate."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with runs.claim(workdir, config):
        dataset = _load_data(config, console)
        trainer = loop.Trainer(config, dataset)
        n_steps = rate_finder.STEPS
        recipe = rate_finder.make_recipe(config, len(dataset.class_names), n_steps)
        state = trainer.start(RunLog(workdir, console))
        images, labels = dataset.train.images, dataset.train.labels
        key = jax.random.key(config.seed)
        found = rate_finder.find(recipe, state, images, labels, key, n_steps)
        path = report.write_rates(workdir, found)
    console.print(f"optim.learning_rate={found.suggested:.2g} is suggested; see {path}")


def verify(config: Config, workdir: Path) -> bool:
    """Trains a finished run anew in a temporary folder, and says whether its bits come back.

    Raises:
        UserError: the run is not finished, or its config or images are no longer what it had.
    """
    runs.check_config(workdir, config)
    runs.check_single(workdir, config)
    finished = runs.finished(workdir)
    if finished is None:
        raise UserError(f"{workdir} is not finished, so there is nothing to compare with")
    if changes := configuration.differences(configuration.from_dict(finished["config"]), config):
        raise UserError(f"{workdir} reports on another config ({'; '.join(changes)})")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    dataset = _load_data(config, console)
    if dataset.sha256 != finished["data"]["sha256"]:
        raise UserError(f"the images are not those that {workdir} was trained on")
    # On one device, as a seed of several is trained, however many there are.
    alone = jax.local_devices()[0] if finished["device"]["count"] == 1 else None
    with devices.only(alone), tempfile.TemporaryDirectory(prefix="cnn_jax_verify_") as folder:
        try:
            found = runs.retrain(config, dataset, Path(folder), RunLog(Path(folder), console))
        except Stopped as stopped:
            console.print("verification stopped; it starts anew next time")
            raise SystemExit(stopped.exit_code) from None
        changes = runs.changed_surroundings(finished)
    expected = finished["params_sha256"]
    if found == expected:
        console.print(f"params_sha256 matches: {found}")
        return True
    console.print(f"params_sha256 differs: {expected} in {workdir}, {found} now")
    console.print("\n".join(changes) or "versions and device are the same")
    return False


def summary(config: Config) -> None:
    """Prints a network's layers: output shape, parameters and FLOPs of one image's forward pass.

    With `optim.groups` or `optim.phases`, the group of every parameter follows.
    """
    image_shape, n_classes = data.describe(config.data)
    model = models.build(config.model, n_classes)
    rows = models.summarize(model, image_shape)
    table = Table(title=f"{config.name}: one {' x '.join(map(str, image_shape))} image")
    for heading in ("layer", "kind", "output shape", "parameters", "FLOPs"):
        table.add_column(heading, justify="right" if heading in ("parameters", "FLOPs") else "left")
    for row in rows:
        shape = " x ".join(map(str, row.output_shape))
        table.add_row(row.name, row.kind, shape, f"{row.params:,}", f"{row.flops:,}")
    table.add_section()
    params, flops = sum(r.params for r in rows), sum(r.flops for r in rows)
    table.add_row("total", "", "", f"{params:,}", f"{flops:,}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if config.optim.groups or config.optim.phases:
        console.print(_groups_table(config, models.param_names(model, image_shape)))


def _groups_table(config: Config, names: list[str]) -> Table:
    """Returns, for every parameter, the pattern that it matches and its multiplier, by phase."""
    phases = optim.make_phases(config.optim, len(config.model.blocks), steps_per_epoch=1)
    table = Table("parameter", *(f"learning rate from epoch {epoch}" for epoch, _ in phases))
    for _, groups in phases:
        optim.check_groups("optim.groups", groups, names)
    for name in names:
        cells = []
        for _, groups in phases:
            pattern, rate = optim.group_of(groups, name) or ("", None)
            cells.append(f"{'frozen' if rate is None else f'x {rate:g}'}  ({pattern})")
        table.add_row(name, *map(printable, cells))
    return table


def predict(config: Config, workdir: Path, kind: str, paths: list[str], as_json: bool) -> None:
    """Prints the most likely class of each image file, or of every image below a folder.

    A file that is no readable image is an error if it was named, and passed over in a folder.
    """
    if not paths:
        raise UserError("--mode=predict needs image files or folders after the flags")
    runs.check_config(workdir, config)
    trained = runs.load_trained(workdir, config, kind)
    files, images = _read_images(paths, trained.image_shape[0])
    logits = trained.logits(images)
    predictions = [
        {
            "file": str(file),
            "class": trained.class_names[int(np.argmax(row))],
            "probability": round(float(row.max()), 4),
        }
        for file, row in zip(files, evaluation.softmax(logits), strict=True)
    ]
    if as_json:
        print(json.dumps(predictions, indent=2))
    else:
        for p in predictions:
            print(printable(f"{p['file']}: {p['class']} ({p['probability']:.1%})"))


def _read_images(paths: list[str], size: int) -> tuple[list[Path], np.ndarray]:
    files: list[Path] = []
    images: list[np.ndarray] = []
    for path in map(Path, paths):
        for file in photos.list_images(path):
            try:
                images.append(photos.load_image(file, size))
            except UserError as error:
                if file == path:
                    raise
                print(printable(f"skipped: {error}"), file=sys.stderr)
                continue
            files.append(file)
    if not files:
        raise UserError(f"no readable image in {', '.join(paths)}")
    return files, np.stack(images)
