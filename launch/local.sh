#!/bin/sh
# One machine: launch/local.sh recipe=quickstart [key=value ...]
# Ray starts and ends with the run. The Python that has asystem is the first on PATH, or the one that PYTHON names.
set -eu
exec "${PYTHON:-python3}" -m asystem train "$@"
