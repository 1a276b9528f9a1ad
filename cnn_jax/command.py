"""The command line: from arguments to a `Request`, the help, and the exit codes."""

import hashlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from absl import app, flags

import cnn_jax
from cnn_jax import configs, fields, values
from cnn_jax.config import Config
from cnn_jax.errors import UserError, did_you_mean, nearest, one_line, printable
from cnn_jax.fields import Field
from cnn_jax.runs.stop import Stopped, ended_by_interrupt
from cnn_jax.tools import CLASSIFIERS, MODES, Request

_USAGE = """\
./launch.sh CONFIG [--SECTION.FIELD=VALUE ...] [--mode=MODE] [--workdir=DIR]
python -m cnn_jax.main --config=CONFIG [--SECTION.FIELD=VALUE ...] ..."""

_FLAGS = (
    Field(
        "config", str, "quickstart", "A named config, FILE.py:NAME, or the path of a .json file."
    ),
    Field("mode", Literal[tuple(MODES)], "train", "What to do; see modes."),
    Field(
        "workdir",
        str,
        "",
        "The run's folder. Default: runs/CONFIG and the fields that are changed.",
    ),
    Field(
        "checkpoint",
        Literal["", "latest", "best"],
        "",
        "The parameters of a run that a mode uses. Default: those that the run reported on.",
    ),
    Field("json", bool, False, "With --mode=predict: print JSON."),
    Field("top_k", int, 1, "With --mode=predict: the number of classes that are listed."),
    Field(
        "min_probability",
        float,
        0.0,
        "With --mode=predict: mark photos whose class has a lower probability as uncertain.",
    ),
    Field("output", str, "", "With --mode=predict: write a .csv or .jsonl file, instead of lines."),
    Field(
        "explain",
        str,
        "",
        "With --mode=predict: a folder for a picture of each photo that shows what counts in it.",
    ),
    Field(
        "layer",
        str,
        "",
        "With --mode=features: a layer or block. Default: the last layer before the head.",
    ),
    Field(
        "classifier",
        Literal[("", *CLASSIFIERS)],
        "",
        "With --mode=features: what to train on them.",
    ),
    Field(
        "format",
        Literal["jax", "onnx"],
        "jax",
        "With --mode=export: what other programs read; `onnx` needs onnx and onnxruntime.",
    ),
    Field(
        "hooks",
        tuple[str, ...],
        (),
        "Functions that training calls, as FILE.py:NAME, separated by commas.",
    ),
    Field("distributed", bool, False, "Train together with other processes (srun, mpirun)."),
    Field("coordinator", str, "", "Without srun or mpirun: HOST:PORT of process 0."),
    Field("num_processes", int | None, None, "Without srun or mpirun: the number of processes."),
    Field("process_id", int | None, None, "Without srun or mpirun: this process's number, from 0."),
)
"""The flags that are not fields of the config."""

_LONGEST_WORKDIR = 100
"""In bytes, for workdirs that are named automatically."""


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags that absl knows, and calls `main` on the command's name and what remains.

    A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130; a run that a
    signal stopped ends with 128 + the signal.
    """

    def parse_known(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            _fail(str(error).splitlines()[0])
        except SystemExit:
            sys.exit(0)  # absl has printed its help, and would exit with 1

    app.run(lambda argv: guarded(main, argv), flags_parser=parse_known)


def guarded(main: Callable[..., None], *args: Any) -> None:
    """Calls `main(*args)`, and ends the process with the exit codes that `run` lists."""
    try:
        with ended_by_interrupt():
            main(*args)
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # The reader of a pipe, such as `head`, has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        from cnn_jax import memory  # NumPy takes a tenth of a second

        _fail(
            f"out of memory: {one_line(error)[:200]} ({memory.describe_devices()}); lower "
            f"{memory.REMEDIES}, or set runtime.storage=stream"
        )
    except OSError as error:  # A disk that is full or gone, if no message is more specific.
        _fail(one_line(error))
    except KeyboardInterrupt:  # In a thread that is not the main one, where no signal is caught.
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Stopped as stopped:
        print(f"{stopped}; the same command resumes", file=sys.stderr)
        sys.exit(stopped.exit_code)


def _fail(line: str) -> NoReturn:
    print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: list[str]) -> Request:
    """Returns what the arguments after the command's name ask for.

    --help and --version print, and end the process.

    Raises:
        UserError: a flag, a value or an argument is wrong.
    """
    _answer_help(arguments)
    texts, paths = _split(arguments)
    own = {f.name: f.default for f in _FLAGS}
    own |= {
        f.name: values.parse(texts[f.name], f.kind, f"--{f.name}")
        for f in _FLAGS
        if f.name in texts
    }
    mode = MODES[own["mode"]]
    if paths and not mode.takes_paths:
        raise UserError(f"unexpected argument {paths[0]}; fields are set by --SECTION.FIELD=VALUE")
    if own["distributed"] and own["mode"] != "train":
        raise UserError(f"--distributed is for --mode=train, not {own['mode']}")
    if own["top_k"] < 1:
        raise UserError("--top_k must be 1 or more")
    if not 0 <= own["min_probability"] <= 1:
        raise UserError("--min_probability must be in [0, 1]")
    source = own.pop("config")
    if mode.reads_run and own["workdir"] and "config" not in texts:
        source = str(Path(own["workdir"]) / "config.json")
    base = configs.get(source)
    given = {name: text for name, text in texts.items() if name in fields.all_fields()}
    config = fields.with_values(base, given)
    workdir = Path(own.pop("workdir") or default_workdir(base, config)).expanduser()
    return Request(
        config=config,
        workdir=workdir,
        given=frozenset(given),
        # A config.json has the network of init.checkpoint already.
        adopts=bool(config.init.checkpoint) and not source.endswith(".json"),
        paths=tuple(paths),
        coordinator=own.pop("coordinator") or None,
        **own,
    )


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the texts of the flags that are set, by name, and the other arguments."""
    known = flags.FlagValues()
    for field in (*_FLAGS, *fields.all_fields().values()):
        flags.DEFINE_string(field.name, None, field.doc, flag_values=known)
        known[field.name].boolean = field.kind is bool  # --json stands for --json=true.
    try:
        _, *paths = known(["cnn_jax", *arguments])
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname, arguments)) from None
    except (flags.Error, ValueError) as error:
        raise UserError(one_line(error)) from None
    return {name: str(known[name].value) for name in known if known[name].present}, paths


