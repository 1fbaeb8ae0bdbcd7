"""Rewrites of a network, each `Model -> Model`."""
