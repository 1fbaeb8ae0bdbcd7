"""Images from the network alone: targets, loss terms, parametrisations."""
