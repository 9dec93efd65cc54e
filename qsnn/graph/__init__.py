"""A network as a torch.fx graph."""
