def handle(data, context):
    if data is None:
        return None
    return {"few": [], "many": ["a", "b"], "text": "abc", "none": None, "dict": {"a": 1}, "tuple": ("a",)}[bytes(data[0]["body"]).decode()]
