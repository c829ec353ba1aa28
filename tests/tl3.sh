#!/bin/sh
# The tests of the base model's room with transformer-lens 3, laid over an environment that has 4.
# usage: tests/tl3.sh PYTHON FOLDER [pytest options]; FOLDER is filled once and reused.
set -eu
python=$1 folder=$2
shift 2
if [ ! -e "$folder/.ready" ]; then
    # All else that version 3 needs comes with version 4.
    "$python" -m pip install --quiet --no-deps --target "$folder" transformer-lens==3.9.0 better-abc==0.0.3
    touch "$folder/.ready"
fi
PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pytest "$(dirname "$0")"/test_lm*.py "$@"
