#!/usr/bin/env bash
# Sets up .venv on the first call, then runs the project with what is in it.
#
#   ./launch.sh                                trains on the bundled data set
#   ./launch.sh vgg_dropout --train.epochs=3   another config, with flags of cnn_jax.main
#   ./launch.sh --mode=summary --config=vgg3   flags alone; --help lists them
#   ./launch.sh test [pytest arguments]        the tests except the slow ones (-m "" runs all)
#   ./launch.sh --cuda ...                     installs for an NVIDIA GPU (automatic where one is)
#
# PYTHON names the interpreter that .venv is made with (default: python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv

# Drivers from 580 on run CUDA 13, which older ones can't.
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
extras=()
if [[ ${1:-} == --cuda || -n $driver ]]; then
    major=${driver%%.*}
    [[ ${major:-580} -ge 580 ]] && extras+=(cuda13) || extras+=(cuda12)
fi
[[ ${1:-} != --cuda ]] || shift
[[ ${1:-} != test ]] || extras+=(dev)

# Installs the package with an extra ("" for none) unless it is there for these requirements.
install() {
    local stamp=$venv/.installed-${1:-base}
    local wanted
    wanted=$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)
    [[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && return
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
            exit 2
        }
        "${PYTHON:-python3}" -m venv --clear "$venv"
    fi
    local why=
    [[ ${1:-} != cuda* ]] || why=", for the NVIDIA driver ${driver:-that this machine lacks so far}"
    echo "installing cnn_jax${1:+[$1]} into $venv (once$why) ..." >&2
    # Without --no-compile pip compiles all of SciPy and others, most of which is never imported.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        --editable "$root${1:+[$1]}" || {
        echo "error: the installation failed; see above, then run this again" >&2
        exit 1
    }
    echo "$wanted" >"$stamp"
}

install ""
# Before 4.4, bash takes an empty array for an unset variable.
for extra in ${extras[@]+"${extras[@]}"}; do install "$extra"; done

if [[ ${1:-} == test ]]; then
    shift
    cd "$root"
    exec "$venv/bin/python" -m pytest --numprocesses=auto --dist=worksteal "$@"
fi
if [[ $# -gt 0 && $1 != -* ]]; then
    config=$1
    shift
    set -- "--config=$config" "$@"
fi
# Large arrays in huge pages, where the system grants them to those who ask: on a CPU, photos train
# and are classified in less time. Only the C library of most Linux systems reads this.
export GLIBC_TUNABLES="glibc.malloc.hugetlb=1${GLIBC_TUNABLES:+:$GLIBC_TUNABLES}"
# -P: a random.py in the current folder must not stand in for Python's own.
exec "$venv/bin/python" -P -m cnn_jax.main "$@"
