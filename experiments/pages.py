"""Writes the tables of README.md and docs/ from committed result files.

python -m experiments.pages

A table stands between `<!-- table NAME -->` and `<!-- /table -->`; NAME is a function of `TABLES`.
The tests fail if a page has other tables than this program writes.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from absl import logging

from cnn_jax import command, configs, files, models
from cnn_jax.models import inspection
from experiments.chapter import EXPERIMENT as CHAPTER
from experiments.publish import markdown
from experiments.store import read_csv
from experiments.tables import Row

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments" / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"
CIFAR10_IMAGES = 50_000
MISSING = "not measured"

# Of each config that is not a network of the experiments `chapter` and `airbench`.
_REPORTED_IN = {"quickstart": ("quickstart", "quickstart"), "photos": ("clothing", "photos")}
_REPORTED_IN["photos_features"] = ("photos", "head-all")

_NOT_THE_NETWORK = r"\d+ epochs|needs no|in minutes|Chapter:|Its author:"


def pages() -> list[Path]:
    """Returns the pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """Returns a page with its tables written anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)",
        lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3],
        text,
        flags=re.DOTALL,
    )


def networks() -> str:
    """Returns README's table: the networks, and what training by their configs reached."""
    lines = []
    for name, text in configs.listing():
        if name.startswith("finetune"):
            continue
        config = configs.get(name)
        reference = CHAPTER.reference.get(name)
        lines.append(
            [
                f"`{name}`",
                re.sub(
                    r"[,.:;]? (\d+ epochs|needs no|in minutes|Chapter:|Its author:).*", "", text
                ),
                _param_count(name),
                f"{config.train.epochs}",
                accuracy(rows := runs(name)),
                f"{len(rows) or ''}",
                f"{100 * reference:.1f}%" if reference else "",
            ]
        )
    heads = ["config", "network", "parameters", "epochs", "test accuracy", "seeds"]
    return markdown([*heads, "the chapter's"], lines)


def chapter() -> str:
    """Returns the networks of the experiments `chapter` and `airbench` with their compute."""
    lines = []
    for name in [*CHAPTER.variants, "resnet_small", *_modern()]:
        rows = runs(name)
        if not rows:
            continue
        reference = CHAPTER.reference.get(name)
        flops = 3 * rows[0]["epochs"] * CIFAR10_IMAGES * rows[0]["flops_per_image"]
        lines.append(
            [
                f"`{name}`",
                f"{rows[0]['epochs']}",
                accuracy(rows),
                plain if (plain := accuracy(rows, "test_accuracy_plain")) != accuracy(rows) else "",
                f"{len(rows)}",
                f"{100 * reference:.1f}%" if reference else "",
                f"{flops / 1e15:.2f}",
                ", ".join(sorted({str(row["commit"]) for row in rows})),
            ]
        )
    heads = ["network", "epochs", "test accuracy", "without test-time averaging", "seeds"]
    return markdown([*heads, "the chapter's", "training compute, PFLOP", "commit"], lines)


def transfer() -> str:
    """Returns the accuracy of transfer learning by method and number of images."""
    methods = {
        "from scratch": ("scratch", "test_accuracy"),
        "features + SVM": ("finetune_head", "svm"),
        "new head": ("finetune_head", "test_accuracy"),
        "last block too": ("finetune_last_block", "test_accuracy"),
        "all layers, gradually": ("finetune_gradual", "test_accuracy"),
    }
    rows = read_csv(EXPERIMENTS / "transfer" / "results.csv")
    lines = [
        [f"{n}", *(accuracy(of(rows, f"{name}-{n}"), key) for name, key in methods.values())]
        for n in (20, 100, 500)
    ]
    return markdown(["images per class", *methods], lines)


def training_speed() -> str:
    """Returns the speed of training the chapter's networks beside its competitors."""
    found = _benchmark("speed")
    if not found:
        return MISSING
    rows, kinds = found["rows"], list(dict.fromkeys(row["kind"] for row in found["rows"]))
    columns = list(dict.fromkeys((row["model"], row["batch_size"]) for row in rows))
    by_key = {(row["model"], row["batch_size"], row["kind"]): row for row in rows}
    lines = [["", *(f"batch {size}" for _, size in columns)]]
    ours = [by_key[*column, kinds[0]] for column in columns]
    lines.append([f"{kinds[0]}, images/s", *(f"{row['images_per_second']:,.0f}" for row in ours)])
    for kind in kinds[1:]:
        found_rows = [by_key.get((*column, kind)) for column in columns]
        against = next(row["against"] for row in found_rows if row)
        lines.append([f"{kind} / {against}", *map(_ratio, found_rows)])
    if all(row["load"] for row in ours):  # The oldest results have none.
        lines.append(["load of the machine", *(f"{row['load']:.1f}" for row in ours)])
    share = [f"{row['share_of_gemm_rate']:.0%}" for row in ours]
    lines.append(["share of the speed of matrix products", *share])
    return markdown(["", *(model for model, _ in columns)], lines) + _origin(found)


