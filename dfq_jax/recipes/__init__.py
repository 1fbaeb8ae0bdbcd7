"""One short file per published method."""
