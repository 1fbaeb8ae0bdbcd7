"""Runs a recipe: batches, memory, attempts, processes, shards."""
