"""Engines that run a network: what there is, made in a child process, compared, measured, chosen."""
