"""Several front ends before one engine process: what crosses between them, and both ends of it."""
