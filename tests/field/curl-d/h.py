import json


def handle(data, context):
    if data is None:
        return None
    return [json.dumps({k: bytes(v).decode() if isinstance(v, (bytes, bytearray)) else v for k, v in row.items()}) for row in data]
