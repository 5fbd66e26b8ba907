"""``tokcc profile``: numbers of a decoder's heads or scans, in a file that policies name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokcc.cli.compile import Model, Unpickle
from tokcc.cli.output import Json, Output, Quiet, Verbose

__all__ = ["profile_command"]


def profile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes: JSON, of scans safetensors.")],
    tokens: Annotated[int, typer.Option(help="Length of the texts; for scans, of the training's.")] = 512,
    heads: Annotated[int, typer.Option(help="Query heads of each layer that count as retrieving.")] = 4,
    keep: Annotated[
        float, typer.Option(help="Share that stays when errors are measured, and that patterns read.")
    ] = 0.25,
    block: Annotated[int, typer.Option(help="Queries in a block of the heads' patterns, with --data.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    data: Annotated[Path | None, typer.Option(help="A text to measure scans and patterns on.")] = None,
    allow_pickle: Unpickle = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what each head of a decoder does, for methods that keep more for some heads or layers than for others.

    Random tokens are enough. Name the file in a policy: `profile: heads.json` (razor-attention, compresskv,
    double-sparsity, fasa). On a text the pattern and the threshold of each head for sparse attention are found as well
    (minference, sale). Of a state-space decoder the scans are measured, best on a text: `weights: scans.safetensors`
    (longmamba).
    """
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc import pipeline

        made = pipeline.profile(
            model,
            tokens=tokens,
            heads=heads,
            keep=keep,
            block=block,
            seed=seed,
            data=data,
            allow_pickle=allow_pickle,
            progress=out.progress(),
        )
        made.save(output)
        out.data(made.to_dict())
        out.show(f"{output}: {made.summary()}")
