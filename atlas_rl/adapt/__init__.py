"""Training of draft heads: losses, measures of acceptance, what they learn from, and learning ahead of a run (`distill`)."""
