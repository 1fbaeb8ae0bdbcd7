"""Rounding learned or solved unit by unit: methods, units, and the engine that runs them."""
