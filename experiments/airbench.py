"""The modern recipe and the chapter's networks: accuracy against the FLOPs of training."""

from cnn_jax import configs
from experiments.spec import Experiment, Points

_NAMES = ("simple_cnn", "vgg1", "vgg2", "vgg3", "vgg_dropout", "airbench")

EXPERIMENT = Experiment(
    question="How far has the field come since the chapter?",
    variants={name: configs.get(name) for name in _NAMES},
    figure=Points("train_flops"),
    borrowed=_NAMES[:-1],
    columns=(
        "test_accuracy",
        "test_accuracy_plain",
        "epochs",
        "param_count",
        "flops_per_image",
        "train_flops",
        "images_per_second",
        "seconds",
    ),
    note="`airbench` is Jordan's airbench94 (2024) with its own settings; nothing was tuned on "
    "these images. Its test accuracy is that of the averaged logits of six views of each image; "
    "the table also has the accuracy without test-time augmentation. Its author's own code "
    "(legacy/airbench94.py, PyTorch 2.13, on a CPU in bfloat16 autocast, seeds 0 and 1) reaches "
    "90.5 and 90.7% on these images, and 89.6 and 89.4% without test-time augmentation; he reports "
    "94.0% on CIFAR-10 itself. The chapter's networks are those of the experiment `chapter`, which "
    "explains why training times and images/s can't be compared.",
)
