"""Proof and cost."""
