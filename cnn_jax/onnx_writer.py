"""Writes a JAX function of images as an ONNX model, which many programs and devices run.

JAX traces the function to a list of primitive operations. What depends on constants alone is
computed here; each other operation becomes one to three of ONNX. These are the operations of this
project's networks and their like. jax2onnx knows nearly all of JAX, but asks for an older
orbax-checkpoint than this project's.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from onnx import helper, numpy_helper

from cnn_jax.errors import UserError

OPSET, _IR_VERSION = 17, 8
"""Of 2022: newer programs read them, and many older ones."""

_SAME = {
    "add": "Add",
    "and": "And",
    "abs": "Abs",
    "ceil": "Ceil",
    "copy": "Identity",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
    "sub": "Sub",
    "tanh": "Tanh",
}
"""JAX's primitives that are one operation of ONNX, with the same inputs."""

Value = str | np.ndarray
"""An output of a node by name, or a constant."""


def convert(
    function: Callable[[jax.Array], jax.Array], image_shape: tuple[int, int, int]
) -> onnx.ModelProto:
    """Returns an ONNX model of a function of uint8 images [n, height, width, channels], for any n.

    Its input is named "images" and its output "probabilities", float32 [n, classes].

    Raises:
        UserError: the function uses an operation that has no counterpart here.
    """
    (n,) = jax.export.symbolic_shape("n")
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((n, *image_shape), jnp.uint8))
    graph = _Graph()
    (result,) = graph.evaluate(traced, ["images"])
    graph.nodes.append(helper.make_node("Identity", [graph.name(result)], ["probabilities"]))
    graph.leave_out_unused()
    uint8, float32 = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    n_classes = traced.out_avals[0].shape[1]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "cnn_jax",
            [helper.make_tensor_value_info("images", uint8, ["n", *image_shape])],
            [helper.make_tensor_value_info("probabilities", float32, ["n", n_classes])],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="cnn_jax",
    )
    onnx.checker.check_model(model)
    return model


