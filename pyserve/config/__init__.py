"""What an operator may write, read strictly: keys, files, flags, variables, addresses, URLs, bounds of numbers.

Opens no socket, fetches nothing.
"""
