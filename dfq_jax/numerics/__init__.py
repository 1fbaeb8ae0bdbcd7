"""Array mathematics only: rounding, grids, ranges."""
