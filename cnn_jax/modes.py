"""What `--mode` names: each function does one thing a user asks for, and prints what came of it."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cnn_jax import data, loop, losses, models, optim, photos, runs, trees, weights
from cnn_jax import evaluate as evaluation
from cnn_jax import export as exporting
from cnn_jax import features as extraction
from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog

_MOST_WRONG = 10
"""Photos named of those that the network is wrong about."""
_MATRIX_CLASSES = 12
"""Up to so many classes the whole confusion matrix fits on a terminal."""


def set_up_jax(config: Config) -> None:
    """Turns on the persistent compilation cache; to be called before the first array is made.

    It lies in $JAX_COMPILATION_CACHE_DIR, or else beside the decoded images.
    """
    logging.set_verbosity(logging.WARNING)  # orbax tells of every save at INFO
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_dir(config.data) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def train(config: Config, workdir: Path) -> None:
    """Trains or resumes a run, and prints its result and where it lies."""
    console = Console(highlight=False, soft_wrap=True)
    with runs.claim(workdir, config):
        summary = runs.finished(workdir)
        if summary:
            console.print(f"{workdir} is finished; another --workdir or --set trains anew")
        else:
            log = RunLog(workdir, console)
            dataset = _load_data(config, console)
            summary = runs.run(config, dataset, workdir, log)
            if dataset.test.files and summary["steps"]:
                _print_evaluation(console, config, runs.load_trained(workdir, config), dataset)
    _print_result(console, summary)
    console.print(f"everything about this run is in {workdir}")


def _load_data(config: Config, console: Console) -> data.ImageDataset:
    dataset = data.load(config.data)
    counts = ", ".join(f"{n:,} {name}" for name, n in dataset.counts.items() if n)
    console.print(f"{dataset.source}: {counts} images, {len(dataset.class_names)} classes")
    return dataset


def _print_result(console: Console, summary: dict[str, Any]) -> None:
    line = f"test accuracy {summary['test_accuracy']:.2%}, test loss {summary['test_loss']:.4f}"
    if summary["steps"]:
        line += (
            f" after {summary['epochs']} epochs ({summary['seconds']:.1f} s of training, "
            f"{summary['images_per_second']:,.0f} images/s)"
        )
    console.print(line)


def evaluate(config: Config, workdir: Path, kind: str) -> None:
    """Evaluates a workdir's network on the test set and prints accuracy, class by class."""
    console = Console(highlight=False, soft_wrap=True)
    runs.check_config(workdir, config)
    trained = runs.load_trained(workdir, config, kind)
    dataset = _load_data(config, console)
    _check_classes(dataset, trained, workdir)
    _print_evaluation(console, config, trained, dataset)


def _check_classes(dataset: data.ImageDataset, trained: runs.TrainedModel, workdir: Path) -> None:
    if dataset.class_names != trained.class_names:
        raise UserError(f"the classes of the images are not those {workdir} was trained on")


def _print_evaluation(
    console: Console, config: Config, trained: runs.TrainedModel, dataset: data.ImageDataset
) -> None:
    """Prints accuracy, confusion and, of photos, the files that the network is most wrong about."""
    logits = evaluation.logits(
        trained.model,
        trained.variables,
        dataset.test.images,
        mean=config.data.mean,
        std=config.data.std,
    )
    result = evaluation.score(logits, dataset.test.labels, losses.from_config(config.train))
    console.print(
        f"step {trained.step}: test accuracy {result.accuracy:.2%}, test loss {result.loss:.4f}"
    )
    console.print(_confusion_table(dataset.class_names, result.confusion))
    probabilities = evaluation.softmax(logits)
    wrong = evaluation.most_wrong(probabilities, dataset.test.labels, _MOST_WRONG)
    if dataset.test.files and len(wrong):
        console.print("most wrong:")
        for i in wrong:
            label, predicted = dataset.test.labels[i], int(probabilities[i].argmax())
            console.print(
                f"  {dataset.test.files[i]}: {dataset.class_names[label]}, taken for "
                f"{dataset.class_names[predicted]} ({probabilities[i, predicted]:.1%})",
                markup=False,
            )


def _confusion_table(class_names: tuple[str, ...], confusion: np.ndarray) -> Table:
    """Returns a row a class: images, accuracy, and what they are taken for."""
    few = len(class_names) <= _MATRIX_CLASSES
    others = class_names if few else ("most taken for",)
    table = Table("class", "images", "accuracy", *(escape(name) for name in others))
    for label, row in enumerate(confusion):
        accuracy = f"{row[label] / row.sum():.2%}" if row.sum() else "-"
        cells = [str(count) for count in row]
        if not few:
            mistakes = np.where(np.arange(len(row)) == label, 0, row)
            most = int(mistakes.argmax())
            cells = [f"{class_names[most]} ({mistakes[most]})" if mistakes[most] else "-"]
        table.add_row(*map(escape, (class_names[label], str(row.sum()), accuracy, *cells)))
    return table


def features(config: Config, workdir: Path, kind: str) -> None:
    """Writes a layer's activations for every image, and trains a classifier on them if asked to.

    They are those of the workdir's network; where it has none yet, of `init.checkpoint`'s.
    """
    console = Console(highlight=False, soft_wrap=True)
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
        _check_classes(dataset, trained, workdir)
        model, variables = trained.model, trained.variables
        logits = evaluation.logits(model, variables, dataset.test.images, **settings)
        own = float(np.mean(logits.argmax(axis=1) == dataset.test.labels))
    found = extraction.extract(model, variables, dataset, config.features.layer, **settings)
    stem = workdir / "features" / found.layer.replace("/", ".")
    found.save(stem.with_name(stem.name + ".npz"))
    shapes = ", ".join(f"{n} {list(array.shape)}" for n, array in found.arrays.items())
    console.print(f"{found.layer}: {shapes} in {stem}.npz", markup=False)
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
        ),
        markup=False,
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
    console = Console(highlight=False)
    console.print(table)
    if config.optim.groups or config.optim.phases:
        console.print(_groups_table(config, models.param_names(model, image_shape)))


def _groups_table(config: Config, names: list[str]) -> Table:
    """Returns, for every parameter, the pattern that it matches and its multiplier, by phase."""
    phases = optim.make_phases(config.optim, len(config.model.blocks), steps_per_epoch=1)
    table = Table("parameter", *(f"learning rate from epoch {epoch}" for epoch, _ in phases))
    for _, groups in phases:
        optim.check_groups(groups, names)
    for name in names:
        cells = []
        for _, groups in phases:
            pattern, rate = optim.group_of(groups, name) or ("", None)
            cells.append(f"{'frozen' if rate is None else f'x {rate:g}'}  ({pattern})")
        table.add_row(name, *map(escape, cells))
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
    logits = evaluation.logits(
        trained.model, trained.variables, images, mean=config.data.mean, std=config.data.std
    )
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
            print(f"{p['file']}: {p['class']} ({p['probability']:.1%})")


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
                Console(stderr=True, highlight=False, soft_wrap=True).print(f"skipped: {error}")
                continue
            files.append(file)
    if not files:
        raise UserError(f"no readable image in {', '.join(paths)}")
    return files, np.stack(images)
