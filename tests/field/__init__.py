"""Inputs from the field, a folder each, and what must happen; see ../differential/README.md for their words."""
