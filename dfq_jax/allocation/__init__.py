"""Bits for every layer: what they cost, what they buy, and what to do about a loss."""
