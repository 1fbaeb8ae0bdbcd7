"""Labelled images for evaluation: where they come from, how a network sees them, how it scores."""
