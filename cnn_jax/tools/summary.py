"""--mode=summary: the layers of a network, and the group of each parameter."""

from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from cnn_jax import data, models, optim
from cnn_jax.errors import printable
from cnn_jax.models import inspection
from cnn_jax.tools import Request


def run(request: Request) -> None:
    """Prints each layer's output shape, parameters and FLOPs of one image's forward pass.

    With `optim.groups`, a table of each parameter's learning-rate multiplier follows.

    Raises:
        UserError: the groups do not cover the parameters.
    """
    config = request.config
    image_shape, n_classes = data.describe(config.data)
    model = models.build(config.model, n_classes)
    rows = inspection.summarize(model, image_shape)
    console = Console(highlight=False, markup=False)
    title = f"{config.name}: one {' x '.join(map(str, image_shape))} image"
    console.print(layers_table(printable(title), rows))
    if config.optim.groups:
        names = inspection.param_names(model, image_shape)
        phases = optim.make_phases(config.optim, partial(models.last_block, model))
        console.print(groups_table(phases, names))


def layers_table(title: str, rows: list[inspection.LayerSummary]) -> Table:
    """Returns a row per layer, and the totals."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("layer", "kind", "output shape", "parameters", "FLOPs"):
        number = heading in ("parameters", "FLOPs")
        justify = "right" if number else "left"
        # Of a narrow terminal only the kinds are broken into lines.
        table.add_column(heading, justify=justify, no_wrap=heading != "kind", overflow="fold")
    for row in rows:
        shape = " x ".join(map(str, row.output_shape))
        table.add_row(row.name, row.kind, shape, f"{row.params:,}", f"{row.flops:,}")
    table.add_section()
    params, flops = sum(r.params for r in rows), sum(r.flops for r in rows)
    table.add_row("total", "", "", f"{params:,}", f"{flops:,}")
    return table


def groups_table(phases: optim.Phases, names: list[str]) -> Table:
    """Returns for each parameter its pattern, and its learning-rate multiplier by epoch.

    Raises:
        UserError: the groups do not cover the parameters, or a pattern is unused.
    """
    table = Table("parameter", "pattern", title="learning-rate multipliers (optim.groups)")
    for start, _ in phases:
        table.add_column(f"from epoch {start}", justify="right")
    groups = phases[0][1]  # Patterns are the same in all phases.
    optim.check_groups("optim.groups", groups, names)
    for name in names:
        pattern, _ = optim.group_of(groups, name) or ("", None)
        rates = [optim.multiplier(of_phase, name) for _, of_phase in phases]
        cells = ["frozen" if rate is None else f"{rate:g}" for rate in rates]
        table.add_row(*map(printable, (name, pattern, *cells)))
    return table
