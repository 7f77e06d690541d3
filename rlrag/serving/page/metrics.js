// Parses Prometheus text: counts, shares and estimated quantiles.

/** The names under which the service reports, in one place. */
export const NAMES = {
  requests: "rlrag_requests_total",
  stages: "rlrag_stage_seconds_bucket",
  caches: "rlrag_cache_lookups_total",
  tokens: "rlrag_tokens_total",
  inFlight: "rlrag_in_flight",
  waiting: "rlrag_waiting",
};

/** The routes that put a pipeline to work; all others, such as this page's, say little. */
const ASKING = new Set([
  "/v1/answer",
  "/v1/answers",
  "/v1/retrieve",
  "/retrieve",
  "/v1/chat/completions",
]);

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };

function readNumber(text) {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}

function readLabels(text) {
  const unescape = (value) => value.replaceAll(/\\(.)/g, (whole, letter) => ESCAPES[letter] ?? whole);
  return Object.fromEntries([...text.matchAll(LABEL)].map(([, name, value]) => [name, unescape(value)]));
}

/** Samples of an exposition: [{name, labels, value}]; comments and blank lines are left out. */
export function readMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line.trim());
    if (found) samples.push({ name: found[1], labels: readLabels(found[2] ?? ""), value: readNumber(found[3]) });
  }
  return samples;
}

/** The counts of requests that asked the pipeline, or were refused before it was known what they ask. */
export const askingRequests = (samples) =>
  samples.filter(
    ({ name, labels }) =>
      name === NAMES.requests &&
      (ASKING.has(labels.route) || (labels.route === "unmatched" && labels.status >= "400")),
  );

/** The values of one metric added up for each value of a label; a Map in the order first seen. */
export function sumBy(samples, name, label) {
  const sums = new Map();
  for (const { labels, value } of samples.filter((sample) => sample.name === name))
    sums.set(labels[label] ?? "", (sums.get(labels[label] ?? "") ?? 0) + value);
  return sums;
}

/** The sum of one metric; NaN where there is none. */
export function sumOf(samples, name) {
  const values = samples.filter((sample) => sample.name === name).map(({ value }) => value);
  return values.length ? values.reduce((sum, value) => sum + value, 0) : NaN;
}

/**
 * The q-quantile of a histogram, as Prometheus estimates it: linear within the bucket that holds
 * it, and the highest finite bound where that is the last bucket. `buckets` maps each upper bound
 * to the number of observations at or below it. NaN without observations.
 */
export function quantile(buckets, q) {
  const sorted = [...buckets].sort(([a], [b]) => a - b);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (!total) return NaN;
  const rank = q * total;
  const at = sorted.findIndex(([, below]) => below >= rank);
  const [upper, below] = sorted[at];
  const [lower, before] = at > 0 ? sorted[at - 1] : [0, 0];
  if (upper === Infinity) return lower;
  return below === before ? upper : lower + ((upper - lower) * (rank - before)) / (below - before);
}

/** For each stage its buckets, added up over all other labels. */
export function stageBuckets(samples) {
  const stages = new Map();
  for (const { name, labels, value } of samples) {
    if (name !== NAMES.stages) continue;
    const buckets = stages.get(labels.stage) ?? new Map();
    const bound = readNumber(labels.le);
    buckets.set(bound, (buckets.get(bound) ?? 0) + value);
    stages.set(labels.stage, buckets);
  }
  return stages;
}

/** [[cache, hits, lookups]] of each cache. */
export function cacheCounts(samples) {
  const caches = new Map();
  for (const { name, labels, value } of samples) {
    if (name !== NAMES.caches) continue;
    const counts = caches.get(labels.cache) ?? [0, 0];
    caches.set(labels.cache, [counts[0] + (labels.result === "hit" ? value : 0), counts[1] + value]);
  }
  return [...caches].map(([cache, [hits, lookups]]) => [cache, hits, lookups]);
}
