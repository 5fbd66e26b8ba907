#!/usr/bin/env bash
# Make .typecheck/tokcc, a view of the package as it is installed: mypy and import-linter do not follow package-dir.
set -euo pipefail
cd "$(dirname "$0")/.."

# Links are added and dropped one by one, so that two runs at a time do not disturb each other.
view=.typecheck/tokcc
mkdir -p "$view"
find "$view" -maxdepth 1 -type l ! -exec test -e {} \; -exec rm -f {} +
for entry in tokcc/*; do
    [ "$(basename "$entry")" = __pycache__ ] || ln -sfn "../../$entry" "$view/$(basename "$entry")"
done
for folder in passes kernels plugins_trt; do
    ln -sfn "../../$folder" "$view/$folder"
done
