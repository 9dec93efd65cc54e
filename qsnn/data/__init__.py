"""Labelled images, and how they reach a model."""
