"""What a person sees: tables, grids, reports."""
