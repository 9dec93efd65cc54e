"""What students learn from."""
