"""What figures show, read back from matplotlib's objects."""

import struct

import numpy as np
import pytest
from helpers.drawings import pixels
from matplotlib.axes import Axes

from cnn_jax import drawing, models, saliency
from cnn_jax.config import ModelConfig
from cnn_jax.models import inspection

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
VGG16 = ModelConfig(
    name="vgg16", blocks=((4, 4), (4, 4), *((8, 8, 8),) * 3), dense=(8, 8), dropout=0.5
)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def ticks(ax: Axes) -> tuple[list[str], list[str]]:
    """Returns the labels below and beside the axes."""
    return tuple(
        [label.get_text() for label in axis.get_ticklabels()] for axis in (ax.xaxis, ax.yaxis)
    )


def width(png: bytes) -> int:
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">I", png[16:20])[0]


def test_the_chapters_convolution_gives_three_first():
    found = drawing.valid_convolution(drawing.CHAPTER_IMAGE, drawing.CHAPTER_KERNEL)
    np.testing.assert_array_equal(found, [[3, 2, 1], [1, 3, 1], [0, 1, 3]])
    figure = drawing.worked_convolution(drawing.CHAPTER_IMAGE, drawing.CHAPTER_KERNEL)
    image, kernel, feature_map = figure.axes
    assert texts(feature_map) == ["3", "2", "1", "1", "3", "1", "0", "1", "3"]
    assert "".join(texts(image)) == "1110001100011000001000001"
    assert texts(kernel) == ["1", "0", "0", "0", "1", "0", "0", "0", "1"]
    assert [ax.get_title() for ax in figure.axes] == [
        "image, 5x5",
        "kernel, 3x3",
        "feature map, 3x3",
    ]
    assert figure.get_supxlabel() == (
        "first value: 1·1 + 1·0 + 1·0 + 0·0 + 1·1 + 1·0 + 0·0 + 1·0 + 1·1 = 3"
    )
    assert width(drawing.png(figure)) == 960


def test_a_convolution_does_not_flip_its_kernel():
    kernel = np.array([[1, 2], [0, 0]])
    found = drawing.valid_convolution(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 5]]), kernel)
    np.testing.assert_array_equal(found, [[1, 0], [2, 1]])


def test_filters_of_three_channels_are_drawn_in_colour():
    """A weight of 0 is gray, and each filter's largest weight white or black, whatever its size."""
    kernel = np.zeros((3, 3, 3, 2), np.float32)
    kernel[0, 0, :, 0] = (2, 0, -2)
    kernel[2, 2, :, 1] = (0.1, 0.1, 0.1)
    (ax,) = drawing.filters(kernel, "conv1").axes
    assert ax.get_title() == "conv1: 2 filters of 3x3x3 in RGB; gray is 0"
    drawn = pixels(ax)
    np.testing.assert_allclose(drawn[0, 0], [1, 0.5, 0])
    np.testing.assert_allclose(drawn[0, 17], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(drawn[17, 36], [1, 1, 1])  # 18 pixels, a gap, 18 pixels.
    np.testing.assert_allclose(drawn[0, 18], [1, 1, 1])


def test_other_filters_show_the_slice_with_the_largest_weights():
    kernel = np.zeros((3, 3, 5, 70), np.float32)
    kernel[0, 0, 3, 0] = -0.5
    kernel[0, 0, 1, 0] = 0.25
    ax, bar = drawing.filters(kernel, "block2/conv1").axes
    assert ax.get_title() == (
        "block2/conv1: the first 64 of 70 filters of 3x3x5;\n"
        "for each filter, the 3x3 slice with the largest weights"
    )
    assert pixels(ax)[0, 0] == -0.5
    assert ax.images[0].get_clim() == (-0.5, 0.5)
    assert bar.get_ylabel() == "weight"
    assert drawing.filters(np.zeros_like(kernel), "dead").axes


def test_activation_functions_and_their_derivatives():
    function, derivative = drawing.activation_functions().axes
    named = {line.get_label(): line for line in function.lines}
    assert list(named) == ["sigmoid", "tanh", "ReLU", "GELU"]
    slopes = dict(zip(named, derivative.lines, strict=True))
    for name, (value, slope) in {
        "sigmoid": (0.731058579, 0.196611933),
        "tanh": (0.761594156, 0.419974342),
        "ReLU": (1.0, 1.0),
        "GELU": (0.841344746, 1.083315471),
    }.items():
        at = int(np.argmin(np.abs(np.asarray(named[name].get_xdata()) - 1.0)))
        np.testing.assert_allclose(np.asarray(named[name].get_ydata())[at], value, rtol=1e-8)
        np.testing.assert_allclose(np.asarray(slopes[name].get_ydata())[at], slope, rtol=1e-8)
    assert len({line.get_linestyle() for line in function.lines}) == 4


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(name="simple_cnn", blocks=((4,),), dense=(8,)),
        VGG16,
        ModelConfig(name="resnet_small", blocks=((4, 4), (8, 8), (16, 16)), dense=()),
    ],
    ids=lambda model: model.name,
)
def test_the_architecture_of_any_network_is_its_summary(model: ModelConfig):
    shape = (64, 64, 3)
    rows = inspection.summarize(models.build(model, 3), shape)
    (ax,) = drawing.architecture(rows, shape, "mine").axes
    shown = texts(ax)
    assert {"images", "64 x 64 x 3", "Conv", "Dense"} <= set(shown)
    for row in rows:
        assert row.name in shown
        assert " x ".join(map(str, row.output_shape)) in shown
    assert f"{rows[0].params:,}" in shown
    assert ax.get_title() == f"mine: {sum(row.params for row in rows):,} parameters"
    widths = [box.get_width() for box in ax.patches]  # pyright: ignore
    assert len(widths) == len(rows) + 1
    assert widths[1] == max(widths)
    assert widths[-1] == min(widths)


