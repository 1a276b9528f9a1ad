"""The tables of --mode=summary at the width of a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from cnn_jax import models
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.tools import summary

RESNET = ModelConfig(name="resnet_small", blocks=((16, 16), (32, 32), (64, 64)), dense=())


def printed(table: Table) -> list[list[str]]:
    """Returns the words of each line that a terminal of 80 columns shows."""
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    console.print(table)
    text = console.file.getvalue()  # pyright: ignore
    assert max(map(len, text.splitlines())) <= 80
    return [line.replace("│", " ").split() for line in text.splitlines()]


def test_names_and_numbers_of_a_residual_network_are_whole():
    rows = inspection.summarize(models.build(RESNET, 10), (32, 32, 3))
    lines = printed(summary.layers_table("resnet", rows))
    for row in rows:
        (line,) = (line for line in lines if line[:1] == [row.name])
        assert line[-2:] == [f"{row.params:,}", f"{row.flops:,}"]
    total = [f"{sum(r.params for r in rows):,}", f"{sum(r.flops for r in rows):,}"]
    assert ["total", *total] in lines


def test_the_first_matching_pattern_gives_a_parameter_its_multipliers():
    groups = (("head/.*", None), (".*/bias", None), (".*", None))
    later = (("head/.*", 1.0), (".*/bias", None), (".*", 0.125))
    names = ["conv1/bias", "conv1/kernel", "head/bias"]
    lines = printed(summary.groups_table(((0, groups), (3, later)), names))
    assert ["conv1/bias", ".*/bias", "frozen", "frozen"] in lines
    assert ["conv1/kernel", ".*", "frozen", "0.125"] in lines
    assert ["head/bias", "head/.*", "frozen", "1"] in lines


def test_a_parameter_without_a_pattern_is_refused():
    with pytest.raises(UserError, match="no pattern matches: fc1/bias;"):
        summary.groups_table(((0, (("head/.*", 1.0),)),), ["fc1/bias", "head/bias"])
