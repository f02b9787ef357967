"""Measures of what a reconstruction gives away."""
