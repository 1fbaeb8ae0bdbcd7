"""The public functions, and what they are made of."""
