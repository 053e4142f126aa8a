import json


def handle(data, context):
    if data is None:
        return None
    every = context.get_all_request_header(0)
    return [json.dumps({
        "same": context.get_request_header(0, "X-Mine"), "unknown": context.get_request_header(0, "X-None"),
        "mine": every.get("X-Mine"), "body": every.get("body"), "twice": every.get("X-Twice"),
    })] * len(data)
