import logging

logging.basicConfig(level=logging.DEBUG, force=True, format="%(message)s")
log = logging.getLogger("mine")


def handle(data, context):
    if data is None:
        return None
    log.debug("seen %d", len(data))
    return [f"{log.getEffectiveLevel()} {len(logging.getLogger().handlers)}"] * len(data)
