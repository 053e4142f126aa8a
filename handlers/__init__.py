"""The handlers that come with pyserve, which double as examples for your own.

They import only `pyserve.handler` and `pyserve.context` of pyserve.
"""
