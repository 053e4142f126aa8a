def handle(data, context):
    if data is None:
        return None
    headers = context.get_all_request_header(0)
    lower = {name.lower(): value for name, value in headers.items()}
    return [f"{lower.get('content-length')} {lower.get('transfer-encoding')}"]
