# Sourced by demo.sh and test.sh: makes .venv with what the given requirements files list, once for each version of them.
# Sets $python to the environment's Python.

find_python() {
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed: install it, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

set_up() {
    python=.venv/bin/python
    if ! "$python" -c '' 2>/dev/null; then
        base=$(find_python) || exit 1
        echo "making .venv with $("$base" --version)"
        "$base" -m venv .venv || {
            echo "no virtual environment could be made: install the venv module of $base (on Debian: python3-venv)" >&2
            exit 1
        }
    fi
    for file in "$@"; do
        stamp=.venv/installed-$(echo "$file" | tr / -)
        if ! cat "$file" constraints.txt | cmp -s - "$stamp"; then
            echo "installing $file (once; some minutes)"
            "$python" -m pip install --quiet --disable-pip-version-check -r "$file" -c constraints.txt || exit 1
            cat "$file" constraints.txt > "$stamp"
        fi
    done
}
