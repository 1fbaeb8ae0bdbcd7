"""Networks that bring their graph, as programs in their source's operators."""
