def handle(data, context):
    if data is None:
        return None
    metrics = context.metrics
    metrics.add_counter("Seen", 1)
    metrics.add_time("Took", 12.5, None, "ms")
    metrics.add_size("Size", 3, None, "MB")
    metrics.add_percent("Share", 50)
    metrics.add_metric("Mine", 2, "count")
    return [repr(hasattr(metrics, "cache"))] * len(data)
