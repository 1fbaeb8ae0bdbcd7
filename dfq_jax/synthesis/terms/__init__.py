"""Loss terms of image synthesis, and the statistics they compare."""
