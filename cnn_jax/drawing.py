"""Every figure of the project: each function takes arrays and returns a matplotlib Figure.

Figures are legible at a width of 800 pixels. The colours are safe for colour-blind readers, and
whatever a colour shows is also shown by a marker, a line style or text.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Real, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cnn_jax.errors import printable
from cnn_jax.models.inspection import LayerSummary

Array1 = Real[np.ndarray, "n"]

# Okabe and Ito, "Color Universal Design" (2008); gray replaces their yellow, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#808080")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")

CHAPTER_IMAGE = np.array(
    [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
)
"""A 5x5 binary image that starts with the chapter's patch, for which the kernel gives 3."""
CHAPTER_KERNEL = np.eye(3, dtype=int)
"""The chapter's 3x3 diagonal kernel."""

_WIDTH, _DPI = 6.0, 160  # Inches and dots per inch: 960 pixels.
_TITLE, _SMALL = 10, 8  # Font sizes in points; other text is 10, or 9 where there is much of it.
_MAX_FILTERS, _MAX_MAPS, _MAX_CLASSES = 64, 8, 20  # Drawn at most.
_ENLARGED = 6  # Pixels per weight in the picture of a filter; gaps between filters are one pixel.
_LONG_NAME = 11  # Characters; three longer names do not fit side by side in a legend.
_MAX_NUMBERED = 20  # Classes up to which the cells of a confusion matrix hold numbers.


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file, 960 pixels wide."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be in any script, and the font lacks some of them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def worked_convolution(
    image: Int[np.ndarray, "height width"], kernel: Int[np.ndarray, "rows columns"]
) -> Figure:
    """Draws image, kernel and feature map, and the sum behind the map's first value."""
    result = valid_convolution(image, kernel)
    figure = _figure(2.9)
    widths = [image.shape[1], kernel.shape[1], result.shape[1]]
    axes = figure.subplots(1, 3, width_ratios=widths)
    arrays = {"image": image, "kernel": kernel, "feature map": result}
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        ax.imshow(array, cmap="Blues", vmin=0, vmax=2 * max(array.max(), 1))
        _write_numbers(ax, array, 12)
        ax.set_xticks(np.arange(array.shape[1] + 1) - 0.5, labels=[])
        ax.set_yticks(np.arange(array.shape[0] + 1) - 0.5, labels=[])
        ax.grid(color="0.6")
        ax.tick_params(length=0)
        ax.set_title(f"{name}, {array.shape[0]}x{array.shape[1]}", fontsize=_TITLE)
    for ax, (rows, columns) in ((axes[0], kernel.shape), (axes[2], (1, 1))):
        frame = Rectangle((-0.5, -0.5), columns, rows, fill=False, edgecolor=COLORS[1], linewidth=3)
        frame.set_zorder(4)  # Above the grid.
        ax.add_patch(frame)
    window = image[: kernel.shape[0], : kernel.shape[1]]
    pairs = zip(window.ravel(), kernel.ravel(), strict=True)
    terms = " + ".join(f"{a}·{b}" for a, b in pairs)
    figure.supxlabel(f"first value: {terms} = {result[0, 0]}", fontsize=9)
    return figure


def valid_convolution(
    image: Int[np.ndarray, "height width"], kernel: Int[np.ndarray, "rows columns"]
) -> Int[np.ndarray, "new_height new_width"]:
    """Returns the convolution as networks compute it: no padding, kernel not flipped."""
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
    return np.einsum("ijkl,kl->ij", windows, kernel)


