"""Named architectures, one short builder each."""
