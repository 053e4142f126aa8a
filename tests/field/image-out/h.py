import base64

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def handle(data, context):
    if data is None:
        return None
    context.set_response_content_type(0, "image/png")
    return [PNG] * len(data)
