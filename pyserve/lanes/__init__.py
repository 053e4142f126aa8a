"""A model's requests from admission to answer, in native threads or worker processes, and the keeping of those."""
