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

from cnn_jax import data, losses, models, optim, photos, runs
from cnn_jax import evaluate as evaluation
from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog


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
    runs.check_config(workdir, config)
    trained = runs.load_trained(workdir, config, kind)
    console = Console(highlight=False, soft_wrap=True)
    dataset = _load_data(config, console)
    if dataset.class_names != trained.class_names:
        raise UserError(f"the classes of the images are not those {workdir} was trained on")
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
    table = Table("class", "images", "accuracy")
    for name, row, correct in zip(
        dataset.class_names, result.confusion, result.confusion.diagonal(), strict=True
    ):
        table.add_row(name, f"{row.sum()}", f"{correct / row.sum():.2%}" if row.sum() else "-")
    console.print(table)


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
