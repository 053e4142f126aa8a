import json


def handle(data, context):
    if data is None:
        return None
    return [json.loads(row["j"].decode())["a"] for row in data]
