#!/usr/bin/env bash
# import-linter over the view of the installed package, so that tokcc.passes and its like are seen.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/view.sh
linter=.venv/bin/lint-imports
[ -x "$linter" ] || linter=lint-imports
linter=$(command -v "$linter")
linter=$(realpath "$linter")
cd .typecheck
exec "$linter" --config ../pyproject.toml --cache-dir ../.import_linter_cache
