// From counters that only grow to what happened between two answers.

/** What `histogram` (bounds, counts, sum) gained since `before`; null if it was counted anew. */
function gained(before, histogram) {
  if (!histogram) return null;
  const [bounds, counts, sum] = histogram;
  if (!before || before[1].length !== counts.length) return null;
  const gains = counts.map((value, index) => value - before[1][index]);
  return gains.some((each) => each < 0) ? null : { bounds, counts: gains, sum: sum - before[2], total: gains.reduce((a, b) => a + b, 0) };
}

/** The value below which a share `q` lies, interpolated within its bucket. */
export function quantile({ bounds, counts, total }, q) {
  if (!total) return null;
  let below = 0;
  for (let index = 0; index < counts.length; index += 1) {
    if (counts[index] && below + counts[index] >= q * total) {
      const low = index ? bounds[index - 1] : 0;
      const high = index < bounds.length ? bounds[index] : bounds[bounds.length - 1];
      return low + (high - low) * ((q * total - below) / counts[index]);
    }
    below += counts[index];
  }
  return bounds[bounds.length - 1];
}

const positive = (value) => (value >= 0 ? value : null);

/** Of all models: {rate, failures, mean_ms} between two answers. */
export function totalsBetween(before, after) {
  const seconds = (after.at - before.at) / 1000;
  const done = after.totals.succeeded - before.totals.succeeded;
  const failed = after.totals.failed - before.totals.failed;
  if (seconds <= 0 || done < 0 || failed < 0) return null;
  const both = done + failed;
  return { rate: both / seconds, failures: failed / seconds, mean_ms: both ? ((after.totals.seconds - before.totals.seconds) * 1000) / both : null };
}

/** Requests per second of a row of the table; null if it cannot be told. */
export function rateOfRow(before, after, milliseconds) {
  if (!before || !after.succeeded || milliseconds <= 0) return null;
  const number = (row) => row.succeeded.count + row.failed.count;
  return positive((number(after) - number(before)) / (milliseconds / 1000));
}

/** What the charts of one model draw of an interval. */
export function modelBetween(before, after, milliseconds) {
  const seconds = milliseconds / 1000;
  const point = { rate: rateOfRow(before, after, milliseconds), failures: positive((after.failed.count - before.failed.count) / seconds) };
  const ran = after.batches - before.batches;
  point.batch = ran > 0 ? (after.items - before.items) / ran : null;
  point.stages = {};
  for (const [name, now] of Object.entries(after.stages)) {
    const then = before.stages[name];
    if (then && now.count > then.count) point.stages[name] = (now.ns - then.ns) / 1e6 / (now.count - then.count);
  }
  const answered = after.succeeded.count - before.succeeded.count;
  point.mean = answered > 0 ? (after.succeeded.ns - before.succeeded.ns) / 1e6 / answered : null;
  if (after.histograms) addHistograms(point, before, after, seconds);
  return point;
}

function addHistograms(point, before, after, seconds) {
  const took = gained(before.histograms.request, after.histograms.request);
  point.p50 = took && took.total ? quantile(took, 0.5) * 1000 : null;
  point.p99 = took && took.total ? quantile(took, 0.99) * 1000 : null;
  point.queue = after.queue_size;
  point.in_flight = after.in_flight;
  const workers = Math.min(after.ready_workers, after.running_max || after.ready_workers);
  const busy = after.busy_s - before.busy_s;
  point.utilization = workers && busy >= 0 ? Math.min(1, Math.max(busy / (seconds * workers), busy ? 0 : after.running / workers)) : null;
  point.batch_counts = gained(before.histograms.batch_size, after.histograms.batch_size);
}
