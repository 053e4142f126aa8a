// Numbers as people read them. A dash where there is nothing to show.

const NONE = "–";

export function count(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)}G`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(value < 10 ? 1 : 0);
}

/** Of milliseconds. */
export function duration(ms) {
  if (ms === null || ms === undefined || Number.isNaN(ms)) return NONE;
  if (ms >= 60000) return `${(ms / 60000).toFixed(ms % 60000 ? 1 : 0)} min`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms % 1000 ? (ms < 10000 ? 2 : 1) : 0)} s`;
  if (ms >= 100) return `${ms.toFixed(0)} ms`;
  if (ms >= 1) return `${ms.toFixed(1)} ms`;
  return ms > 0 ? `${ms.toFixed(2)} ms` : "0 ms";
}

export function size(bytes) {
  if (!bytes) return bytes === 0 ? "0 B" : NONE;
  const step = Math.min(4, Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** step;
  return `${value < 10 && step ? value.toFixed(1) : value.toFixed(0)} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

export function percent(share) {
  return share === null || share === undefined || Number.isNaN(share) ? NONE : `${(share * 100).toFixed(0)} %`;
}

/** Of a moment, in seconds since 1970. */
export function clock(seconds) {
  return new Date(seconds * 1000).toTimeString().slice(0, 8);
}

export function plural(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}
