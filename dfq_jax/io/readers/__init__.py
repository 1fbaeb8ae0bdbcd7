"""Files of weights from strangers, read as data only."""
