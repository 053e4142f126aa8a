def handle(data, context):
    if data is None:
        return None
    for i in range(len(data)):
        context.set_response_status(code=201, phrase="Made", idx=i)
        context.set_response_header(i, "X-Row", str(i))
        context.set_response_content_type(i, "text/x-mine")
    return ["made"] * len(data)
