"""One file per command of `pyserve`, and what they share: terminal, client, trial."""
