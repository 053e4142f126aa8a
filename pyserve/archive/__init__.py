"""Archives as untrusted files: read, check, unpack, cache, pack; manifest and model-config.

Never runs what is in them.
"""
