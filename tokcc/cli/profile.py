"""``tokcc profile``: numbers of a decoder's heads, in a file that policies name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokcc.cli.compile import Model, Unpickle
from tokcc.cli.output import Json, Output, Quiet, Verbose

__all__ = ["profile_command"]


def profile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes (JSON).")],
    tokens: Annotated[int, typer.Option(help="Length of the random texts.")] = 512,
    heads: Annotated[int, typer.Option(help="Query heads of each layer that count as retrieving.")] = 4,
    keep: Annotated[float, typer.Option(help="Share of the cache that stays when a layer's error is measured.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    allow_pickle: Unpickle = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what each head of a decoder does, for methods that keep more for some heads or layers than for others.

    Random tokens are enough. Name the file in a policy: `profile: heads.json` (razor-attention, compresskv).
    """
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc import pipeline

        made = pipeline.profile(
            model,
            tokens=tokens,
            heads=heads,
            keep=keep,
            seed=seed,
            allow_pickle=allow_pickle,
            progress=out.progress(),
        )
        made.save(output)
        out.data(made.to_dict())
        highest = max(max(row) for row in made.induction)
        out.show(f"{output}: {len(made.echo)} layers of {len(made.echo[0])} heads, induction up to {highest:.2f}")