def filters(kernel: Float[np.ndarray, "height width in out"], layer: str) -> Figure:
    """Draws the first 64 filters of a convolution.

    Filters of three input channels are drawn in colour: gray is 0, and each filter is scaled to its
    largest weight. Of other filters the slice of the input channel with the largest weights is
    drawn, all on one scale.
    """
    height, width, n_in, n_out = kernel.shape
    shown = np.moveaxis(kernel, -1, 0)[:_MAX_FILTERS]
    count = (
        f"{n_out} filters"
        if n_out <= _MAX_FILTERS
        else f"the first {_MAX_FILTERS} of {n_out} filters"
    )
    title = f"{layer}: {count} of {height}x{width}x{n_in}"
    shown = shown.repeat(_ENLARGED, axis=1).repeat(_ENLARGED, axis=2)  # for thin gaps
    columns = math.ceil(math.sqrt(2 * len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(0.8 + 5.4 * rows / columns)
    ax = figure.subplots()
    if n_in == 3:
        largest = np.abs(shown).max(axis=(1, 2, 3), keepdims=True)
        ax.imshow(_tiles(0.5 + shown / (2 * np.where(largest, largest, 1)), columns, 1.0))
        ax.set_title(f"{title} in RGB; gray is 0", fontsize=_TITLE)
    else:
        strongest = np.square(shown).sum(axis=(1, 2)).argmax(axis=1)
        planes = shown[np.arange(len(shown)), :, :, strongest]
        limit = np.abs(planes).max() or 1.0
        colormap = matplotlib.colormaps["PuOr"].with_extremes(bad="0.75")
        tiles = _tiles(planes, columns, np.nan)
        drawn = ax.imshow(tiles, cmap=colormap, vmin=-limit, vmax=limit)
        figure.colorbar(drawn, ax=ax, label="weight", shrink=0.8)
        slice_title = f"for each filter, the {height}x{width} slice with the largest weights"
        ax.set_title(f"{title};\n{slice_title}", fontsize=_TITLE)
    ax.set_axis_off()
    return figure


def activation_functions() -> Figure:
    """Draws sigmoid, tanh, ReLU and GELU, and their derivatives."""
    x = np.linspace(-5, 5, 501)
    sigmoid, normal = 1 / (1 + np.exp(-x)), np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    curves = {
        "sigmoid": (sigmoid, sigmoid * (1 - sigmoid)),
        "tanh": (np.tanh(x), 1 - np.tanh(x) ** 2),
        "ReLU": (np.maximum(x, 0), np.where(x > 0, 1.0, 0.0)),
        "GELU": (x * below, below + x * normal),
    }
    figure = _figure(3.2)
    axes = figure.subplots(1, 2)
    for which, (ax, title) in enumerate(zip(axes, ("function", "derivative"), strict=True)):
        for i, (name, pair) in enumerate(curves.items()):
            ax.plot(x, pair[which], LINES[i], color=COLORS[i], label=name, linewidth=2)
        ax.set(title=title, xlabel="input", ylabel=("output", "derivative")[which])
        ax.grid(alpha=0.3)
    axes[0].set_ylim(-1.2, 3)
    axes[0].legend()
    return figure


def architecture(
    rows: Sequence[LayerSummary], image_shape: tuple[int, int, int], name: str
) -> Figure:
    """Draws the layers from top to bottom as boxes.

    A box is as wide as the logarithm of the number of values in the layer's output.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    boxes = [("images", "", image_shape, 0)]
    boxes += [(row.name, row.kind, row.output_shape, row.params) for row in rows]
    total = sum(row.params for row in rows)
    largest = max(math.log(1 + math.prod(shape)) for _, _, shape, _ in boxes)
    figure = _figure(0.9 + 0.3 * len(boxes))
    ax = figure.subplots()
    for y, (layer, kind, shape, params) in enumerate(boxes):
        width = 0.34 * math.log(1 + math.prod(shape)) / largest
        color = COLORS[kinds.index(kind) % len(COLORS)] if kind else "0.5"
        corner = (0.7 - width / 2, y - 0.36)
        ax.add_patch(Rectangle(corner, width, 0.72, facecolor=color, alpha=0.35, edgecolor=color))
        ax.text(0, y, _plain(layer, 28), va="center", fontsize=9)
        ax.text(0.33, y, _plain(kind, 18), va="center", fontsize=_SMALL, color="0.3")
        ax.text(0.7, y, " x ".join(map(str, shape)), ha="center", va="center", fontsize=9)
        ax.text(1, y, f"{params:,}" if params else "", ha="right", va="center", fontsize=9)
    headings = (0, "layer", "left"), (0.7, "output", "center"), (1, "parameters", "right")
    for x, text, side in headings:
        ax.text(x, -0.95, text, ha=side, va="center", fontsize=9, weight="bold")
    ax.set(xlim=(0, 1), ylim=(len(boxes) - 0.5, -1.4))
    ax.set_title(f"{_plain(name, 40)}: {total:,} parameters", fontsize=_TITLE)
    ax.set_axis_off()
    return figure


def samples(
    images: UInt8[np.ndarray, "n height width 3"],
    labels: Int[np.ndarray, "n"],
    class_names: Sequence[str],
    per_class: int = 10,
) -> Figure:
    """Draws a row of images for each of the first 20 classes."""
    shown = list(class_names)[:_MAX_CLASSES]
    height, width = images.shape[1:3]
    grid = np.full((len(shown), per_class, height, width, 3), 255, np.uint8)
    for row, _ in enumerate(shown):
        of_class = images[labels == row][:per_class]
        grid[row, : len(of_class)] = of_class
    tiles = _tiles(grid.reshape(-1, height, width, 3), per_class, 255)
    figure = _figure(0.3 + 5.4 * tiles.shape[0] / tiles.shape[1])
    ax = figure.subplots()
    ax.imshow(tiles)
    ax.set_xticks([])
    middles = np.arange(len(shown)) * (height + 1) + height / 2
    ax.set_yticks(middles, labels=[_plain(name, 16) for name in shown])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def training_views(
    stored: UInt8[np.ndarray, "n stored_height stored_width 3"],
    views: UInt8[np.ndarray, "n views height width 3"],
) -> Figure:
    """Draws a row for each image: as it is stored, and what the network is trained on of it."""
    n_rows, n_columns = len(views), 1 + views.shape[1]
    figure = _figure(0.3 + _WIDTH * n_rows / n_columns)
    ax = figure.subplots()  # One for all images, since drawing many axes is slow.
    for row, (image, seen) in enumerate(zip(stored, views, strict=True)):
        for column, shown in enumerate([image, *seen]):
            x = column + (0.1 if column else 0)  # A gap after the first.
            ax.imshow(shown, extent=(x + 0.02, x + 0.98, row + 0.98, row + 0.02))
    for x, text in ((0.5, "as stored"), (0.1 + (n_columns + 1) / 2, "as trained on")):
        ax.text(x, -0.04, text, ha="center", va="bottom", fontsize=9)
    ax.set(xlim=(0, n_columns + 0.1), ylim=(n_rows, -0.2))
    ax.set_axis_off()
    return figure


@dataclass(frozen=True)
class Series:
    """Loss and accuracy on one part of the data, such as train, by epoch."""

    epochs: Array1
    loss: Array1
    accuracy: Array1
    """In [0, 1]."""
    single_point: bool = field(default=False, kw_only=True)
    """Drawn as a large hollow marker instead of a line."""


def learning_curves(
    histories: Mapping[str, Mapping[str, Series]],
    steps: tuple[Array1, Array1] = (np.zeros(0), np.zeros(0)),
) -> Figure:
    """Draws accuracy and loss of one or more runs by epoch.

    Each run has a colour and each part of the data a line style; with a single run each part has
    a colour as well.

    Args:
        histories: By run and by part of the data, such as "train" and "validation".
        steps: Epochs and losses of single steps, drawn in light gray.
    """
    parts = list(dict.fromkeys(part for history in histories.values() for part in history))
    single = len(histories) == 1
    figure = _figure(3.2)
    axes = figure.subplots(1, 2, sharex=True)
    if len(steps[0]):
        axes[1].plot(*steps, color="0.75", linewidth=1, label="single steps", zorder=0)
    for i, (run, history) in enumerate(histories.items()):
        for part, series in history.items():
            line = parts.index(part)
            color = line if single else i
            style = {"color": COLORS[color % len(COLORS)]}
            style |= {"linestyle": LINES[line % len(LINES)]}
            style |= {"marker": MARKERS[color % len(MARKERS)], "markersize": 4}
            if series.single_point:
                style |= {"linestyle": "none", "markersize": 9, "fillstyle": "none"}
            label = part if single else f"{_plain(run, 24)}, {part}"
            axes[0].plot(series.epochs, 100 * series.accuracy, label=label, **style)
            axes[1].plot(series.epochs, series.loss, label=label, **style)
    for ax, ylabel in zip(axes, ("accuracy (%)", "loss"), strict=True):
        ax.set(xlabel="epoch", ylabel=ylabel)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    if single:
        axes[1].legend(fontsize=_SMALL)
    else:  # Above the axes, where many entries hide no line.
        entries = axes[1].get_legend_handles_labels()
        columns = min(len(histories), 3 if max(map(len, histories)) <= _LONG_NAME else 2)
        figure.legend(*entries, loc="outside upper center", fontsize=_SMALL, ncols=columns)
    return figure


def confusion(counts: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix: true classes as rows, predicted classes as columns.

    A cell is shaded by its share of the row. Beyond 20 classes names and counts are left out.
    """
    few = len(class_names) <= _MAX_NUMBERED
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = _figure(5.0)
    ax = figure.subplots()
    drawn = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=ax, label="share of the true class", shrink=0.8)
    ax.set(xlabel="predicted class", ylabel="true class")
    if few:
        _write_numbers(ax, counts, 9 if len(class_names) <= 10 else 6, dark=shares > 0.5)
        names = [_plain(name, 14) for name in class_names]
        places = np.arange(len(names))
        rotated = max(map(len, names)) > 3
        ax.set_xticks(places, labels=names, rotation=45 if rotated else 0, fontsize=9)
        ax.set_yticks(places, labels=names, fontsize=9)
        if rotated:
            for label in ax.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
    return figure


def mistakes(
    images: UInt8[np.ndarray, "n height width 3"],
    labels: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n classes"],
    class_names: Sequence[str],
) -> Figure:
    """Draws images with their true class, the predicted class and its probability."""
    columns = 5
    rows = math.ceil(len(images) / columns)
    caption = 0.45  # Height, as a share of an image's side.
    figure = _figure(rows * (1 + caption) * _WIDTH / columns)
    ax = figure.subplots()  # One for all images, since drawing many axes is slow.
    for i, (image, label, row) in enumerate(zip(images, labels, probabilities, strict=True)):
        x, bottom = i % columns, (i // columns + 1) * (1 + caption)
        ax.imshow(image, extent=(x + 0.03, x + 0.97, bottom - 0.03, bottom - 0.97))
        predicted = int(row.argmax())
        text = f"{_plain(class_names[int(label)], 14)}\npredicted as\n"
        text += f"{_plain(class_names[predicted], 11)} ({row[predicted]:.0%})"
        ax.text(x + 0.5, bottom - 0.99, text, ha="center", va="bottom", fontsize=9)
    ax.set(xlim=(0, columns), ylim=(rows * (1 + caption), 0))
    ax.set_axis_off()
    return figure


def feature_maps(
    image: UInt8[np.ndarray, "height width 3"],
    maps: Mapping[str, Float[np.ndarray, "_ _ channels"]],
) -> Figure:
    """Draws an image and, in a row for each layer, the feature maps with the largest means."""
    figure = _figure(0.85 * (len(maps) + 1))
    axes = figure.subplots(len(maps) + 1, 1, squeeze=False).ravel()
    axes[0].imshow(np.concatenate([image, *_blank(image, _MAX_MAPS - 1)], axis=1))
    axes[0].set_ylabel(f"image\n{' x '.join(map(str, image.shape))}", **_BESIDE)
    for ax, (name, values) in zip(axes[1:], maps.items(), strict=True):
        active = np.argsort(-values.mean(axis=(0, 1)), kind="stable")[:_MAX_MAPS]
        shown = np.moveaxis(values[..., active], -1, 0)
        missing = np.full((_MAX_MAPS - len(shown), *shown.shape[1:]), np.nan)
        ax.imshow(_tiles(np.concatenate([shown, missing]), _MAX_MAPS, np.nan), cmap="viridis")
        label = [_plain(part, 18) for part in name.rsplit("/", 1)]
        shape = " x ".join(map(str, values.shape))
        ax.set_ylabel("/\n".join(label) + f"\n{shape}", **_BESIDE)
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return figure


_BESIDE = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 9}


def heat_maps(
    images: UInt8[np.ndarray, "n height width 3"],
    names: Sequence[str],
    occlusion: Float[np.ndarray, "n rows columns"],
    square: tuple[int, int],
    grad_cam: Float[np.ndarray, "n map_height map_width"],
    seen: tuple[int, int],
) -> Figure:
    """Draws each image, labelled with its name, beside its two maps from `saliency`.

    `square` is the side and the step, in pixels, of the square that occlusion hides. `seen` is the
    height and width of the centre of each image, over which Grad-CAM lies.
    """
    figure = _figure(0.7 + 1.75 * len(images))
    axes = figure.subplots(len(images), 3, squeeze=False)
    limit = float(np.abs(occlusion).max()) or 1.0
    height, width = images.shape[1:3]
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    top, left = round((height - seen[0]) / 2) - 0.5, round((width - seen[1]) / 2) - 0.5
    centre = (left, left + seen[1], top + seen[0], top)
    overlays: list[Any] = []
    for row, image, name, drops, cam in zip(axes, images, names, occlusion, grad_cam, strict=True):
        for ax in row:
            ax.imshow(image)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(_plain(name, 24), fontsize=9)
        shown = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "alpha": 0.8}
        hidden = row[1].imshow(drops, extent=_extent(drops, *square), **shown)
        row[1].set(xlim=whole[:2], ylim=whole[2:])
        shown = {"cmap": "viridis", "vmin": 0, "vmax": 1, "alpha": 0.6, "interpolation": "bilinear"}
        weighed = row[2].imshow(cam / (cam.max() or 1.0), extent=centre, **shown)
        row[2].set(xlim=whole[:2], ylim=whole[2:])
        overlays = [hidden, weighed]
    labels = (
        "drop in the logit when\nthis square is hidden",
        "Grad-CAM\n(relative to its maximum)",
    )
    for drawn, label, column in zip(overlays, labels, (1, 2), strict=True):
        below = {"orientation": "horizontal", "shrink": 0.9, "aspect": 14}
        bar = figure.colorbar(drawn, ax=axes[:, column], **below)
        bar.set_label(label, fontsize=9)
        bar.locator = MaxNLocator(2)
    return figure


