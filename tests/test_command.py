"""From arguments to a request, the help, and the exit codes."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cnn_jax
from cnn_jax import command, configs, fields
from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.runs.stop import Stopped
from cnn_jax.tools import MODES, Request

HELP = "; --help lists the flags"


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        command.parse(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns what a command line prints that does nothing else."""
    with pytest.raises(SystemExit) as caught:
        command.parse(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_without_flags_the_quickstart_is_trained():
    assert command.parse([]) == Request(
        mode="train", config=configs.get("quickstart"), workdir=Path("runs/quickstart")
    )


def test_fields_are_flags():
    request = command.parse(
        ["--config=vgg_dropout", "--train.epochs=3", "--model.dropout", "0.3", "-seed=7"]
    )
    base = configs.get("vgg_dropout")
    assert request.config == replace(
        base,
        seed=7,
        train=replace(base.train, epochs=3),
        model=replace(base.model, dropout=0.3),
    )
    assert request.given == {"train.epochs", "model.dropout", "seed"}


def test_the_last_of_equal_flags_counts():
    assert command.parse(["--seed=1", "--seed=2"]).config.seed == 2


def test_a_flag_of_truth_needs_no_value():
    for text in ("--train.skip_nonfinite", "--train.skip_nonfinite=true"):
        assert command.parse([text, "--seed=1"]).config.train.skip_nonfinite
    assert not command.parse(["--notrain.skip_nonfinite"]).config.train.skip_nonfinite


def test_all_other_flags(tmp_path: Path):
    fields.save(configs.get("vgg1"), tmp_path / "config.json")
    request = command.parse(
        [
            *("--mode=predict", f"--workdir={tmp_path}", "a.png", "--checkpoint=best", "--json"),
            *("--hooks=a.py:f, b.py:g", "b.png"),
        ]
    )
    assert request == Request(
        mode="predict",
        config=configs.get("vgg1"),
        workdir=tmp_path,
        checkpoint="best",
        paths=("a.png", "b.png"),
        json=True,
        hooks=("a.py:f", "b.py:g"),
    )
    request = command.parse(
        ["--mode=features", f"--workdir={tmp_path}", "--layer=block1", "--classifier=svm"]
    )
    assert (request.layer, request.classifier) == ("block1", "svm")
    request = command.parse(["--distributed", "--coordinator=a:1", "--num_processes=2"])
    assert (request.distributed, request.coordinator) == (True, "a:1")
    assert (request.num_processes, request.process_id) == (2, None)
    assert command.parse(["--distributed", "--process_id=0"]).process_id == 0


def test_a_path_may_look_like_a_flag_after_two_dashes():
    paths = command.parse(["--mode=compare", "a", "--", "-b", "--help"]).paths
    assert paths == ("a", "-b", "--help")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_reads_a_run_uses_its_config(mode: str, tmp_path: Path):
    saved = replace(configs.get("vgg1"), seed=5)
    fields.save(saved, tmp_path / "config.json")
    flags = [f"--mode={mode}", f"--workdir={tmp_path}"]
    expected = saved if MODES[mode].reads_run else configs.get("quickstart")
    assert command.parse(flags).config == expected
    assert command.parse([*flags, "--config=vgg3"]).config == configs.get("vgg3")
    changed = command.parse([*flags, "--seed=9"])
    assert (changed.config.seed, changed.given) == (9, {"seed"})


def test_a_config_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from cnn_jax.config import *\ndef small():\n"
        "    return Config(name='small', model=ModelConfig(name='net.py:Net', blocks=[[8]]))\n"
    )
    request = command.parse(["--config=mine.py:small", "--seed=3"])
    assert request.config.model.name == "net.py:Net"
    assert request.workdir == Path("runs/small-seed=3")
    fields.save(request.config, Path("mine.json"))
    assert command.parse(["--config=mine.json"]).config == request.config


