"""Does a pretrained trunk help where images are few? Five classes of CIFAR-10 teach the other five.

python -m experiments.transfer

A network learns airplane, automobile, bird, cat and deer from all their images; dog, frog, horse,
ship and truck are then learnt from 20, 100 and 500 images a class: from scratch, by classical
classifiers on the penultimate features, and by the four ways of fine-tuning. The seed chooses
images, initial parameters and order alike. The learning rate of every way of training is chosen
before, at 100 images a class, on images set aside for that. What is finished is not run again.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cnn_jax import (
    command,
    config,
    configs,
    data,
    devices,
    features,
    figures,
    loop,
    modes,
    runs,
    transfer,
)
from cnn_jax.config import AugmentConfig, Config, InitConfig, ModelConfig, TrainConfig
from cnn_jax.run_log import RunLog
from experiments import plots, report, rows

OLD = ("airplane", "automobile", "bird", "cat", "deer")
NEW = ("dog", "frog", "horse", "ship", "truck")
SHOTS = (20, 100, 500)
CLASSIFIERS = ("svm", "random_forest", "mlp")
FINE_TUNING = ("finetune_head", "finetune_last_block", "finetune_all", "finetune_gradual")
TRAINED = ("scratch", *FINE_TUNING)
METHODS = ("scratch", *CLASSIFIERS, *FINE_TUNING)
# Small sets need more epochs for as many steps; every method gets the same.
EPOCHS = {20: 100, 100: 50, 500: 20}
RATES = (0.01, 0.03, 0.1, 0.3)
# Chooses the images that learning rates are tried on; the seeds of the results are smaller.
TUNING_SEED = 1000


def pretraining(epochs: int) -> Config:
    """Returns the config of the network that all others start from."""
    base = configs.get("vgg3")
    return replace(
        base,
        name="custom",
        data=replace(base.data, classes=OLD),
        augment=AugmentConfig(flip=True, translate=2),
        model=ModelConfig(
            name="vgg", blocks=((32, 32), (64, 64), (128, 128)), dense=(256,), dropout=0.5
        ),
        optim=replace(base.optim, learning_rate=0.02, schedule="cosine", weight_decay=5e-4),
        train=TrainConfig(epochs=epochs, batch_size=128),
    )


def learning(
    method: str, shots: int, seed: int, source: Path, epochs: int, rate: float | None = None
) -> Config:
    """Returns the config that learns the new classes; classifiers take that of `finetune_head`."""
    tuned = configs.get(method if method in FINE_TUNING else "finetune_head")
    base = transfer.adopt(tuned, InitConfig(checkpoint=str(source)))
    base = replace(
        base,
        seed=seed,
        data=replace(
            base.data, name="cifar10", classes=NEW, images_per_class=shots, split_seed=seed
        ),
        init=replace(base.init, checkpoint=str(source)),
        optim=replace(base.optim, learning_rate=rate or base.optim.learning_rate),
        train=replace(base.train, epochs=epochs),
    )
    if method == "scratch":
        base = replace(
            base,
            init=InitConfig(),
            optim=replace(base.optim, groups=()),
            train=replace(base.train, cache_frozen=False),
        )
    if base.optim.phases:  # at 30% and 60% of the run, as in its 10 epochs
        starts = [epochs * epoch // 10 for epoch, _ in base.optim.phases]
        phases = tuple((s, g) for s, (_, g) in zip(starts, base.optim.phases, strict=True))
        base = replace(base, optim=replace(base.optim, phases=phases))
    return base


def quiet_log(workdir: Path) -> RunLog:
    """Returns a log that writes its files and shows nothing."""
    return RunLog(workdir, Console(quiet=True))


def train(wanted: Config, workdir: Path) -> float:
    """Trains unless that is done already, and returns the test accuracy."""
    jax.clear_caches()  # Programs of earlier runs: a process can't hold hundreds of them.
    with runs.claim(workdir, wanted):
        summary = runs.finished(workdir)
        if summary is None:
            trainer = loop.Trainer(wanted, data.load(wanted.data))
            summary = runs.run(trainer, workdir, quiet_log)
    return summary["test_accuracy"]


def validate(wanted: Config, workdir: Path) -> float:
    """Trains, and returns the validation accuracy of the last epoch."""
    dataset = data.load(wanted.data)
    trainer = loop.Trainer(wanted, replace(dataset, validation=None))  # not after every epoch
    try:
        state, _ = loop.fit(trainer, workdir, quiet_log(workdir))
    except loop.NotFinite as error:
        print(error)
        return 0.0
    assert dataset.validation is not None
    return trainer.evaluate(state, dataset.validation).accuracy


def best_rate(method: str, source: Path, epochs: int, folder: Path) -> tuple[float, dict[str, Any]]:
    """Returns the learning rate with the best validation accuracy, and the accuracies of all.

    A rate at which training does not stay finite counts as 0.
    """
    accuracies = {}
    for rate in RATES:
        wanted = learning(method, 100, TUNING_SEED, source, epochs, rate)
        wanted = replace(wanted, data=replace(wanted.data, validation=0.05))
        workdir = folder / f"{method}-{rate:g}"
        path = workdir / "validation.json"
        with runs.claim(workdir, wanted):  # which refuses what other settings have left there
            if not path.exists():
                runs.write_json(path, validate(wanted, workdir))
        accuracies[f"{rate:g}"] = json.loads(path.read_text())
        print(f"{method}, rate {rate:g}: validation {accuracies[f'{rate:g}']:.2%}", flush=True)
    return max(RATES, key=lambda rate: accuracies[f"{rate:g}"]), accuracies


def classify(wanted: Config, name: str, workdir: Path) -> float:
    """Trains a classifier on the pretrained network's penultimate features."""
    jax.clear_caches()
    path = workdir / f"{name}.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        dataset = data.load(wanted.data)
        trainer = loop.Trainer(wanted, dataset)
        state = trainer.start(quiet_log(workdir))
        mean, std = wanted.data.mean, wanted.data.std
        found = features.extract(
            trainer.recipe.model, state.eval_variables, dataset, "", mean=mean, std=std
        )
        runs.write_json(path, features.classify(found, name, wanted.seed))
    return json.loads(path.read_text())["test_accuracy"]


