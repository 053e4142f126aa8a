def handle(data, context):
    return None if data is None else [context.model_name] * len(data)
