"""Programs, token spaces and the small builder that rules are written on."""
