"""What training gives a GPU to do: segments lowered for CUDA on a CPU, and read as text.

Lowering needs no GPU and compiles nothing. How fast the programs are, and what cuDNN chooses, only
a GPU can show: see benchmarks/gpu_check.py.
"""

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import edit

from cnn_jax import configs, kernels
from cnn_jax.config import Config, InitConfig
from cnn_jax.data import ImageDataset, Split
from cnn_jax.step import Setup, init_state, train_segment

NAMES = ("quickstart", "vgg_dropout", "airbench", "resnet_small", "efficientnet_lite0", "resnet50")
N_IMAGES = 64
CPU_KERNELS = r"kernels/(conv|dense|depthwise|norm|chunks|bits|cores)\.py"
# Operations that wait for the host, call it, or have no fixed order of additions.
UNWANTED = re.compile(
    r"stablehlo\.(case|if|custom_call|infeed|outfeed|send|recv|rng|scatter|select_and_scatter)\b"
)


def make_config(name: str, dtype: str = "bfloat16") -> Config:
    """Returns a config of its real size whose layers are all trained, but for frozen filters."""
    photos = edit(configs.get("photos"), optim={"groups": ()})
    photos = replace(photos, init=InitConfig())
    config = {
        "efficientnet_lite0": photos,
        "resnet50": edit(photos, model={"name": "resnet50"}),
    }.get(name) or configs.get(name)
    return edit(config, model={"dtype": dtype}, train={"batch_size": 32})


