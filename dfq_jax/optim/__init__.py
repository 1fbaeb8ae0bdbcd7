"""Optimisation: the one training loop and its schedules."""
