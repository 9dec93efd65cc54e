"""Equation (Q), and low-precision weights."""
