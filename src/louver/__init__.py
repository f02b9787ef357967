"""Louver: cut a vision network between device and cloud, and measure what the features give away."""
