#!/usr/bin/env bash
# mypy --strict over the package (all of it, or the files under .typecheck/tokcc that are given).
set -euo pipefail
cd "$(dirname "$0")/.."

tools/view.sh
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m mypy "${@:-.typecheck/tokcc}"
