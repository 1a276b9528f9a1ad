"""Looks into a network by the names of its modules: layers, and blocks and stages that hold them.

Everything here goes by what a named module returned, never by the input of the layer that runs
next, so it holds for networks that branch, and for linen modules of your own. A module's name is
its path from the network: "fc1", "stage2/block1/conv1"; the network itself has the name "".

The context managers act while JAX traces the network, so the function that is compiled must enter
them itself.
"""

import collections
import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Float

from cnn_jax import trees
from cnn_jax.errors import UserError, nearest

ImageShape = tuple[int, int, int]
"""Height, width and channels."""

# The arguments by which linen's and our modules learn whether they are in training, and their
# values in evaluation.
_EVALUATION = {"train": False, "deterministic": True, "use_running_average": True}


@dataclass(frozen=True)
class LayerSummary:
    """One row of a network's table."""

    name: str
    kind: str
    """The module's class."""
    output_shape: tuple[int, ...]
    """Of one image, without the batch."""
    params: int
    """Trainable numbers that the module itself holds, without those of modules inside it."""
    flops: int
    """Floating-point operations of one image's forward pass."""


def summarize(model: nn.Module, image_shape: ImageShape) -> list[LayerSummary]:
    """Returns a row for each module that has parameters of its own or holds no other module.

    Rows are in the order in which the modules are called, and nothing is computed. A multiplication
    and an addition count as two FLOPs, so each call of a module with a kernel counts 2 * (size of
    the kernel) * (output pixels). Biases, norms, activation functions and pools are not counted;
    together they are a few percent of the work.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with _recorded_calls() as calls:
        jax.eval_shape(model.init, jax.random.key(0), images)
    rows: dict[str, LayerSummary] = {}
    for call in calls:
        if call.params or _is_leaf(call, calls):
            shape = call.output.shape[1:] if call.output else ()
            flops = 2 * math.prod(shape[:-1]) * call.params.get("kernel", 0)
            if call.name in rows:  # It is called again, with the same parameters.
                flops += rows[call.name].flops
            params = sum(call.params.values())
            rows[call.name] = LayerSummary(call.name, call.kind, shape, params, flops)
    return list(rows.values())


def param_names(model: nn.Module, image_shape: ImageShape) -> list[str]:
    """Returns the names of all parameters in alphabetical order, without computing anything."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return list(trees.named_leaves(variables["params"]))


def outputs(
    model: nn.Module,
    variables: Any,
    images: Float[Array, "batch height width channels"],
    names: Collection[str],
) -> dict[str, Array]:
    """Returns what each named module returns in evaluation mode: an array [batch, ...].

    Of a module that is called several times, this is the result of the last call.

    Raises:
        UserError: no module of that name is called; the message has the nearest that is.
    """

    def is_wanted(module: nn.Module, method: str) -> bool:
        return method == "__call__" and _name(module) in names

    _, state = model.apply(
        variables, images, capture_intermediates=is_wanted, mutable=["intermediates"]
    )
    captured: Any = flax.traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
    for name in names:
        if _prefix(name) + "__call__" not in captured:
            known = _names(model, images)
            raise UserError(
                f"the network has no layer {name}{nearest(name, known)}; known: {', '.join(known)}"
            )
    return {name: captured[_prefix(name) + "__call__"][-1] for name in names}