def explanation(
    image: UInt8[np.ndarray, "height width 3"],
    title: str,
    grad_cam: Float[np.ndarray, "map_height map_width"],
) -> Figure:
    """Draws an image with its class as title, and beside it the map from `saliency.grad_cam`."""
    figure = _figure(0.55 * _WIDTH)
    left, right = figure.subplots(1, 2)
    height, width = image.shape[:2]
    for ax in (left, right):
        ax.imshow(image)
        ax.set_axis_off()
    left.set_title(_plain(title, 40))
    right.set_title("Grad-CAM")
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = {"cmap": "viridis", "vmin": 0, "vmax": 1, "alpha": 0.6, "interpolation": "bilinear"}
    right.imshow(grad_cam / (grad_cam.max() or 1.0), extent=whole, **shown)
    return figure


def learning_rates(rates: Array1, losses: Array1, smoothed: Array1, suggested: float) -> Figure:
    """Draws the loss against a rising learning rate, and marks the suggested rate."""
    figure = _figure(3.4)
    ax = figure.subplots()
    ax.plot(rates, losses, color="0.75", linewidth=1, label="single steps")
    ax.plot(rates, smoothed, color=COLORS[0], linewidth=2, label="smoothed")
    label = f"suggested, a tenth of the rate with the lowest loss: {suggested:.2g}"
    ax.axvline(suggested, color=COLORS[1], linestyle="--", label=label)
    low, high = float(smoothed.min()), float(smoothed[: (len(smoothed) + 1) // 2].max())
    span = max(high - low, 0.1 * high)  # Before the loss diverges.
    limits = (low - span, high + 2 * span)
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=limits)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", fontsize=9)
    return figure


def _figure(height: float) -> Figure:
    """Returns an empty figure; the height is in inches. Unlike pyplot's it is garbage-collected."""
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _plain(text: str, limit: int) -> str:
    """Returns text for a label: printable, cut to `limit`, and without "$", which starts math."""
    text = printable(text)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def _write_numbers(
    ax: Axes,
    array: Int[np.ndarray, "rows columns"],
    size: int,
    dark: Shaped[np.ndarray, "rows columns"] | None = None,
) -> None:
    """Writes numbers into the cells of an image; with `dark`, in white there, and zeros nowhere."""
    for (row, column), value in np.ndenumerate(array):
        if dark is not None and not value:
            continue
        color = "white" if dark is not None and dark[row, column] else "black"
        ax.text(column, row, str(value), ha="center", va="center", fontsize=size, color=color)


def _extent(
    drops: Float[np.ndarray, "rows columns"], side: int, step: int
) -> tuple[float, float, float, float]:
    """Returns left, right, bottom and top of the map, so that each cell is centred on its square.

    Pixels are centred at whole numbers, so the centre of the first square is at (side - 1) / 2.
    """
    start = (side - 1 - step) / 2
    rows, columns = drops.shape
    return start, start + columns * step, start + rows * step, start


def _tiles(images: np.ndarray, columns: int, gap: float) -> np.ndarray:
    """Returns images [n, height, width, ...] as a grid, one pixel of value `gap` between them."""
    n, height, width, *channels = images.shape
    rows = math.ceil(n / columns)
    shape = (rows * (height + 1) - 1, columns * (width + 1) - 1, *channels)
    tiles = np.full(shape, gap, images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        tiles[top : top + height, left : left + width] = image
    return tiles


def _blank(image: np.ndarray, n: int) -> list[np.ndarray]:
    return [np.full_like(image, 255)] * n