def _unknown_flag(name: str, arguments: list[str]) -> str:
    if name == "set":
        i, word = next((i, a) for i, a in enumerate(arguments) if a.lstrip("-").startswith("set"))
        setting = word.partition("=")[2] or "".join(arguments[i + 1 : i + 2])
        return f"--set={setting} is now written --{setting}"
    guess = fields.suggestion(name, [field.name for field in _FLAGS])
    return f"unknown flag --{name}{did_you_mean(guess and f'--{guess}')}; --help lists the flags"


def default_workdir(base: Config, config: Config) -> str:
    """Returns runs/NAME, with the fields in which `config` differs from `base`.

    Fields that do not change the result are left out. A long name is cut and gets a hash.
    """
    old, new = fields.identity(base), fields.identity(config)
    changed = [f"{name}={values.to_text(new[name])}" for name in new if new[name] != old[name]]
    workdir = "runs/" + "-".join([config.name, *changed]).replace("/", "_")
    encoded = workdir.encode()
    if len(encoded) > _LONGEST_WORKDIR:
        end = f"-{hashlib.sha256(encoded).hexdigest()[:12]}"
        workdir = encoded[: _LONGEST_WORKDIR - len(end)].decode(errors="ignore") + end
    return workdir


def _answer_help(arguments: list[str]) -> None:
    """Prints and ends the process if the arguments ask for help or the version."""
    for i, word in enumerate(arguments):
        name, _, topic = word.partition("=")
        if name in ("--help", "-help", "-h"):
            print(help_text(topic))
            sys.exit(0)
        first = word.removeprefix("--config=") if i == 0 else ""  # as launch.sh writes it
        if first == "help":
            print(help_text(*(t for t in arguments[1:2] if not t.startswith("-"))))
            sys.exit(0)
        if word in ("--version", "-version") or first == "version":
            print(f"cnn_jax {cnn_jax.__version__}")
            sys.exit(0)
        if word == "--":
            return


def help_text(topic: str = "") -> str:
    """Returns the help of one topic: modes, configs, flags, seed or a section; "" stands for all.

    Raises:
        UserError: there is no such topic.
    """
    modes = ((f"--mode={name}", mode.help) for name, mode in MODES.items())
    own = ((f"--{field.name}", field.doc) for field in _FLAGS)
    topics = {
        "modes": f"modes: What to do.\n{_columns(modes)}",
        "configs": f"configs: What is trained.\n{_columns(configs.listing())}",
        "flags": f"flags: Flags that are not fields of the config.\n{_columns(own)}",
        "seed": f"seed\n{_field_columns('')}",
        **{
            name: f"{name}: {section.__doc__.splitlines()[0]}\n{_field_columns(name)}"
            for name, section in fields.sections().items()
        },
    }
    if topic:
        if topic not in topics:
            raise UserError(f"--help={topic}: expected {'|'.join(topics)}{nearest(topic, topics)}")
        return topics[topic]
    last = f"--help=TOPIC shows one of {', '.join(topics)}."
    return "\n\n".join([(cnn_jax.__doc__ or "").splitlines()[0], _USAGE, *topics.values(), last])


def _field_columns(section: str) -> str:
    chosen = [field for field in fields.all_fields().values() if field.section == section]
    return _columns((f"--{field.name}", f"{_kind(field)} {field.doc}") for field in chosen)


def _kind(field: Field) -> str:
    """Returns the type or the choices of a field, and its default."""
    kind = values.describe(field.kind).replace("|", " | ")
    return f"[{kind}; default {values.to_text(field.default) or 'empty'}]"


def _columns(entries: Iterable[tuple[str, str]]) -> str:
    """Returns names and texts in two columns that fit the terminal."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    indent = " " * 26
    lines = []
    for name, text in entries:
        head = f"  {name}".ljust(len(indent))
        if len(head) > len(indent):
            lines.append(head)
            head = indent
        lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent))
    return "\n".join(lines)
