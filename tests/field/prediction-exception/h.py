from ts.utils.util import PredictionException


def handle(data, context):
    if data is None:
        return None
    if bytes(data[0]["body"]) == b"plain":
        raise PredictionException("no code")
    raise PredictionException("too small: é", 422)
