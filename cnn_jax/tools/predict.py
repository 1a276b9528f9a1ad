"""--mode=predict: the most likely classes of image files."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import files
from cnn_jax.data import photos, progress
from cnn_jax.errors import UserError, one_line, printable
from cnn_jax.predictor import Predictor
from cnn_jax.runs.folder import check_config
from cnn_jax.runs.outcome import ESTIMATOR, load_predictor
from cnn_jax.tools import Request

_AT_ONCE = 128
"""Photos that are in memory at once, twice: while some are classified, the next ones are read."""
_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Answer:
    """What is known of one file: its most likely classes, or why it can't be read."""

    file: str
    top: tuple[tuple[str, float], ...] = ()
    """(class, probability) pairs, the most likely first."""
    uncertain: bool | None = None
    """Whether the first probability is below --min_probability; None without that flag."""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the answer as JSON; "top" is there only if it says more than "class"."""
        if self.error:
            return {"file": self.file, "error": self.error}
        pairs = [{"class": name, "probability": round(p, 4)} for name, p in self.top]
        found: dict[str, Any] = {"file": self.file, **pairs[0]}
        if len(pairs) > 1:
            found["top"] = pairs
        if self.uncertain is not None:
            found["uncertain"] = self.uncertain
        return found

    def as_line(self) -> str:
        """Returns the answer as a line for a terminal."""
        listed = ", ".join(f"{name} ({p:.1%})" for name, p in self.top)
        return printable(f"{self.file}: {listed}{', uncertain' if self.uncertain else ''}")


def run(request: Request) -> None:
    """Prints the most likely classes of each image file, or of every image below a folder.

    With --output they are written to a file instead. A file that can't be read costs only itself:
    the process ends with exit code 1.

    Raises:
        UserError: no image was named, none can be read, the workdir holds no trained network, or
            the output can't be written.
    """
    if not request.paths:
        raise UserError("--mode=predict needs image files or folders after the flags")
    output = _check_output(request.output)
    check_config(request.workdir, request.config)
    predictor = _load(request)
    explain = _explainer(predictor, Path(request.explain).expanduser()) if request.explain else None
    answers = []
    for answer in classify(predictor, request.paths, request.top_k, explain):
        if answer.top and request.min_probability:
            answer = replace(answer, uncertain=answer.top[0][1] < request.min_probability)
        answers.append(answer)
        if answer.top and not (output or request.json):
            print(answer.as_line())
    broken = [answer for answer in answers if answer.error]
    if output:
        files.write(output, _table(answers, request.top_k, output.suffix))
        uncertain = sum(bool(answer.uncertain) for answer in answers)
        marked = f", {uncertain} of them uncertain" if request.min_probability else ""
        read = f"{len(answers) - len(broken)} images are classified{marked}"
        print(f"{output}: {read}; {len(broken)} can't be read")
    elif request.json:
        print(json.dumps([answer.as_json() for answer in answers], indent=2))
    if len(broken) == len(answers):
        more = f" (and {len(broken) - 1} more)" if broken[1:] else ""
        raise UserError(f"no image can be read: {broken[0].file}: {broken[0].error}{more}")
    if broken:
        if not output and not request.json:
            for answer in broken:
                print(printable(f"skipped: {answer.file}: {answer.error}"), file=sys.stderr)
        sys.exit(1)


def _check_output(name: str) -> Path | None:
    """Refuses a file that could not be written in the end."""
    if not name:
        return None
    path = Path(name).expanduser()
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--output={name} must end in {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--output={name}: there is no folder {path.parent}")
    return path


def _load(request: Request) -> Predictor:
    if (request.workdir / ESTIMATOR).exists():
        from cnn_jax.tools import features  # imports much that a network by itself does not need

        return features.load_classifier(request.workdir, request.config)
    return load_predictor(request.workdir, request.config, request.checkpoint)


def classify(
    predictor: Predictor,
    paths: Iterable[str],
    top_k: int = 1,
    explain: Callable[[str, np.ndarray, np.ndarray], None] | None = None,
) -> Iterator[Answer]:
    """Yields an answer for each of the files, and for each image below the folders, in order.

    Few photos are in memory at once. `explain` gets the file, its pixels and its probabilities.
    """
    found = [entry for path in paths for entry in _list(path)]
    layout = replace(photos.Layout.of(predictor.config.data), side=predictor.image_shape[0])
    blocks = [found[i : i + _AT_ONCE] for i in range(0, len(found), _AT_ONCE)]
    with (
        progress.bar("classifying photos", len(found)) as done,
        ThreadPoolExecutor(1) as ahead,
    ):

        def read(block: Sequence[Answer]) -> tuple[np.ndarray, list[str]]:
            names = [Path(answer.file) for answer in block if not answer.error]
            return photos.read_images(names, layout, done)

        waiting = ahead.submit(read, blocks[0]) if blocks else None
        for i, block in enumerate(blocks):
            assert waiting is not None
            images, reasons = waiting.result()
            waiting = ahead.submit(read, blocks[i + 1]) if i + 1 < len(blocks) else None
            yield from _answers(predictor, block, images, reasons, top_k, len(blocks) > 1, explain)


def _list(path: str) -> list[Answer]:
    """Returns the files that a path names, without classes yet."""
    expanded = Path(path).expanduser()
    try:
        return [Answer(str(file)) for file in photos.list_images(expanded)]
    except (UserError, OSError) as error:
        return [Answer(path, error=str(error).removeprefix(f"{expanded} "))]


def _answers(
    predictor: Predictor,
    block: Sequence[Answer],
    images: np.ndarray,
    reasons: Sequence[str],
    top_k: int,
    of_many: bool,
    explain: Callable[[str, np.ndarray, np.ndarray], None] | None,
) -> Iterator[Answer]:
    """Yields the answers for the files of a block, some of which may have an error already."""
    if of_many and len(images) < _AT_ONCE:  # Another shape would be compiled once more.
        images = np.concatenate(
            [images, np.zeros((_AT_ONCE - len(images), *images.shape[1:]), np.uint8)]
        )
    probabilities = predictor.probabilities(images) if any(not r for r in reasons) else images
    rows = iter(zip(images, reasons, probabilities, strict=False))
    for answer in block:
        if answer.error:
            yield answer
            continue
        pixels, reason, row = next(rows)
        if reason:
            yield replace(answer, error=reason)
            continue
        order = np.argsort(-row, kind="stable")[:top_k].tolist()
        yield replace(answer, top=tuple((predictor.class_names[i], float(row[i])) for i in order))
        if explain:
            explain(answer.file, pixels, row)


def _table(answers: Sequence[Answer], top_k: int, suffix: str) -> bytes:
    """Returns the content of a .csv or .jsonl file, one answer a line."""
    if suffix == ".jsonl":
        return "".join(json.dumps(answer.as_json()) + "\n" for answer in answers).encode()
    numbers = ["", *(f"_{i}" for i in range(2, top_k + 1))]
    columns = [f"{name}{n}" for n in numbers for name in ("class", "probability")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *columns, "uncertain", "error"])
    for answer in answers:
        cells = [cell for name, p in answer.top for cell in (name, f"{p:.4f}")]
        cells += [""] * (len(columns) - len(cells))
        uncertain = "" if answer.uncertain is None else str(answer.uncertain).lower()
        writer.writerow([answer.file, *cells, uncertain, answer.error])
    # The bytes of file names that are no text stay as they are.
    return text.getvalue().encode("utf-8", "surrogateescape")


def _explainer(predictor: Predictor, folder: Path) -> Callable[[str, np.ndarray, np.ndarray], None]:
    """Returns a function that draws where a photo supports its class, as a picture in `folder`.

    Raises:
        UserError: Grad-CAM can't be computed, or the folder can't be made.
    """
    from cnn_jax import drawing, saliency  # imports matplotlib, which takes half a second

    if type(predictor) is not Predictor:
        raise UserError("--explain needs a network of its own, without a classifier beside it")
    layer = saliency.last_maps(predictor)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--explain={folder}: {one_line(error)}") from None
    taken: set[str] = set()

    def explain(file: str, pixels: np.ndarray, probabilities: np.ndarray) -> None:
        target = int(probabilities.argmax())
        (cam,) = saliency.grad_cam(predictor, pixels[None], np.array([target]), layer)
        title = f"{predictor.class_names[target]} ({probabilities[target]:.1%})"
        stem = printable(file).strip("/").replace("/", "_")
        name = next(
            n for i in range(len(taken) + 1) if (n := f"{stem}{f'-{i}' * (i > 0)}.png") not in taken
        )
        taken.add(name)
        seen = saliency.seen_part(predictor, pixels)
        files.write(folder / name, drawing.png(drawing.explanation(seen, title, cam)))

    return explain
