"""Chaos: a seeded campaign of faults against a running server, while every answer is compared byte for byte."""
