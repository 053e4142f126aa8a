"""Runs the code that each request's body is: `out` is that request's result, `whole` the result of the batch."""


def handle(data, context):
    if data is None:
        return None
    results = []
    for i, row in enumerate(data):
        code = row.get("body", row.get("code"))
        names = {"data": data, "row": row, "context": context, "i": i, "out": "ok", "__name__": "told"}
        exec(code if isinstance(code, str) else bytes(code).decode(), names)
        if "whole" in names:
            return names["whole"]
        results.append(names["out"])
    return results
