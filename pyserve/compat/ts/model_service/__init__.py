"""Handlers in the form of years ago."""
