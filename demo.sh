#!/usr/bin/env bash
# The whole job on synthetic news, without hub or GPU: set-up, data, a teacher, students with and without it, a table.
#   ./demo.sh                   noisy labels, four rows and lead-3: some minutes on 2 cores
#   ./demo.sh --full            all methods, noisy and clean labels, longer trainings
#   DEMO_STEPS=12 ./demo.sh     every training for 12 steps: to see that it runs, not what it gives
# Safe to run again: what is finished is used as it is.
set -euo pipefail
cd "$(dirname "$0")"
. utils/setup.sh
set_up requirements.txt
exec "$python" -m demo.run "$@"
