"""Runs in an environment of its own, with onnxruntime-genai and without tokcc: generates from bundles.

Reads from standard input ``{"batches": [[[ids]]], "new": n, "folders": {name: folder}, "beams": folder}``, writes to
the file that it is given ``{"versions": {...}, "tokens": {name: [[[ids]]]}, "beams": message}``. Rows that differ in
length are padded behind, as its own tokenizer does.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def generate(model, rows, new, pad):
    length = max(map(len, rows))
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(rows), min_length=length + new, max_length=length + new)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([row + [pad] * (length - len(row)) for row in rows], np.int32))
    made = [[] for _ in rows]
    while not generator.is_done():
        generator.generate_next_token()
        for row, token in zip(made, generator.get_next_tokens(), strict=True):
            row.append(int(token))
    return made


def refusal_of_beams(folder):
    model = og.Model(folder)
    params = og.GeneratorParams(model)
    params.set_search_options(num_beams=2, max_length=40)
    try:
        og.Generator(model, params)
    except Exception as error:  # its one class of error is RuntimeError or Exception, by version
        return str(error)
    return ""


def main():
    job = json.load(sys.stdin)
    tokens = {}
    for name, folder in job["folders"].items():
        pad = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["pad_token_id"]
        model = og.Model(folder)
        tokens[name] = [generate(model, rows, job["new"], pad) for rows in job["batches"]]
    packages = ("onnxruntime-genai", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages}
    answer = {"versions": versions, "tokens": tokens, "beams": refusal_of_beams(job["beams"])}
    Path(sys.argv[1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