class _Graph:
    """The nodes and constants of a model in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[bytes, onnx.TensorProto] = {}
        self._convolutions: dict[str, tuple[Value, np.ndarray, np.ndarray, dict[str, Any]]] = {}
        """Inputs and attributes of the convolutions, by the name of their NHWC output."""
        self._relus: dict[str, str] = {}
        """Inputs of ReLUs, by the name of their output."""

    def name(self, value: Value) -> str:
        """Returns the name of a value; a constant becomes part of the model, once."""
        if isinstance(value, str):
            return value
        value = np.asarray(value, order="C")
        digest = (
            hashlib.sha256(value.tobytes()).digest() + repr((value.dtype, value.shape)).encode()
        )
        if digest not in self.constants:
            name = f"constant{len(self.constants)}"
            self.constants[digest] = numpy_helper.from_array(value, name)
        return self.constants[digest].name

    def add(self, operator: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        output = f"{operator.lower()}{len(self.nodes)}"
        names = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """Returns a value whose axis i is axis `axes[i]` of the given one."""
        if isinstance(value, np.ndarray):
            return value.transpose(axes)
        in_order = list(axes) == sorted(axes)
        return value if in_order else self.add("Transpose", value, perm=list(axes))

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """Returns a value with another shape, in which one number may depend on the batch's."""
        known = [size if isinstance(size, int) else -1 for size in shape]
        if known.count(-1) > 1:
            raise UserError(_no_counterpart(f"the shape {tuple(shape)}"))
        return self.add("Reshape", value, _integers(known))

    def stack(self, values: Sequence[Value], axis: int) -> Value:
        """Returns values along a new axis."""
        one = _integers([axis])
        return self.add("Concat", *(self.add("Unsqueeze", x, one) for x in values), axis=axis)

    def convolve(
        self, x: Value, kernel: np.ndarray, bias: np.ndarray, attributes: dict[str, Any]
    ) -> Value:
        """Adds a convolution of NCHW values with an OIHW kernel, and returns it as NHWC."""
        y = self.transpose(self.add("Conv", x, kernel, bias, **attributes), (0, 2, 3, 1))
        assert isinstance(y, str)
        self._convolutions[y] = x, kernel, bias, attributes
        return y

    def fuse(self, name: str, inputs: Sequence[Value]) -> Value | None:
        """Returns an operation together with the one before it, if they are one, else None.

        A factor or a term of each channel becomes part of the convolution's kernel and bias, as
        those of batch normalisation. The operation before stays for others that use it, if any.
        """
        if not isinstance(inputs[0], str) and name != "sub":
            inputs = inputs[::-1]
        x, constant = inputs
        if isinstance(x, np.ndarray) or isinstance(constant, str):
            return None
        numbers = constant.reshape(-1)
        if name == "max" and numbers.tolist() == [0]:
            relu = self.add("Relu", x)
            self._relus[relu] = x
            return relu
        if name == "min" and x in self._relus and constant.ndim == 0:
            return self.add("Clip", self._relus[x], np.zeros_like(constant), constant)
        if x not in self._convolutions or name not in ("add", "sub", "mul"):
            return None
        source, kernel, bias, attributes = self._convolutions[x]
        if len(numbers) not in (1, len(bias)) or constant.shape[-1:] not in ((), numbers.shape):
            return None  # not a number for each channel
        if name == "mul":
            kernel, bias = kernel * numbers.reshape(-1, 1, 1, 1), bias * numbers
        else:
            bias = bias + numbers if name == "add" else bias - numbers
        return self.convolve(source, kernel, bias, attributes)

    def leave_out_unused(self) -> None:
        """Removes nodes and constants that the last node does not depend on."""
        needed, kept = set(self.nodes[-1].output), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if v.name in needed}

    def evaluate(self, program: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Adds all operations of a traced function; returns its outputs."""
        jaxpr = program.jaxpr
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {v: np.asarray(x) for v, x in zip(jaxpr.constvars, program.consts, strict=True)}

        def read(atom: Any) -> Value:
            return np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            results = self._apply(equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: JaxprEqn, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return _scan(self, equation, inputs)
        inner = [value for value in params.values() if isinstance(value, ClosedJaxpr)]
        if inner:  # jit, or a function with a gradient of its own
            return self.evaluate(inner[0], inputs)
        sizes = [size for var in equation.outvars for size in _shape(var)]
        if all(isinstance(x, np.ndarray) for x in inputs) and all(
            isinstance(n, int) for n in sizes
        ):
            found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
            results = found if equation.primitive.multiple_results else [found]
            return [np.asarray(result) for result in results]
        if len(inputs) == 2 and (fused := self.fuse(name, inputs)) is not None:
            return [fused]
        if name in _SAME:
            return [self.add(_SAME[name], *inputs)]
        if name not in _CONVERTERS:
            raise UserError(_no_counterpart(name))
        return [_CONVERTERS[name](self, equation, *inputs)]


def _no_counterpart(what: str) -> str:
    return f"--format=onnx has no counterpart of {what}, which this network uses; --format=jax has"


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _shape(atom: Any) -> tuple[Any, ...]:
    """Returns the shape of a variable: integers, and multiples of the batch's length."""
    return atom.aval.shape


def _broadcast(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    shape, kept = _shape(equation.outvars[0]), equation.params["broadcast_dimensions"]
    old = dict(zip(kept, _shape(equation.invars[0]), strict=True))
    x = graph.reshape(x, [old.get(axis, 1) for axis in range(len(shape))])
    # Of the other axes, 1 leaves the length as it is.
    new = [size if old.get(axis, 1) != size else 1 for axis, size in enumerate(shape)]
    if all(size == 1 for size in new):
        return x
    if all(isinstance(size, int) for size in new):
        return graph.add("Expand", x, _integers(new))
    if any(not isinstance(size, int) and str(size) != "n" for size in new):
        raise UserError(_no_counterpart(f"a broadcast to {shape}"))
    n = graph.add("Slice", graph.add("Shape", "images"), _integers([0]), _integers([1]))
    parts = (_integers([size]) if isinstance(size, int) else n for size in new)
    return graph.add("Expand", x, graph.add("Concat", *parts, axis=0))


def _cast(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    return graph.add("Cast", x, to=kind)


def _clamp(graph: _Graph, equation: JaxprEqn, low: Value, x: Value, high: Value) -> Value:
    return graph.add("Min", graph.add("Max", x, low), high)


def _concatenate(graph: _Graph, equation: JaxprEqn, *parts: Value) -> Value:
    return graph.add("Concat", *parts, axis=equation.params["dimension"])


def _conv(graph: _Graph, equation: JaxprEqn, x: Value, kernel: Value) -> Value:
    params = equation.params
    if max(params["lhs_dilation"]) > 1 or params["batch_group_count"] > 1:
        raise UserError(_no_counterpart("a transposed convolution"))
    numbers = params["dimension_numbers"]
    attributes = {
        "strides": list(params["window_strides"]),
        "pads": [side[i] for i in (0, 1) for side in params["padding"]],
        "dilations": list(params["rhs_dilation"]),
        "group": params["feature_group_count"],
    }
    x, kernel = graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    if isinstance(kernel, np.ndarray) and numbers.out_spec == (0, 3, 1, 2):
        return graph.convolve(x, kernel, np.zeros(len(kernel), kernel.dtype), attributes)
    y = graph.add("Conv", x, kernel, **attributes)
    return graph.transpose(y, np.argsort(numbers.out_spec).tolist())


def _dot(graph: _Graph, equation: JaxprEqn, x: Value, y: Value) -> Value:
    (in_x, in_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    ranks = [len(_shape(atom)) for atom in equation.invars]
    if (in_x, in_y) == ((ranks[0] - 1,), (0,)) and not batch_x and ranks[1] == 2:
        return graph.add("MatMul", x, y)
    letters = iter("abcdefghijklmnop")
    of_x = [next(letters) for _ in range(ranks[0])]
    shared = dict(zip((*batch_y, *in_y), (*batch_x, *in_x), strict=True))
    of_y = [of_x[shared[i]] if i in shared else next(letters) for i in range(ranks[1])]
    result = [of_x[i] for i in batch_x]
    result += [name for i, name in enumerate(of_x) if i not in (*batch_x, *in_x)]
    result += [name for i, name in enumerate(of_y) if i not in shared]
    equation_text = f"{''.join(of_x)},{''.join(of_y)}->{''.join(result)}"
    return graph.add("Einsum", x, y, equation=equation_text)


def _erfc(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.add("Sub", np.asarray(1, np.float32), graph.add("Erf", x))


def _gather(graph: _Graph, equation: JaxprEqn, x: Value, starts: Value) -> Value:
    """Cuts a rectangle out, which is how JAX traces slices of arrays of unknown length."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if isinstance(starts, str) or starts.ndim != 1 or numbers.operand_batching_dims:
        raise UserError(_no_counterpart("indexing by an array"))
    axes, first = list(numbers.start_index_map), starts.tolist()
    last = [start + sizes[axis] for start, axis in zip(first, axes, strict=True)]
    y = graph.add("Slice", x, _integers(first), _integers(last), _integers(axes))
    return graph.reshape(y, _shape(equation.outvars[0])) if numbers.collapsed_slice_dims else y


def _integer_pow(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.add("Pow", x, np.asarray(equation.params["y"], np.float32))


def _log1p(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.add("Log", graph.add("Add", x, np.asarray(1, np.float32)))


def _ne(graph: _Graph, equation: JaxprEqn, x: Value, y: Value) -> Value:
    return graph.add("Not", graph.add("Equal", x, y))


def _pool(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    params = equation.params
    window, strides, padding = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    dilated = max(*params["base_dilation"], *params["window_dilation"]) > 1
    if len(window) != 4 or window[0] != 1 or window[3] != 1 or dilated:
        raise UserError(_no_counterpart(f"a pool of {window}"))
    sums = equation.primitive.name == "reduce_window_sum"
    y: Value = graph.add(
        "AveragePool" if sums else "MaxPool",
        graph.transpose(x, (0, 3, 1, 2)),
        kernel_shape=list(window[1:3]),
        strides=list(strides[1:3]),
        pads=[side[i] for i in (0, 1) for side in padding[1:3]],
        **({"count_include_pad": 1} if sums else {}),
    )
    if sums:
        y = graph.add("Mul", y, np.asarray(window[1] * window[2], np.float32))
    return graph.transpose(y, (0, 2, 3, 1))


def _reduce(operator: str) -> Callable[..., Value]:
    def reduce(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
        axes = list(equation.params["axes"])
        if operator == "ReduceSum":  # the only one whose axes are an input in this opset
            return graph.add(operator, x, _integers(axes), keepdims=0)
        return graph.add(operator, x, axes=axes, keepdims=0)

    return reduce


def _reshape(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.reshape(x, _shape(equation.outvars[0]))


def _rev(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    axes = equation.params["dimensions"]
    first, last = _integers([-1] * len(axes)), _integers([np.iinfo(np.int64).min] * len(axes))
    return graph.add("Slice", x, first, last, _integers(axes), first)


def _rsqrt(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.add("Reciprocal", graph.add("Sqrt", x))


def _scan(graph: _Graph, equation: JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Adds a loop of known length as all of its iterations, and stacks what each returns."""
    params = equation.params
    body = params["jaxpr"]
    # Rows have one axis less in an iteration. How JAX itself numbers them changed with its 0.12.
    n_rows = sum(
        len(_shape(var)) > len(aval.shape)
        for var, aval in zip(equation.invars, body.in_avals, strict=True)
    )
    n_carried = sum(
        len(_shape(var)) == len(aval.shape)
        for var, aval in zip(equation.outvars, body.out_avals, strict=True)
    )
    n_consts = len(inputs) - n_carried - n_rows
    consts = inputs[:n_consts]
    carried, rows = inputs[n_consts:][:n_carried], inputs[n_consts + n_carried :]
    order = range(params["length"])
    returned: list[list[Value]] = []
    for i in reversed(order) if params["reverse"] else order:
        index = np.asarray(i)
        row = [
            x[i] if isinstance(x, np.ndarray) else graph.add("Gather", x, index, axis=0)
            for x in rows
        ]
        results = graph.evaluate(body, [*consts, *carried, *row])
        carried = results[:n_carried]
        returned.append(results[n_carried:])
    if params["reverse"]:
        returned.reverse()
    return [*carried, *(graph.stack(parts, axis=0) for parts in zip(*returned, strict=True))]


def _select(graph: _Graph, equation: JaxprEqn, which: Value, no: Value, yes: Value) -> Value:
    return graph.add("Where", which, yes, no)


def _slice(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or [1] * len(starts)
    sizes = _shape(equation.invars[0])
    whole = [(0, size, 1) for size in sizes]
    cut = [i for i, part in enumerate(zip(starts, stops, steps, strict=True)) if part != whole[i]]
    starts, stops, steps = (_integers([part[i] for i in cut]) for part in (starts, stops, steps))
    return graph.add("Slice", x, starts, stops, _integers(cut), steps)


def _square(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.add("Mul", x, x)


def _stack(graph: _Graph, equation: JaxprEqn, *parts: Value) -> Value:
    return graph.stack(parts, equation.params["axis"])


def _transpose(graph: _Graph, equation: JaxprEqn, x: Value) -> Value:
    return graph.transpose(x, equation.params["permutation"])


_CONVERTERS: dict[str, Callable[..., Value]] = {
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "dot_general": _dot,
    "erfc": _erfc,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "log1p": _log1p,
    "ne": _ne,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
    "reshape": _reshape,
    "rev": _rev,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "square": _square,
    "stack": _stack,
    "squeeze": _reshape,
    "transpose": _transpose,
}
"""The other primitives, each by a function of the graph, its equation and its inputs."""
