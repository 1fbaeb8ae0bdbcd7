"""Formats in and out; the only place that knows frameworks and layouts."""