def test_samples_are_in_the_row_of_their_class():
    (ax,) = drawing.samples(IMAGES, LABELS, ("cat", "dog", "owl"), per_class=3).axes
    assert ticks(ax)[1] == ["cat", "dog", "owl"]
    drawn = pixels(ax)
    assert drawn.shape == (26, 26, 3)
    np.testing.assert_array_equal(drawn[:8, 9:17], IMAGES[3])
    np.testing.assert_array_equal(drawn[18:26, :8], IMAGES[2])
    assert np.all(drawn[:8, 18:] == 255)


def test_parts_and_runs_differ_in_more_than_colour():
    def series(first: float) -> drawing.Series:
        return drawing.Series(np.array([1, 2]), np.array([first, 1.0]), np.array([0.25, 0.5]))

    parts = {"train": series(2.0), "validation": series(3.0)}
    figure = drawing.learning_curves({"a": parts, "b": parts})
    accuracy, loss = figure.axes
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("accuracy (%)", "loss")
    assert accuracy.get_xlabel() == loss.get_xlabel() == "epoch"
    labels = [line.get_label() for line in loss.lines]
    assert labels == ["a, train", "a, validation", "b, train", "b, validation"]
    assert [text.get_text() for text in figure.legends[0].texts] == labels
    assert loss.get_legend() is None
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [25, 50])
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), [3, 1])
    styles = {(line.get_linestyle(), line.get_marker()) for line in loss.lines}
    assert len(styles) == 4
    steps = (np.array([0.5, 1.0, 1.5]), np.array([3.0, 2.0, 1.0]))
    _, loss = drawing.learning_curves({"": parts}, steps).axes
    assert [line.get_label() for line in loss.lines] == ["single steps", "train", "validation"]
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), steps[1])


@pytest.mark.parametrize("n_letters", [12, 13, 24])
def test_the_legend_of_many_runs_stays_in_the_figure(n_letters: int):
    values = np.array([0.5, 0.75])
    parts = {part: drawing.Series(values, values, values) for part in ("train", "test (once)")}
    figure = drawing.learning_curves({f"{i}{(n_letters - 1) * 'e'}": parts for i in range(4)})
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_single_point_is_a_large_hollow_marker():
    """With several runs it has its run's colour and marker, as the curves do."""
    values = np.array([0.5])
    point = drawing.Series(values, values, values, single_point=True)
    parts = {"validation": drawing.Series(values, values, values), "test (once)": point}
    for ax in drawing.learning_curves({"a": parts, "b": parts}).axes:
        curve, point, _, other = ax.lines
        assert curve.get_color() == point.get_color() != other.get_color()
        assert curve.get_marker() == point.get_marker() != other.get_marker()
        assert (curve.get_fillstyle(), point.get_fillstyle()) == ("full", "none")
        assert (curve.get_markersize(), point.get_markersize()) == (4, 9)


