"""Equation (IF), the time loop, and conversion."""
