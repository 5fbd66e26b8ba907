"""Runs in an environment of its own, with optimum and without tokcc: generates from bundles and prints the tokens.

Reads from standard input ``{"prompts": [[ids]], "new": n, "folders": {name: folder}}``, writes to the file that it is
given ``{"versions": {...}, "tokens": {name: [[ids]]}}``.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def padded(prompts, pad):
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts])
    return ids, mask


def main():
    job = json.load(sys.stdin)
    tokens = {}
    for name, folder in job["folders"].items():
        model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
        ids, mask = padded(job["prompts"], model.config.pad_token_id)
        result = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=job["new"], min_new_tokens=job["new"]
        )
        tokens[name] = result[:, ids.shape[1] :].tolist()
    packages = ("optimum-onnx", "transformers", "onnxruntime", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    Path(sys.argv[1]).write_text(json.dumps({"versions": versions, "tokens": tokens}))


if __name__ == "__main__":
    main()
