"""Checks and times this project on a GPU: one command, at most 8 minutes, no network.

python3 benchmarks/gpu_check.py [--parts=1,2,3,4,5] [--out=FOLDER] [--cifar=FOLDER] [--rehearsal]

It needs python3 with jax, flax, optax, orbax and what docs/devices.md lists, and uses PyTorch,
torchvision and timm where they are installed. The parts are

1. devices, a whitening convolution of bfloat16; quickstart trained, then verified twice, each time
   with an empty cache of compiled programs, with and without runtime.deterministic
2. speed of nine networks by batch size and precision, in turn with PyTorch
3. the gradient of max pools, segments against a loop of steps, threefry against rbg
4. accuracy and seconds on CIFAR-10, if its parts are in --cifar (see carry_cifar.py)
5. a function exported on the CPU and run on the GPU; the tests marked gpu

Each runs in processes of its own that end at a limit of their own, so a failure costs only itself.
FOLDER/gpu_check.json and gpu_check.md are written after every result; rows that other calls have
put there stay. What was not reached in time is listed as missing.
"""

import argparse
import contextlib
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS_OF_JAX = (sys.executable, str(HERE / "gpu_parts.py"))
Row = dict[str, Any]

TFLOPS = {"bfloat16": 989.5, "float32": 494.7, "float32, highest": 66.9}
"""Peak of an H100 SXM or H200, dense: half of what NVIDIA's data sheets (H100, H200 Tensor Core
GPU, 2024) give with sparsity for bfloat16 and TF32; for float32 without tensor cores, all of it."""
LIMITS = {1: 80, 2: 240, 3: 70, 4: 300, 5: 90}
"""Seconds of each part, less where --minutes leave less."""
GROUP_SECONDS = 75
"""For building the networks of part 2 that are timed in turn; more in a rehearsal."""
PHOTOS = ("resnet50", "efficientnet_lite0")
KINDS = ("bfloat16", "PyTorch bfloat16, eager", "PyTorch bfloat16, torch.compile")
KINDS += ("float32", "PyTorch float32, torch.compile", "float32, highest")
"""Each network of part 2 in each of these ways; the first are the most telling."""
FAST = {"airbench": 10, "airbench_muon": 10, "airbench96": 3}
"""Configs of part 4 that are trained in bfloat16, and of each the number of seeds."""
ALONE = {"airbench": 2, "airbench_muon": 2}
"""Of these so many of the seeds are trained while nothing else runs."""
CHAPTER = ("vgg_dropout", "vgg3", "vgg2", "vgg1", "simple_cnn")
"""Further configs of part 4, with 5 seeds."""


class Report:
    """The rows of this call and of earlier ones, written after each change."""

    def __init__(self, folder: Path, parts: list[int], commit: str, rehearsal: bool) -> None:
        self._folder, self._rehearsal, self._lock = folder, rehearsal, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "gpu_check.json"
        old = json.loads(self._path.read_text()) if self._path.exists() else {"rows": []}
        self.machine = describe_machine(commit)
        self.rows: list[Row] = [row for row in old["rows"] if row["part"] not in parts]
        self.write()

    def add(self, part: int, row: Row) -> None:
        """Keeps a result, prints it, and writes both files."""
        with self._lock:
            self.rows.append({"part": part, "commit": self.machine["commit"], **row})
            print(json.dumps(self.rows[-1]), flush=True)
            self.write()

    def miss(self, part: int, name: str, why: str, expected: bool = False) -> None:
        """Keeps that a result is missing, and why; `expected`: because nothing is there for it."""
        self.add(part, {"name": name, "missing" if not expected else "left out": why})

    def failures(self) -> list[str]:
        """Returns the names of results that are missing or wrong."""
        return [
            f"{row['name']}: {row.get('missing', row)}"
            for row in self.rows
            if "missing" in row or row.get("passed") is False or row.get("exit code", 0)
        ]

    def write(self) -> None:
        """Writes the files."""
        found = {"rehearsal": self._rehearsal, "machine": self.machine, "rows": self.rows}
        self._path.write_text(json.dumps(found, indent=1) + "\n")
        (self._folder / "gpu_check.md").write_text(to_markdown(found))


