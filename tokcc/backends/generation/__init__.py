"""Generating text with a compiled decoder: an own loop over the ONNX engine."""

from tokcc.backends.generation.decoder import DecoderEngine, Past
from tokcc.backends.generation.documents import joined, old_entries
from tokcc.backends.generation.loop import Generation, Generator
from tokcc.backends.generation.sampling import Sampling

__all__ = ["DecoderEngine", "Generation", "Generator", "Past", "Sampling", "joined", "old_entries"]
