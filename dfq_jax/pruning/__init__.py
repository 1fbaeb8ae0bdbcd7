"""Smaller by structure, without data: which channels go, how many, and what makes up for them."""
