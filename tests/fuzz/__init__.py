"""Fuzz targets: what may be done with bytes from outside, and what must be true of it whatever they are.

``make fuzz`` runs them guided by coverage (atheris for Python, libFuzzer for C++), ``make test`` replays ``corpus/``
and some thousand seeded mutations of it without either. A new finding is fixed in the file that owns it, and its input
goes into ``corpus/TARGET/`` under a name that says what it was.
"""