def photos_speed() -> str:
    """Returns the speed of networks for photos: PyTorch's time over ours, with quartiles."""
    found = _benchmark("photos")
    if not found:
        return MISSING
    lines = [
        [
            row["network"],
            row["mode"],
            row["dtype"],
            _ratio(row),
            f"{row['load']:.1f}",
            f"{row['peak_mb']:,.0f}",
        ]
        for row in found["rows"]
        if row["kind"] == "torch"
    ]
    heads = ["network", "", "type", "PyTorch's time / ours (quartiles)", "load"]
    return markdown([*heads, "PyTorch's peak memory, MB"], lines) + _origin(found)


def gpu_training() -> str:
    """Returns the speed of training on a GPU, and PyTorch's time over ours of the same type."""
    rows, lines = _of_gpu(2), []
    ours = {(row["name"], row["kind"]): row.get("ms a step") for row in rows}
    for row in rows:
        lines.append([row["name"], row["kind"], *[MISSING] * 5])
        if "missing" not in row:
            milliseconds = row["ms a step"]
            dtype = row["kind"].removeprefix("PyTorch ").split(",")[0]
            is_torch, against = "PyTorch" in row["kind"], ours[row["name"], dtype]
            lines[-1][2:] = [
                f"{row['images/s']:,.0f}",
                f"{milliseconds:.2f}",
                f"{milliseconds / against:.2f}" if is_torch and against else "",
                f"{row['share of peak']:.1%}" if "share of peak" in row else "",
                f"{row['memory MB']:,.0f}",
            ]
    heads = ["network", "", "images/s", "ms a step", "PyTorch's time / ours", "share of peak"]
    return markdown([*heads, "memory, MB"], lines)


def gpu_cifar() -> str:
    """Returns accuracy and seconds of training on CIFAR-10 on a GPU."""
    lines = [
        [
            row["name"],
            f"{100 * row['test_accuracy']:.2f} ± {100 * row['standard deviation']:.2f}%",
            f"{row['training_seconds, alone']:.2f}",
        ]
        for row in _of_gpu(4)
        if "standard deviation" in row
    ]
    heads = ["config", "test accuracy", "seconds of training, median of what ran alone"]
    return markdown(heads, lines)


def gpu_kernels() -> str:
    """Returns the times of max pools with their gradients, and of ways to run steps, on a GPU."""
    rows = [row for row in _of_gpu(3) if "missing" not in row]
    cells = [
        [row["name"], name.removesuffix(" a step").removesuffix(", ms"), f"{1e3 * value:,.0f}"]
        for row in rows
        for name, value in row.items()
        if isinstance(value, float)
    ]
    return markdown(["what", "", "µs"], cells)


def _of_gpu(part: int) -> list[Row]:
    """Returns the committed rows of a part of gpu_check.py."""
    found = _benchmark("gpu") or {"rows": []}
    return [row for row in found["rows"] if row["part"] == part]


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        networks,
        chapter,
        transfer,
        training_speed,
        photos_speed,
        gpu_training,
        gpu_cifar,
        gpu_kernels,
    )
}


def runs(config_name: str) -> list[Row]:
    """Returns the committed rows of the runs of a named config, one a seed."""
    if config_name in _REPORTED_IN:
        experiment, variant = _REPORTED_IN[config_name]
        return of(read_csv(EXPERIMENTS / experiment / "results.csv"), variant)
    for experiment in ("chapter", "airbench", "airbench_muon"):
        if rows := of(read_csv(EXPERIMENTS / experiment / "results.csv"), config_name):
            return rows
    return []


def of(rows: Sequence[Row], variant: str) -> list[Row]:
    """Returns the rows of one variant."""
    return [row for row in rows if row["variant"] == variant]


def accuracy(rows: Sequence[Row], column: str = "test_accuracy") -> str:
    """Returns the mean and the standard deviation (n - 1) over seeds, in percent."""
    values = [100 * row[column] for row in rows if row[column] is not None]
    if not values:
        return MISSING
    if len(values) == 1:
        return f"{values[0]:.1f}%"
    return f"{fmean(values):.2f} ± {stdev(values):.2f}%"


def _modern() -> list[str]:
    return [name for name, _ in configs.listing() if name.startswith("airbench")]


def _param_count(name: str) -> str:
    layers = inspection.summarize(models.build(configs.get(name).model, 10), (32, 32, 3))
    return f"{sum(layer.params for layer in layers):,}"


def _benchmark(name: str) -> dict[str, Any] | None:
    path = BENCHMARKS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return MISSING
    quartiles = "" if row["quartiles"] is None else " ({:.2f} to {:.2f})".format(*row["quartiles"])
    return f"{row['time_over_ours']:.2f}{quartiles}"


def _origin(found: dict[str, Any]) -> str:
    origin = "; ".join(f"{name}: {text}" for name, text in found["made_by"].items())
    return f"\n\n{origin}."


def main(_: list[str]) -> None:
    """Writes the pages that have changed, and names them."""
    logging.set_verbosity(logging.WARNING)  # JAX logs the devices that it looked for at INFO
    for page in pages():
        text = page.read_text()
        if (new := render(text)) != text:
            files.write(page, new)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    command.run(main)
