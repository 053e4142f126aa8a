def handle(data, context):
    return None if data is None else [" ".join(row) for row in data]
