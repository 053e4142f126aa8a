"""Models over several processes: not in this version."""
