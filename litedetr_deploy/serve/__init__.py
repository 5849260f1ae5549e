"""Artifacts as servers and clusters run them."""
