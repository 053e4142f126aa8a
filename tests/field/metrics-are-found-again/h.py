from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes


class H:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        metrics = context.metrics
        metrics.add_counter("Seen", 1, dimensions=[Dimension("Stage", "a")])
        metrics.add_time("Took", 1.5)
        metrics.add_metric("", 1, "count")
        found = [metrics.get_metric("Seen"), metrics.get_metric("Took", MetricTypes.GAUGE), metrics.get_metric("")]
        found[1].add_or_update(2, ["m", "Model"])
        return [[[each.metric_name, each.unit] for each in found]]