def measure(
    folder: Path, source: Path, n_seeds: int, epochs: dict[int, int], rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yields the test accuracy of every method, number of images and seed."""
    for shots in SHOTS:
        for seed in range(n_seeds):
            for method in METHODS:
                wanted = learning(method, shots, seed, source, epochs[shots], rates.get(method))
                workdir = folder / f"{method}-{shots}-seed{seed}"
                if method in CLASSIFIERS:
                    accuracy = classify(wanted, method, folder / f"features-{shots}-seed{seed}")
                else:
                    accuracy = train(wanted, workdir)
                print(f"{method}, {shots} a class, seed {seed}: {accuracy:.2%}", flush=True)
                yield {"method": method, "shots": shots, "seed": seed, "test_accuracy": accuracy}


def accuracies(measured: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Returns test accuracies [SHOTS, seeds] by method."""

    def of(method: str, shots: int) -> list[float]:
        wanted = (method, shots)
        return [r["test_accuracy"] for r in measured if (r["method"], r["shots"]) == wanted]

    return {method: np.array([of(method, shots) for shots in SHOTS]) for method in METHODS}


def table(found: dict[str, np.ndarray]) -> str:
    """Returns a row a method as Markdown, in percent."""
    lines = ["| method | " + " | ".join(f"{s} a class" for s in SHOTS) + " |"]
    lines.append("|---|" + "---|" * len(SHOTS))
    for method, values in found.items():
        cells = [report.cell("test_accuracy", of_shots.tolist()) for of_shots in values]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(results: Path, about: dict[str, Any]) -> None:
    """Writes transfer.json, transfer.md and transfer.png."""
    found = accuracies(about["rows"])
    rates = ", ".join(f"{method} {rate:g}" for method, rate in about["learning_rates"].items())
    tried = ", ".join(f"{rate:g}" for rate in RATES)
    epochs = ", ".join(f"{number} at {shots}" for shots, number in about["epochs"].items())
    results.mkdir(exist_ok=True)
    runs.write_json(results / "transfer.json", about)
    (results / "transfer.md").write_text(
        f"Test accuracy in percent on {', '.join(NEW)}; mean ± standard deviation of "
        f"{about['seeds']} seeds. The network that is transferred learned {', '.join(OLD)} and "
        f"reaches {about['pretrained_test_accuracy']:.2%} on them.\n\n{table(found)}\n\n"
        f"Learning rates, chosen from {tried} on held-out images at 100 a class: {rates}. Epochs: "
        f"{epochs} images a class.\n\n"
        f"{about['data']}, on {about['device']['cpu_count']} cores ({about['device']['kind']}), "
        f"jax {about['versions']['jax']}; `python -m experiments.transfer`.\n"
    )
    figure = plots.lines(
        {method: (np.array(SHOTS), values) for method, values in found.items()},
        x_label="training images a class",
        y_label="test accuracy",
        logarithmic=True,
    )
    (results / "transfer.png").write_bytes(figures.png(figure))


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each result")
    parser.add_argument("--quick", action="store_true", help="few epochs, to try the script")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be 1 or more")
    wanted = pretraining(1 if arguments.quick else 30)
    epochs: dict[int, int] = dict.fromkeys(SHOTS, 10) if arguments.quick else EPOCHS
    modes.set_up_jax(wanted)
    devices.use_cores(wanted.train.batch_size)
    source = arguments.runs / "pretrained"
    accuracy = train(wanted, source)
    print(f"pretrained on {', '.join(OLD)}: {accuracy:.2%}", flush=True)
    # What follows from a network lies in a folder of its own: another one is not to be mixed in.
    folder = arguments.runs / (runs.finished(source) or {})["params_sha256"][:8]
    tuned = {
        method: best_rate(method, source, epochs[100], folder / "tuning") for method in TRAINED
    }
    rates = {method: rate for method, (rate, _) in tuned.items()}
    measured = list(measure(folder, source, arguments.seeds, epochs, rates))
    about = {
        "pretrained_test_accuracy": accuracy,
        "pretraining": config.to_dict(wanted),
        "learning_rates": rates,
        "validation_accuracies": {method: tried for method, (_, tried) in tuned.items()},
        "epochs": epochs,
        "seeds": arguments.seeds,
        "data": rows.data_name(data.load(replace(wanted.data, classes=()))),
        "device": runs.device(),
        "versions": runs.versions(),
        "rows": measured,
    }
    results = arguments.runs if arguments.quick else Path(__file__).parent / "results"
    write(results, about)
    print((results / "transfer.md").read_text())


if __name__ == "__main__":
    command.guarded(main)
