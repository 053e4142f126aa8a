def handle(data, context):
    return None if data is None else [bytes(row["body"]) for row in data]