def test_only_a_config_that_no_run_has_saved_adopts_a_network(tmp_path: Path):
    assert not command.parse(["--config=vgg3"]).adopts
    assert command.parse(["--config=finetune_head"]).adopts
    assert command.parse(["--mode=summary", "--config=finetune_head"]).adopts
    assert command.parse(["--init.checkpoint=runs/x"]).adopts
    fields.save(configs.get("finetune_head"), tmp_path / "config.json")
    assert not command.parse(["--mode=evaluate", f"--workdir={tmp_path}"]).adopts
    assert not command.parse([f"--config={tmp_path}/config.json"]).adopts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=vgg_dropuot"], "unknown config vgg_dropuot (did you mean vgg_dropout?)"),
        (["--config=gone.json"], "gone.json does not exist"),
        (["--config=gone.py:x"], "gone.py:x: gone.py does not exist"),
        (
            ["--train.epoch=3"],
            f"unknown flag --train.epoch (did you mean --train.epochs?){HELP}",
        ),
        (
            ["--optim.lr=0.1"],
            f"unknown flag --optim.lr (did you mean --optim.learning_rate?){HELP}",
        ),
        (["--epochs=3"], f"unknown flag --epochs (did you mean --train.epochs?){HELP}"),
        (["--confg=vgg1"], f"unknown flag --confg (did you mean --config?){HELP}"),
        (["--zzzzzzz"], f"unknown flag --zzzzzzz{HELP}"),
        (["--name=x"], f"unknown flag --name (did you mean --data.name?){HELP}"),
        (["--train.epochs=many"], "train.epochs=many: expected an integer"),
        (["--train.epochs"], "Missing value for flag --train.epochs"),
        (["--set=train.epochs=3"], "--set=train.epochs=3 is now written --train.epochs=3"),
        (["--set", "seed=3"], "--set=seed=3 is now written --seed=3"),
        (
            ["--mode=evalute"],
            f"--mode=evalute: expected {'|'.join(MODES)} (did you mean evaluate?)",
        ),
        (["--checkpoint=lates"], "--checkpoint=lates: expected latest|best (did you mean latest?)"),
        (["--classifier=svn"], "--classifier=svn: expected svm|random_forest|mlp|logistic|knn"),
        (["--json=maybe"], "--json=maybe: expected true|false"),
        (["--num_processes=x"], "--num_processes=x: expected an integer"),
        (["vgg1"], "unexpected argument vgg1; fields are set by --SECTION.FIELD=VALUE"),
        (["--distributed", "--mode=evaluate"], "--distributed is for --mode=train, not evaluate"),
        (["--mode=verify", "--workdir=nowhere"], "nowhere/config.json does not exist"),
        (["--help=optm"], "--help=optm: expected modes|configs|flags|seed|data|"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str):
    assert refusal(*arguments).startswith(message)


def test_the_default_workdir_names_what_changes_the_result():
    base = configs.get("quickstart")
    same = replace(base, runtime=replace(base.runtime, seeds=3))
    assert command.default_workdir(base, same) == "runs/quickstart"
    arguments = ["--model.dense=[16]", "--train.epochs=2", "--data.dir=x", "--runtime.seeds=2"]
    workdir = command.parse(arguments).workdir
    assert workdir == Path("runs/quickstart-model.dense=[16]-train.epochs=2")
    # A flag that repeats the config's own value changes nothing.
    assert command.parse(["--train.epochs=12"]).workdir == Path("runs/quickstart")
    assert "/" not in command.default_workdir(base, Config(name="a/b"))[5:]


def test_a_long_default_workdir_is_cut():
    base = configs.get("vgg3")

    def name(classes: str) -> str:
        return str(command.parse(["--config=vgg3", f"--data.classes={classes}"]).workdir)

    many = ",".join(f"Klasse ä{i}" for i in range(100))
    names = {name(many), name(many + ",x"), name("a,b")}
    assert len(names) == 3
    assert all(len(one.encode()) <= 100 for one in names)
    assert all(one.startswith(f'runs/{base.name}-data.classes=["') for one in names)


def test_help_shows_every_mode_config_and_field(capsys: pytest.CaptureFixture[str]):
    text = " ".join(printed(capsys, "--help").split())
    for name, mode in MODES.items():
        assert f"--mode={name} {mode.help}" in text
    for name, line in configs.listing():
        assert f"{name} {line}" in text
    for name, section in fields.sections().items():
        assert f"{name}: {section.__doc__.splitlines()[0]}" in text
    for name, field in fields.all_fields().items():
        assert f"--{name} [" in text
        assert field.doc in text
    assert "--augment.flip [none | random | alternate; default none]" in text
    assert "--train.epochs [an integer; default 3]" in text
    assert "--data.dir [text; default empty]" in text
    assert "| FILE.py:NAME; default momentum]" in text
    for flag in ("--workdir", "--checkpoint", "--hooks", "--layer", "--distributed"):
        assert f" {flag} " in text