def describe_machine(commit: str) -> Row:
    """Returns card, driver, versions and commit, without importing JAX."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = {"card": _output(query) or "none", "commit": commit or _output(git) or "unknown"}
    found |= {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "timm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def to_markdown(found: Row) -> str:
    """Returns a table of each part, a row for each result and a column for each of its values."""
    title = "# GPU check" + (
        " (a rehearsal on a CPU: its figures say nothing)" * found["rehearsal"]
    )
    lines = [title, "", *(f"- {name}: {value}" for name, value in found["machine"].items())]
    for part in sorted({row["part"] for row in found["rows"]}):
        commits = {row["commit"]: None for row in found["rows"] if row["part"] == part}
        lines += ["", f"## Part {part}", "", f"Commit: {', '.join(commits)}"]
        tables: dict[tuple[str, ...], list[Row]] = {}
        for row in found["rows"]:
            if row["part"] == part:
                columns = tuple(key for key in row if key not in ("part", "commit"))
                tables.setdefault(columns, []).append(row)
        for columns, rows in tables.items():
            lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_cell(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


class Check:
    """One call of this program: its report, its time, and how it starts processes."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.parts = [int(part) for part in options.parts.split(",")]
        self.rehearsal, self.scratch, self.cifar = options.rehearsal, folder, options.cifar
        self.torch = options.torch_python
        self.patience = 5 if self.rehearsal else 1  # CPUs may be slow.
        out, commit = Path(options.out), options.commit
        self.report = Report(out, self.parts, commit, options.rehearsal)
        minutes = 30 if self.rehearsal else options.minutes
        self._end = time.monotonic() + 60 * minutes
        self._part_end = self._end

    def begin(self, part: int) -> None:
        """Starts the clock of a part."""
        self._part_end = min(self._end, time.monotonic() + LIMITS[part] * self.patience)

    def left(self) -> float:
        """Returns the seconds that the part still has."""
        return self._part_end - time.monotonic()

    def environment(self, cache: str = "cache", **changes: str) -> dict[str, str]:
        """Returns the variables of a process; `cache` is its folder of compiled programs."""
        found = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # PyTorch is on the device as well.
        }
        if self.rehearsal:
            found |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            found |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        return found | changes

    def start(self, command: list[str], environment: dict[str, str]) -> "Process":
        """Starts a process that gets --rehearsal in a rehearsal."""
        return Process(command + ["--rehearsal"] * self.rehearsal, environment)

    def collect(self, part: int, *command: str, **environment: str) -> list[Row]:
        """Runs a part of gpu_parts.py to its end or limit, and adds its rows to the report."""
        name, rows = " ".join(command), []
        if self.left() < 5:
            self.report.miss(part, name, "not reached in time")
            return rows
        process = self.start([*PARTS_OF_JAX, *command], self.environment(**environment))
        try:
            while (row := process.read(self.left())) is not None:
                rows.append(row)
                self.report.add(part, row)
        except TimeoutError:
            self.report.miss(part, name, "ended at its limit of time")
        finally:
            if code := process.stop():
                self.report.miss(part, name, f"exit code {code}: {process.last_error}")
        return rows


