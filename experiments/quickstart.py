"""What the first command of README reaches, with several seeds."""

from cnn_jax import configs
from experiments.spec import Dots, Experiment

EXPERIMENT = Experiment(
    question="How far does the result of `quickstart` depend on the seed?",
    variants={"quickstart": configs.get("quickstart")},
    figure=Dots(),
    seeds=5,
    columns=("test_accuracy", "train_accuracy", "test_loss", "epochs", "param_count", "seconds"),
    note="`quickstart` is the config of that name as it is, on the 359 test images of "
    "scikit-learn's digits: one image is 0.28 points.",
)
