"""The modern recipe with Muon beside the one without: accuracy against the FLOPs of training."""

from cnn_jax import configs
from experiments.spec import Experiment, Points

_NAMES = ("airbench", "airbench_muon")

EXPERIMENT = Experiment(
    question="Does Muon reach the modern recipe's accuracy with less training?",
    variants={name: configs.get(name) for name in _NAMES},
    figure=Points("train_flops"),
    seeds=1,
    borrowed=_NAMES[:1],
    columns=(
        "test_accuracy",
        "test_accuracy_plain",
        "epochs",
        "steps",
        "param_count",
        "train_flops",
    ),
    note="`airbench_muon` is Jordan's airbench94_muon (2024) with its own settings; nothing was "
    "tuned on these images. `airbench` is that of the experiment of this name. Test accuracies are "
    "those of the averaged logits of six views of each image; the table also has the accuracy "
    "without test-time augmentation. Training times can't be compared: other programs ran.",
)