class Process:
    """A process whose lines of JSON are read with a limit of time."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE,
        )
        self.last_error = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._threads = [threading.Thread(target=f) for f in (self._read_out, self._read_err)]
        for thread in self._threads:
            thread.start()

    def _read_out(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                self._lines.put(line)
        self._lines.put(None)

    def _read_err(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self.last_error = line.strip()[:300] or self.last_error

    def ask(self, request: Row, seconds: float) -> Row | None:
        """Sends a line of JSON and returns the answer, or None if the process has died."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.read(seconds)

    def read(self, seconds: float) -> Row | None:
        """Returns the next line, or None at the end.

        Raises:
            TimeoutError: no line came within so many seconds.
        """
        try:
            line = self._lines.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def stop(self) -> int:
        """Ends the process if it still runs; returns its exit code, 0 if it had to be ended."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = 0
        for thread in self._threads:
            thread.join()
        return code


def main_command(check: Check, *flags: str) -> list[str]:
    """Returns a command of the project itself, tiny in a rehearsal."""
    small = ("--model.blocks=[[4],[4]]", "--model.dense=[8]", "--train.epochs=1")
    small += ("--runtime.kernels=xla",)  # as on a GPU
    tiny = small if check.rehearsal else ()
    return [sys.executable, "-m", "cnn_jax.main", "--config=quickstart", *tiny, *flags]


def run_main(check: Check, cache: str, *flags: str, **environment: str) -> tuple[int, str]:
    """Runs a command of the project; returns its exit code and the last line that it printed."""
    try:
        done = subprocess.run(
            main_command(check, *flags),
            env=check.environment(cache, **environment),
            cwd=check.scratch,
            capture_output=True,
            text=True,
            timeout=max(check.left(), 1),
        )
    except subprocess.TimeoutExpired:
        return -1, "ended at its limit of time"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode, lines[-1] if lines else ""


def devices_and_bits(check: Check) -> None:
    """Part 1."""
    check.collect(1, "machine")

    def train_and_verify(deterministic: str) -> Row:
        flag, workdir = f"--runtime.deterministic={deterministic}", f"quickstart-{deterministic}"
        flags = (flag, f"--workdir={workdir}")
        code, line = run_main(check, f"cold-{workdir}", *flags)
        if code:
            return {"missing": f"exit code {code}: {line}"}
        found = json.loads((check.scratch / workdir / "summary.json").read_text())
        row = {key: found[key] for key in ("test_accuracy", "seconds", "params_sha256")}

        def verify(i: int) -> str:
            code, line = run_main(check, f"cold-{workdir}-{i}", "--mode=verify", *flags)
            return "the same bits" if code == 0 else f"other bits: {line}"

        with ThreadPoolExecutor(2) as pool:
            repeated = pool.map(verify, range(1 if check.rehearsal else 2))
            for i, found in enumerate(repeated, start=1):
                row[f"verification {i}"] = found
        return row

    values = ("true",) if check.rehearsal else ("true", "false")
    with ThreadPoolExecutor(2) as pool:
        for value, row in zip(values, pool.map(train_and_verify, values), strict=True):
            check.report.add(1, {"name": f"quickstart, runtime.deterministic={value}", **row})


def speed(check: Check) -> None:
    """Part 2: the most telling sizes first, since the time may not suffice for all.

    All competitors of a group are built, then timed in turn. XLA and cuDNN choose the fastest of
    their kernels while they build. What else runs then can spoil a choice, so of several networks
    no more than two of each framework are built at a time.
    """
    workers = Workers(check)
    if not workers.has_torch:
        check.report.miss(2, "PyTorch", "not installed, or a rehearsal", expected=True)
    pairs = (("airbench", "resnet_small"), ("resnet50", "efficientnet_lite0"))
    pairs += (("vgg1", "vgg_dropout"), ("vgg2", "simple_cnn"))
    telling = ("vgg3", "airbench", "resnet50")
    groups = [(512, 128, ("vgg3",), KINDS), *((512, 128, pair, KINDS[:3]) for pair in pairs)]
    groups += [(64, 64, telling, KINDS[:3]), (1024, 256, telling, KINDS[:3])]
    groups += [(512, 128, pair, KINDS[3:]) for pair in pairs]
    if check.rehearsal:
        groups = [(8, 4, ("vgg3", "efficientnet_lite0"), KINDS[:3]), (8, 4, ("vgg3",), KINDS[5:])]
    try:
        for small, photos, names, kinds in groups:
            sizes = {name: photos if name in PHOTOS else small for name in names}
            if check.left() < 10:
                for name, batch in sizes.items():
                    for kind in kinds:
                        row = f"{name}, batch {batch}: {kind}"
                        check.report.miss(2, row, "not reached in time")
                continue
            time_group(check, workers, sizes, kinds)
    finally:
        workers.stop()


class Workers:
    """Processes that build and time networks, started again after one has died."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.has_torch = bool(check.torch) or (
            not check.rehearsal and util.find_spec("torch") is not None
        )
        self._running: dict[str, Process] = {}

    def ask(self, worker: str, request: Row, seconds: float) -> Row:
        """Returns the answer of a process such as "jax 0" or "torch 1", or {"missing": ...}."""
        if worker not in self._running:
            torch = [self._check.torch or sys.executable, str(HERE / "gpu_torch.py")]
            command = [*PARTS_OF_JAX, "serve"] if worker.startswith("jax") else torch
            self._running[worker] = self._check.start(command, self._check.environment())
        process = self._running[worker]
        try:
            answer = process.ask(request, seconds)
        except TimeoutError:
            answer = {"missing": "not reached in time"}
        if answer is None or "missing" in answer:
            del self._running[worker]
            process.stop()
        return answer if answer is not None else {"missing": process.last_error}

    def forget(self) -> None:
        """Frees the memory of what was built."""
        for worker in list(self._running):
            self.ask(worker, {"forget": True}, 30)

    def stop(self) -> None:
        """Ends all processes."""
        for process in self._running.values():
            process.stop()


