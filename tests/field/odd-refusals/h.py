from ts.utils.util import PredictionException


def handle(data, context):
    if data is None:
        return None
    match bytes(data[0]["body"]).decode():
        case "text":
            raise PredictionException(418, 400)
        case "code":
            raise PredictionException("a code in quotes", "418")
        case "interrupt":
            raise KeyboardInterrupt("not for you")
        case "empty":
            raise ValueError
        case _:
            return ["ok"] * len(data)