@pytest.mark.parametrize(
    "arguments", [["-h"], ["help"], ["--config=help"], ["--train.epochs=x", "--help"]]
)
def test_all_ways_to_ask_for_help(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert printed(capsys, *arguments) == printed(capsys, "--help")


def test_help_on_one_topic(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "--help=optim")
    assert text.startswith("optim: The optimizer and its learning-rate schedule.\n")
    assert "--optim.momentum" in text
    assert "--train.epochs" not in text
    assert printed(capsys, "help", "optim") == text
    assert "--mode=verify" in printed(capsys, "--help=modes")
    assert "vgg_dropout" in printed(capsys, "--help=configs")
    assert "--workdir" in printed(capsys, "--help=flags")
    assert "--seed" in printed(capsys, "--help=seed")


@pytest.mark.parametrize("columns", ["40", "60", "100", "300"])
def test_help_fits_the_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", columns)
    text = printed(capsys, "--help=train")
    assert max(map(len, text.splitlines())) <= max(60, min(int(columns), 120))


@pytest.mark.parametrize("words", [["--version"], ["version"], ["--config=version"]])
def test_version(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert printed(capsys, *words) == f"cnn_jax {cnn_jax.__version__}\n"


def test_every_way_to_ask_for_help(capsys: pytest.CaptureFixture[str]):
    """launch.sh makes --config=help of the word help."""
    text = printed(capsys, "--help")
    for words in (["-h"], ["help"], ["--config=help"], ["--config=vgg3", "-h"], ["help", "--json"]):
        assert printed(capsys, *words) == text


def test_the_initials_of_a_field_are_understood():
    with pytest.raises(UserError, match=r"--optim.lr \(did you mean --optim.learning_rate\?\)"):
        command.parse(["--optim.lr=1"])


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys, time\n"
        "from cnn_jax import main\n"
        "sys.argv = ['cnn_jax', '--help']\n"
        "try:\n    main.run()\n"
        "finally:\n"
        "    heavy = {'jax', 'flax', 'numpy', 'sklearn', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "    print(sorted(heavy), time.process_time(), file=sys.stderr)\n"
    )
    ran = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        for _ in range(5)
    ]
    assert all(one.returncode == 0 and "--train.epochs" in one.stdout for one in ran)
    heavy, _, seconds = ran[0].stderr.strip().rpartition(" ")
    assert heavy == "[]"
    # Of several, because other processes may share the core.
    seconds = min(float(one.stderr.split()[-1]) for one in ran)
    assert seconds < 0.2


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (UserError("a\nb"), 2, "error: a\\nb\n"),
        (OSError(28, "No space left"), 2, "error: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped(15, 3), 143, "stopped by SIGTERM after step 3, saved; the same command resumes\n"),
        (Stopped(2, 3), 130, "stopped by SIGINT after step 3, saved; the same command resumes\n"),
    ],
)
def test_exit_codes(
    problem: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
):
    def fail(_: str) -> None:
        raise problem

    with pytest.raises(SystemExit) as caught:
        command.guarded(fail, "x")
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def run_script(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"from absl import flags\nfrom cnn_jax import command\n{body}\ncommand.run(main)"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )


def test_other_commands_have_their_own_flags():
    body = (
        "only = flags.DEFINE_string('only', '*', 'Which.')\n"
        "def main(argv):\n    print(argv[1:], only.value)"
    )
    ran = run_script(body, "--only=x", "a", "b")
    assert (ran.returncode, ran.stdout) == (0, "['a', 'b'] x\n")
    ran = run_script(body, "--train.epochs=3")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith("error: Unknown command line flag 'train.epochs'")
    ran = run_script(body, "--help")
    assert ran.returncode == 0
    assert "--only" in ran.stdout
    assert "train.epochs" not in ran.stdout


def test_flags_are_not_those_of_the_process():
    """Two requests in one process, as in a notebook, know nothing of each other."""
    parse: Callable[[list[str]], Request] = command.parse
    assert parse(["--seed=3"]).config.seed == 3
    assert parse([]).config.seed == 0