def competitor(name: str, batch: int, kind: str) -> Row:
    """Returns what to ask a worker for: one of `KINDS` of a network."""
    from cnn_jax import configs  # which imports no JAX

    request: Row = {"network": name, "batch": batch}
    if not kind.startswith("PyTorch"):
        precision = "highest" if kind.endswith("highest") else "default"
        return request | {"dtype": kind.split(",")[0], "precision": precision}
    if name not in PHOTOS:
        model = configs.get(name).model
        request |= {"blocks": model.blocks, "dense": model.dense, "dropout": model.dropout}
    dtype = "bfloat16" if "bfloat16" in kind else "float32"
    return request | {"dtype": dtype, "compile": kind.endswith("torch.compile")}


def time_group(
    check: Check, workers: Workers, sizes: dict[str, int], kinds: tuple[str, ...]
) -> None:
    """Builds the networks of these batch sizes, two at a time, then times them one by one."""
    kinds = tuple(kind for kind in kinds if workers.has_torch or "PyTorch" not in kind)
    asked = {
        (name, kind): (
            f"{'torch' if 'PyTorch' in kind else 'jax'} {i % 2}",
            competitor(name, batch, kind),
        )
        for i, (name, batch) in enumerate(sizes.items())
        for kind in kinds
    }
    answers: dict[tuple[str, str], list[Row]] = {key: [] for key in asked}
    built_by = time.monotonic() + min(0.7 * check.left(), GROUP_SECONDS * check.patience)

    def build(worker: str) -> None:
        for key, (its_worker, request) in asked.items():
            if its_worker == worker:
                seconds = built_by - time.monotonic()
                answers[key].append(workers.ask(worker, request, seconds))

    used = sorted({worker for worker, _ in asked.values()})
    with ThreadPoolExecutor(len(used)) as pool:
        list(pool.map(build, used))
    for name, batch in sizes.items():
        for _ in range(1 if check.rehearsal else 3):
            for kind in kinds:
                if "missing" not in answers[name, kind][-1]:
                    answers[name, kind].append(workers.ask(*asked[name, kind], check.left()))
        for kind in kinds:
            row = {"name": f"{name}, batch {batch}", "kind": kind}
            check.report.add(2, row | summary(batch, kind, answers[name, kind]))
    workers.forget()


def summary(batch: int, kind: str, answers: list[Row]) -> Row:
    """Returns what the timings of one competitor amount to; the first one was not undisturbed."""
    last = answers[-1]
    if "missing" in last:
        return {"missing": last["missing"]}
    seconds = median(answer["seconds"] for answer in answers[1:])
    row: Row = {"images/s": batch / seconds, "ms a step": 1e3 * seconds}
    if "flops" in last:
        rate = last["flops"] / seconds / 1e12
        row |= {"TFLOP/s": rate, "share of peak": rate / TFLOPS[kind]}
        row["compile s, warm"] = last["warm_compile_seconds"]
    row["compile s, cold"] = last["compile_seconds"]
    return row | {"memory MB": last.get("memory_mb", "not measured")}


def alternatives(check: Check) -> None:
    """Part 3."""
    check.collect(3, "pools")
    check.collect(3, "steps")


