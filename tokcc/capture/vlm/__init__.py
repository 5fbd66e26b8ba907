"""Vision-language (and audio-language) models of transformers, taken apart: encoder, embedding, decoder."""