def test_the_confusion_matrix_holds_its_counts():
    counts = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    ax, _ = drawing.confusion(counts, ("cat", "dog", "owl")).axes
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(0, 0): "8", (1, 0): "2", (0, 1): "1", (1, 1): "3"}  # (column, row)
    assert ticks(ax) == (["cat", "dog", "owl"], ["cat", "dog", "owl"])
    np.testing.assert_allclose(pixels(ax)[0], [0.8, 0.2, 0])
    np.testing.assert_allclose(pixels(ax)[2], 0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert ax.texts[0].get_color() == "white" and ax.texts[1].get_color() == "black"
    many = drawing.confusion(np.eye(21, dtype=int), [str(i) for i in range(21)]).axes[0]
    assert texts(many) == []


def test_mistakes_name_both_classes_and_the_probability():
    probabilities = np.array([[0.1, 0.9, 0.0], [0.0, 0.25, 0.75]])
    (ax,) = drawing.mistakes(IMAGES[:2], LABELS[:2], probabilities, ("cat", "dog", "owl")).axes
    assert texts(ax) == ["cat\npredicted as\ndog (90%)", "dog\npredicted as\nowl (75%)"]
    np.testing.assert_array_equal(pixels(ax, 1), IMAGES[1])


def test_feature_maps_show_the_most_active_of_each_layer():
    maps = np.zeros((4, 4, 20), np.float32)
    maps[..., 13], maps[..., 5] = 2, 1
    names = ("conv1", "stage1/block1/shortcut_norm")
    figure = drawing.feature_maps(IMAGES[0], {names[0]: maps, names[1]: maps[..., :3]})
    image, first, second = figure.axes
    assert image.get_ylabel() == "image\n8 x 8 x 3"
    assert first.get_ylabel() == "conv1\n4 x 4 x 20"
    assert second.get_ylabel() == "stage1/block1/\nshortcut_norm\n4 x 4 x 3"
    np.testing.assert_array_equal(pixels(first)[0, [0, 5, 10]], [2, 1, 0])


def test_heat_maps_are_beside_their_images():
    drops, cam = np.zeros((2, 3, 3)), np.zeros((2, 4, 4))
    drops[0, 1, 1], cam[1, 2, 2] = -3, 5
    figure = drawing.heat_maps(IMAGES[:2], ["cat, 90%", "dog, 80%"], drops, (4, 2), cam, (8, 8))
    left, middle, right = figure.axes[3:6]
    assert left.get_ylabel() == "dog, 80%"
    np.testing.assert_array_equal(pixels(left), IMAGES[1])
    assert pixels(right, 1)[2, 2] == 1
    assert middle.images[1].get_clim() == (-3, 3)
    labels = [bar.get_xlabel() for bar in figure.axes[6:]]
    assert labels == [
        "drop in the logit when\nthis square is hidden",
        "Grad-CAM\n(relative to its maximum)",
    ]
    single = drawing.heat_maps(IMAGES[:1], ["a"], drops[1:], (4, 2), cam[:1], (8, 8))
    assert width(drawing.png(single)) == 960


def test_cells_are_centred_on_the_squares_that_were_hidden():
    """Squares of 4 pixels, every 2, the first centred at 1.5; column 18 was never hidden."""
    image, drops, cam = np.zeros((16, 19, 3), np.uint8), np.zeros((7, 8)), np.zeros((4, 4))
    assert saliency.square(16, 19) == (4, 2)
    seen = (12, 13)
    figure = drawing.heat_maps(image[None], ["a"], drops[None], (4, 2), cam[None], seen)
    _, middle, right, *_ = figure.axes
    left, after, bottom, top = middle.images[1].get_extent()
    columns, rows = np.linspace(left, after, 17)[1::2], np.linspace(top, bottom, 15)[1::2]
    np.testing.assert_allclose(columns, [1.5, 3.5, 5.5, 7.5, 9.5, 11.5, 13.5, 15.5])
    np.testing.assert_allclose(rows, [1.5, 3.5, 5.5, 7.5, 9.5, 11.5, 13.5])
    np.testing.assert_array_equal(right.images[1].get_extent(), (2.5, 15.5, 13.5, 1.5))
    for ax in (middle, right):
        assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 18.5), (15.5, -0.5))


def test_training_views_stand_beside_their_image_in_rows():
    views = np.random.default_rng(1).integers(0, 256, (3, 4, 6, 6, 3)).astype(np.uint8)
    figure = drawing.training_views(IMAGES[:3], views)
    (ax,) = figure.axes
    assert texts(ax) == ["as stored", "as trained on"]
    shown = {tuple(image.get_extent()): pixels(ax, i) for i, image in enumerate(ax.images)}
    rows = sorted({(top, bottom) for _, _, bottom, top in shown})
    columns = sorted({(left, right) for left, right, _, _ in shown})
    assert (len(rows), len(columns), len(shown)) == (3, 5, 15)
    for (left, right, bottom, top), image in shown.items():
        row, column = rows.index((top, bottom)), columns.index((left, right))
        expected = views[row, column - 1] if column else IMAGES[row]
        np.testing.assert_array_equal(image, expected)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # from top to bottom
    assert width(drawing.png(figure)) == 960


def test_the_curve_of_learning_rates_marks_the_suggested_one():
    rates = np.array([0.01, 0.1, 1.0, 10.0])
    (ax,) = drawing.learning_rates(rates, rates, np.array([2.0, 1.0, 2.0, 99.0]), 0.01).axes
    assert ax.get_xscale() == "log"
    assert ax.get_ylim() == (0.0, 4.0)
    assert ax.lines[2].get_label() == "suggested, a tenth of the rate with the lowest loss: 0.01"
    np.testing.assert_array_equal(ax.lines[2].get_xdata(), [0.01, 0.01])


def test_strangers_names_are_drawn_as_they_are():
    """Mathematics, control characters, no text at all, scripts that the font lacks, and length."""
    names = ("$\\frac$", "two\nlines", "\udcff\x1b", "猫", "a" * 99)
    counts = np.eye(5, dtype=int)
    ax, _ = (figure := drawing.confusion(counts, names)).axes
    shown = ticks(ax)[0]
    assert shown == ["\\$\\frac\\$", "two\\nlines", "\\udcff\\x1b", "猫", "a" * 13 + "…"]
    assert width(drawing.png(figure)) == 960
    few = drawing.mistakes(IMAGES[:5], np.arange(5), np.eye(5)[::-1], names)
    assert width(drawing.png(few)) == 960