def accuracy(check: Check) -> None:
    """Part 4: first what runs alone, then the rest, three at a time."""
    folder = Path(check.cifar or check.scratch / "cifar").resolve()
    if check.rehearsal:
        command = [sys.executable, str(HERE / "carry_cifar.py"), str(folder), "--tiny"]
        subprocess.run(command, check=True, env=check.environment())
    if missing := missing_parts(folder):
        what = f"{', '.join(missing)} not in --cifar={folder}"
        return check.report.miss(4, "CIFAR-10", what, expected=True)

    def run(name: str, dtype: str, first: int, end: int, beside: str) -> None:
        numbers = str(first), str(end)
        check.collect(4, "accuracy", name, dtype, *numbers, str(folder), beside)

    if check.rehearsal:
        return run("airbench_muon", "bfloat16", 0, 1, "nothing")
    for name, n in ALONE.items():
        run(name, "bfloat16", 0, n, "nothing")
    with ThreadPoolExecutor(3) as pool:
        for name, n in FAST.items():
            pool.submit(run, name, "bfloat16", ALONE.get(name, 0), n, "others")
        for dtype in ("bfloat16", "float32"):
            for name in CHAPTER:
                pool.submit(run, name, dtype, 0, 5, "others")
    for (name, n), figures in means(check.report.rows).items():
        check.report.add(4, {"name": f"{name}: mean of {n} seeds", **figures})


def missing_parts(folder: Path) -> list[str]:
    """Returns the names of the parts of CIFAR-10 that are not in a folder."""
    from carry_cifar import N_PARTS

    names = [f"part{i + 1}.npz" for i in range(N_PARTS)]
    return [name for name in names if not (folder / name).exists()]


def means(rows: list[Row]) -> dict[tuple[str, int], Row]:
    """Returns mean and standard deviation (n - 1) of each config's accuracies, and its seconds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == 4 and "seed" in row:
            found.setdefault(row["name"], []).append(row)
    return {
        (name, len(runs)): {
            "test_accuracy": fmean(run["test_accuracy"] for run in runs),
            "standard deviation": stdev([run["test_accuracy"] for run in runs])
            if len(runs) > 1
            else "one seed",
            "training_seconds, alone": median(alone) if alone else "not measured",
        }
        for name, runs in found.items()
        for alone in [[run["training_seconds"] for run in runs if run["beside"] == "nothing"]]
    }


def exports_and_tests(check: Check) -> None:
    """Part 5."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    on_gpu = {} if check.rehearsal else {"CNN_JAX_GPU": "1"}
    flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    try:
        done = subprocess.run(
            [*tests, "tests/test_gpu.py"],
            env=check.environment(**flags, **on_gpu),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(check.left(), 1),
        )
        lines = (done.stdout or done.stderr).strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        row = {"result": lines[-1] if lines else "", "exit code": done.returncode}
        check.report.add(5, {"name": "tests marked gpu", **row, "failed": "; ".join(failed)})
    except subprocess.TimeoutExpired:
        check.report.miss(5, "tests marked gpu", "ended at their limit of time")
    for precision in ("highest",) if check.rehearsal else ("default", "highest"):
        workdir = f"exported-{precision}"
        flags = (f"--model.precision={precision}", f"--workdir={workdir}", "--train.epochs=1")
        on_cpu = {"JAX_PLATFORMS": "cpu"}
        code, line = run_main(check, "cache-cpu", *flags, **on_cpu)
        if not code:
            code, line = run_main(check, "cache-cpu", "--mode=export", *flags, **on_cpu)
        if code:
            check.report.miss(5, workdir, f"exit code {code}: {line}")
            continue
        check.collect(5, "exported", str(check.scratch / workdir / "export"))


PARTS: dict[int, Callable[[Check], None]] = {
    1: devices_and_bits,
    2: speed,
    3: alternatives,
    4: accuracy,
    5: exports_and_tests,
}


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Gives a folder for runs and caches, and removes it in the end."""
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="1,2,3,4,5")
    parser.add_argument("--out", default=str(ROOT / "build" / "gpu_check"))
    parser.add_argument("--cifar", default="", help="folder of part1.npz and part2.npz")
    parser.add_argument("--commit", default="", help="where the copy of the project has no .git")
    parser.add_argument("--torch_python", default="", help="if PyTorch is in another environment")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--rehearsal", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with scratch_folder() as folder:
        check = Check(options, folder)
        for part in check.parts:
            check.begin(part)
            start = time.monotonic()
            try:
                PARTS[part](check)
            except Exception as error:  # One part's failure must not cost the others.
                check.report.miss(part, "all that follows", f"{type(error).__name__}: {error}")
            print(f"part {part}: {time.monotonic() - start:.0f} s", flush=True)
        if failures := check.report.failures():
            print("\n".join(["missing or wrong:", *failures]))
            sys.exit(1)


if __name__ == "__main__":
    main()