@cache
def lower(config: Config, choice: str = "auto", streamed: bool = False) -> jax.stages.Lowered:
    """Returns the segment as it is lowered where JAX finds a GPU, with `choice` of kernels."""
    side = 256 if config.data.name == "folder" else 32
    images = np.zeros((N_IMAGES, side, side, 3), np.uint8)
    split = Split(images, np.arange(N_IMAGES, dtype=np.int32) % 10)
    dataset = ImageDataset("none", "made in a test", tuple("abcdefghij"), split, None, split, ())
    setup = replace(Setup.of(config, dataset), streamed=streamed)
    shape = (config.runtime.segment_steps, 32, side, side, 3) if streamed else images.shape
    inputs = (
        jax.eval_shape(lambda: init_state(setup, jax.random.key(0))),
        jax.ShapeDtypeStruct(shape, np.uint8),
        jax.ShapeDtypeStruct((N_IMAGES,), np.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((), np.int32),
    )
    with pytest.MonkeyPatch.context() as patch, kernels.use(choice, config.model.precision):
        patch.setattr(jax, "default_backend", lambda: "gpu")
        return train_segment.trace(setup, *inputs).lower(lowering_platforms=("cuda",))


@cache
def program(name: str) -> str:
    return lower(make_config(name)).as_text()


def convolutions(text: str) -> list[tuple[str, ...]]:
    """Returns the dimension numbers and the types of the operands of each convolution."""
    numbers = r"convolution\(.*?dim_numbers = \[(.*?)\]x\[(.*?)\]->\[(.*?)\]"
    types = r".*: \(tensor<[\dx]*x([a-z]\w+)>, tensor<[\dx]*x([a-z]\w+)>\)"
    return re.findall(numbers + types, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_operation_waits_for_the_host_or_adds_in_any_order(name: str):
    """So what a program's text can show of `runtime.deterministic` holds with and without it."""
    assert Counter(UNWANTED.findall(program(name))) == {}


def test_that_would_be_found():
    def unwanted(function, *arguments) -> set[str]:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return set(UNWANTED.findall(lowered.as_text()))

    x = np.zeros((2, 4, 4, 3), np.float32)
    pool = jax.grad(lambda x: nn.max_pool(x, (2, 2), (2, 2)).sum())
    assert unwanted(pool, x) == {"select_and_scatter"}
    assert unwanted(lambda x: jnp.asarray(x).at[0].set(1.0), x) == {"scatter"}
    assert unwanted(lambda x: jnp.linalg.eigh(x[0, :, :, 0]), x) == {"custom_call"}
    choice = jax.lax.cond
    assert unwanted(lambda x: choice(x[0, 0, 0, 0] > 0, lambda: x, lambda: -x), x) == {"case"}
    with pytest.raises(ValueError, match="platform"):  # Without a GPU it can't even be lowered.
        unwanted(lambda x: jax.debug.callback(print, x), x)


@pytest.mark.parametrize("name", NAMES)
def test_no_kernel_for_a_cpu_is_in_it(name: str):
    text = lower(make_config(name)).as_text(debug_info=True)
    assert "cnn_jax/layers.py" in text
    assert re.findall(CPU_KERNELS, text) == []


def test_the_kernels_for_a_cpu_would_be_found():
    text = lower(make_config("quickstart"), "cpu").as_text(debug_info=True)
    assert set(re.findall(CPU_KERNELS, text)) >= {"conv", "dense", "bits"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_convolutions_are_of_bfloat16_images_in_nhwc(name: str):
    """Also those of the gradients: of inputs and, with batch and channels exchanged, of kernels."""
    found = convolutions(program(name))
    assert {types for *_, left, right in found for types in (left, right)} == {"bf16"}
    assert {numbers for numbers, *_ in found} == {"b, 0, 1, f", "f, 0, 1, b"}
    assert {out for _, _, out, *_ in found} == {"b, 0, 1, f", "0, 1, b, f"}
    forward = [numbers for numbers in found if numbers[1] == "0, 1, i, o"]
    assert len(forward) >= len(found) / 3  # each has two gradients, but the first of them one
    single = convolutions(lower(make_config(name, "float32")).as_text())
    assert {types for *_, left, right in single for types in (left, right)} == {"f32"}


@pytest.mark.parametrize("name", ["quickstart", "vgg_dropout", "airbench", "resnet_small"])
def test_the_first_convolution_is_a_product_of_patches(name: str):
    """cuDNN would pad three channels to eight."""
    of_images = r"convolution\(.*: \(tensor<[\dx]*x3xbf16>"
    assert not re.search(of_images, program(name))
    assert re.search(of_images, program("resnet50"))  # whose first kernel is 7x7


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "found"), [("default", "DEFAULT"), ("highest", "HIGHEST")])
def test_the_precision_is_that_of_all_products(precision: str, found: str):
    """Of those of gradients too; DEFAULT lets a GPU multiply float32 as TF32."""
    for name in ("quickstart", "resnet_small", "efficientnet_lite0"):
        config = edit(make_config(name, "float32"), model={"precision": precision})
        text = lower(config).as_text()
        lines = [x for x in text.splitlines() if re.search(r"(convolution\(|dot_general )", x)]
        operands = [re.findall(r"\b(DEFAULT|HIGHEST)\b", line) for line in lines]
        assert len(lines) > 10
        assert {tuple(pair) for pair in operands} == {(found, found)}


@pytest.mark.parametrize("name", NAMES)
def test_one_program_serves_segments_of_any_length(name: str):
    """Its only loop ends at its last argument, the number of steps."""
    text = program(name)
    (arguments,) = re.findall(r"func\.func public @main\((.*?)\) -> \(", text)
    assert arguments.endswith(": tensor<i32>")
    last = re.findall(r"%arg\d+", arguments)[-1]
    ((names, condition),) = re.findall(r"stablehlo\.while\((.*?)\) :.*?cond \{(.*?)\}", text, re.S)
    (limit,) = re.findall(r"compare\s+LT, %iterArg_?\d*, (%iterArg_?\d*), SIGNED", condition)
    assert dict(re.findall(r"(%iterArg_?\d*) = (%\w+)", names))[limit] == last


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_donated(name: str):
    """Each of its arrays is overwritten by its new value; what is not of the state is kept."""
    lowered = lower(make_config(name))
    state = jax.tree.leaves(lowered.args_info[0][0])
    aliases = re.findall(r"%arg(\d+): tensor<[^%]*?tf\.aliasing_output = (\d+)", lowered.as_text())
    assert [int(argument) for argument, _ in aliases] == list(range(len(state)))
    assert all(argument == output for argument, output in aliases)


def test_streamed_images_are_those_of_a_segment_alone():
    """The other inputs are the state, labels, a key and a number."""
    config = edit(make_config("quickstart"), runtime={"segment_steps": 5})
    (arguments,) = re.findall(
        r"func\.func public @main\((.*?)\) -> \(", lower(config, streamed=True).as_text()
    )
    assert re.findall(r"tensor<(\w*)xui8>", arguments) == ["5x32x32x32x3"]
    (whole,) = re.findall(r"func\.func public @main\((.*?)\) -> \(", program("quickstart"))
    assert re.findall(r"tensor<(\w*)xui8>", whole) == [f"{N_IMAGES}x32x32x3"]
    assert UNWANTED.findall(lower(config, streamed=True).as_text()) == []
