import utils


def handle(data, context):
    return None if data is None else [utils.NAME] * len(data)
