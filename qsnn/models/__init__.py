"""Our own networks, by name."""
