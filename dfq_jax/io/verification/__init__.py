"""Whether a file is what was exported, and computes what was simulated."""
