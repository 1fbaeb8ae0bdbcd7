"""From a traced program, in the axis order of its source, to a canonical NHWC graph."""
