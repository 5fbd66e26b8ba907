"""What happens to the scans of state-space decoders: which tokens a state takes in."""
