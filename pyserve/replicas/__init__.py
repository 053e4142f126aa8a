"""Engines as replicas of a cluster that somebody else's control plane keeps: Ray Serve's."""