@contextlib.contextmanager
def replaced(arrays: Mapping[str, Array]) -> Iterator[None]:
    """Inside the block, each module that `arrays` names returns its array instead of running.

    Raises:
        UserError: such a module is called twice, so that one array can't stand for its results.
    """
    called: set[str] = set()

    def replace(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        name = _name(context.module)
        if not name:
            called.clear()  # Another call of the whole network begins.
        if name not in arrays:
            return next_fun(*args, **kwargs)
        if name in called:
            raise UserError(f"{name} is called more than once, so its output can't be replaced")
        called.add(name)
        return arrays[name]

    with nn.intercept_methods(replace):
        yield


@contextlib.contextmanager
def frozen_in_eval_mode(params: Any, trainable: Any) -> Iterator[None]:
    """Inside the block, frozen modules run as in evaluation even when the network is training.

    `trainable` is `params` with None in place of each frozen leaf. A module is frozen if it has
    parameters and all of them are frozen. A module without parameters, such as Dropout, is frozen
    if the nearest module around it that has parameters is. Frozen BatchNorm uses its running
    statistics, which then do not change.

    Raises:
        UserError: a frozen module was constructed for training, which a call can't change.
    """
    is_frozen = _frozen_modules(params, trainable)

    def evaluate(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        name = _name(context.module)
        if context.method_name == "__call__" and is_frozen(name):
            arguments = inspect.signature(context.orig_method).bind_partial(*args, **kwargs)
            for switch in _switches(context):
                constructed = vars(context.module).get(switch)
                if constructed is None:
                    arguments.arguments[switch] = _EVALUATION[switch]
                elif constructed != _EVALUATION[switch]:
                    raise UserError(
                        f"{name} is frozen, but is constructed with {switch}={constructed}; "
                        f"pass {switch} to its call instead"
                    )
            args, kwargs = arguments.args, arguments.kwargs
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(evaluate):
        yield


def blocks(model: nn.Module, image_shape: ImageShape) -> frozenset[str]:
    """Returns the names of the innermost modules that are made of layers.

    They are those that hold layers directly and no parameters, except for the network itself.
    """
    layers = [row.name for row in summarize(model, image_shape)]
    return frozenset(name.rpartition("/")[0] for name in layers) - {"", *layers}


@contextlib.contextmanager
def recomputed(names: Collection[str]) -> Iterator[None]:
    """Inside the block, what the named modules compute is not kept for the backward pass.

    It is computed again there, from their inputs, by `nn.remat`. Dropout drops the same units.
    """
    running: list[str] = []

    def recompute(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        name = _name(context.module)
        if context.method_name != "__call__" or name not in names or name in running:
            return next_fun(*args, **kwargs)
        inputs, *switches = args  # Switches such as `train` decide what is traced.

        def call(module: nn.Module, inputs: Any) -> Any:
            running.append(name)
            outputs = module(inputs, *switches, **kwargs)
            running.remove(name)
            return outputs

        return nn.remat(call)(context.module, inputs)

    with nn.intercept_methods(recompute):
        yield


def cut_point(model: nn.Module, variables: Any, image_shape: ImageShape, trainable: Any) -> str:
    """Returns the name of the module whose outputs can stand for the images in training.

    Of the modules for which this holds, it is the last to finish: its output depends on no
    trainable parameter; before it nothing runs that differs between training and evaluation, such
    as dropout, unless it is frozen; and with its output `replaced`, neither the logits nor the new
    statistics depend on the images. `trainable` is as in `frozen_in_eval_mode`.

    Raises:
        UserError: there is no such module.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def evaluate(trainable: Any, variables: Any, images: Array) -> dict[str, Array]:
        params = trees.combine(trainable, variables["params"])
        return outputs(model, {**variables, "params": params}, images, candidates)

    def train(images: Array, variables: Any, replacements: dict[str, Array]) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        with frozen_in_eval_mode(variables["params"], trainable), replaced(replacements):
            return model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])

    with _recorded_calls() as evaluated:
        jax.eval_shape(model.apply, variables, images)
    with _recorded_calls() as trained:
        jax.eval_shape(train, images, variables, {})
    is_frozen = _frozen_modules(variables["params"], trainable)
    candidates = _cacheable(evaluated, trained, is_frozen)
    changes = _depends(evaluate, trainable, variables, images)
    for name, output in reversed(candidates.items()):
        if changes[name]:
            continue
        if not any(jax.tree.leaves(_depends(train, images, variables, {name: output}))):
            return name
    raise UserError(
        "train.cache_frozen=true: the network has no frozen layer whose output is all that the "
        "trainable layers read; freeze its first layers (optim.groups)"
    )


def _cacheable(
    evaluated: list["_Call"], trained: list["_Call"], is_frozen: Callable[[str], bool]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the outputs, in the order of their ends, that are the same in training as evaluated.

    They are those of modules that are called once, and that finish before the first module that
    acts differently in training.
    """
    differing = [
        call.start
        for call in trained
        if call.switches and _is_leaf(call, trained) and not is_frozen(call.name)
    ]
    shapes = {call.name: call.output for call in evaluated}
    times_called = collections.Counter(call.name for call in trained)
    return {
        call.name: call.output
        for call in sorted(trained, key=lambda call: call.end)
        if call.name
        and call.end < min(differing, default=math.inf)
        and times_called[call.name] == 1
        # What training computes in one operation, as a convolution with its pool, is not the same.
        and call.output is not None
        and call.output == shapes.get(call.name)
    }


@dataclass
class _Call:
    """One call of a module, without the calls of the modules in it."""

    name: str
    kind: str
    switches: frozenset[str]
    """Those of `_EVALUATION` that its arguments include."""
    start: int
    end: int = -1
    """Starts and ends count from 0 in the order in which they happen."""
    output: Any = None
    """The shape and type of the result, or None if that is not one array."""
    params: dict[str, int] = field(default_factory=dict)
    """Sizes of the module's own parameters."""


@contextlib.contextmanager
def _recorded_calls() -> Iterator[list[_Call]]:
    """Yields a list to which each module that is called inside the block is added."""
    calls: list[_Call] = []
    running: list[str] = []
    ticks = itertools.count()

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        name = _name(context.module)
        # A module that runs already is a subclass that calls its base class: one call, not two.
        if context.method_name != "__call__" or name in running:
            return next_fun(*args, **kwargs)
        call = _Call(name, type(context.module).__name__, _switches(context), next(ticks))
        calls.append(call)
        running.append(name)
        output = next_fun(*args, **kwargs)
        running.pop()
        call.end = next(ticks)
        if isinstance(output, jax.Array):
            call.output = jax.ShapeDtypeStruct(output.shape, output.dtype)
        own = context.module.variables.get("params", {})
        call.params = {key: x.size for key, x in own.items() if hasattr(x, "size")}
        return output

    with nn.intercept_methods(record):
        yield calls


def _switches(context: Any) -> frozenset[str]:
    """Returns the arguments of a module's call that tell it whether it is in training."""
    return frozenset(_EVALUATION.keys() & inspect.signature(context.orig_method).parameters)


def _is_leaf(call: _Call, calls: list[_Call]) -> bool:
    """Returns whether a module holds no other."""
    inside = _prefix(call.name)
    return not any(other.name.startswith(inside) for other in calls if other.name != call.name)


def _names(model: nn.Module, images: Array) -> list[str]:
    """Returns the names of all modules that are called, in that order."""
    with _recorded_calls() as calls:
        jax.eval_shape(model.init, jax.random.key(0), images)
    return list(dict.fromkeys(call.name for call in calls if call.name))


def _name(module: nn.Module) -> str:
    return "/".join(module.path)


def _prefix(name: str) -> str:
    """Returns what the names of a module's parameters and of the modules in it begin with."""
    return f"{name}/" if name else ""


def _frozen_modules(params: Any, trainable: Any) -> Callable[[str], bool]:
    """Returns a function that says of a module's name whether the module is frozen."""
    names, trained = list(trees.named_leaves(params)), set(trees.named_leaves(trainable))

    def is_frozen(name: str) -> bool:
        own = [param for param in names if param.startswith(_prefix(name))]
        return trained.isdisjoint(own) if own or not name else is_frozen(name.rpartition("/")[0])

    return is_frozen


def _depends(function: Callable[..., Any], changed: Any, *others: Any) -> Any:
    """Returns for each result of function(changed, *others) whether it depends on `changed`.

    This follows the operations of the traced function; one that contains others, such as
    jax.checkpoint, counts as one. NaN as input would not do, because a comparison can lose it.
    """
    traced, results = jax.make_jaxpr(function, return_shape=True)(changed, *others)
    dependent = set(traced.jaxpr.invars[: len(jax.tree.leaves(changed))])
    for equation in traced.jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in dependent for x in equation.invars):
            dependent.update(equation.outvars)
    found = [not isinstance(x, Literal) and x in dependent for x in traced.jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(results), found)
