#!/usr/bin/env bash
# Tests: ./test.sh runs the quick ones, ./test.sh --all the slow ones too; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
. utils/setup.sh
set_up requirements.txt tests/requirements.txt
select=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    shift
    select=()
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 # one thread for each of the two pytest processes
"$python" -m ruff check .
exec "$python" -m pytest -n 2 --dist worksteal "${select[@]}" "$@"
