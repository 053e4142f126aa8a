def handle(data, context):
    if data is None:
        return None
    raise RuntimeError("no kernel image: CUDA was not compiled for this")
