from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    part = {"text": "abc", "two": ["a", "b"], "good": ["a"]}[bytes(data[0]["body"]).decode()]
    send_intermediate_predict_response(part, context.request_ids, "Intermediate", 200, context)
    return ["end"] * len(data)
