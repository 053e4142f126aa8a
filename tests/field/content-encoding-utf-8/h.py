def handle(data, context):
    return None if data is None else [row["body"]["text"] for row in data]
