// Recent requests and metrics of the service, refreshed while shown.

import { Problem, getJson, getText } from "./api.js";
import { byId, count, draw, duration, make, percent, table, withPart } from "./elements.js";
import {
  NAMES,
  askingRequests,
  cacheCounts,
  quantile,
  readMetrics,
  stageBuckets,
  sumBy,
  sumOf,
} from "./metrics.js";
import { problemNotice } from "./problem.js";
import { stageBar } from "./timings.js";

const EVERY_MS = 2000;
const WIDTH = 300;
const HEIGHT = 56;
const STAGE_ORDER = ["wait", "retrieve", "select", "generate", "total"];

let shown = false;
let paused = false;
let timer = 0;
let loading = false;

const isWanted = () => shown && !paused && document.visibilityState === "visible";

const figure = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));

function showFigures(samples) {
  const byStatus = sumBy(askingRequests(samples), NAMES.requests, "status");
  const total = [...byStatus.values()].reduce((sum, value) => sum + value, 0);
  const failed = [...byStatus].reduce((sum, [status, value]) => sum + (status >= "400" ? value : 0), 0);
  const tokens = sumBy(samples, NAMES.tokens, "kind");
  byId("figures").replaceChildren(
    figure("Requests", count(total)),
    figure("Refused or failed", total ? percent(failed / total) : "–"),
    figure("In flight", count(sumOf(samples, NAMES.inFlight))),
    figure("Waiting", count(sumOf(samples, NAMES.waiting))),
    ...[...tokens].map(([kind, value]) => figure(`Tokens, ${kind}`, count(value))),
  );
}

function showStages(samples) {
  const stages = stageBuckets(samples);
  const known = [...STAGE_ORDER.filter((name) => stages.has(name))];
  const others = [...stages.keys()].filter((name) => !STAGE_ORDER.includes(name));
  const rows = [...known, ...others].map((name) => {
    const buckets = stages.get(name);
    return [name, duration(1000 * quantile(buckets, 0.5)), duration(1000 * quantile(buckets, 0.99))];
  });
  byId("stages").replaceChildren(
    rows.length
      ? table("Latency by stage, estimated from histograms", ["Stage", "p50", "p99"], rows)
      : make("p", { class: "note" }, "No request has been timed yet."),
  );
}

/** One row with a name, a bar for a part from 0 to 1, and what the bar says in words. */
const barRow = (name, part, words, kind = "") =>
  make(
    "li",
    { class: "bar-row", "data-kind": kind },
    make("span", {}, name),
    withPart(make("span", { class: "meter", "aria-hidden": "true" }), part),
    make("span", { class: "number" }, words),
  );

const barList = (rows, otherwise) =>
  rows.length ? make("ul", { class: "bars" }, ...rows) : make("p", { class: "note" }, otherwise);

function showCounts(samples) {
  const byStatus = [...sumBy(askingRequests(samples), NAMES.requests, "status")].sort();
  const most = Math.max(...byStatus.map(([, value]) => value), 1);
  const statuses = byStatus.map(([status, value]) => barRow(status, value / most, count(value), `${status[0]}xx`));
  byId("statuses").replaceChildren(barList(statuses, "No request has been answered yet."));
  const caches = cacheCounts(samples).map(([cache, hits, lookups]) =>
    barRow(cache, lookups ? hits / lookups : 0, lookups ? `${percent(hits / lookups)} of ${count(lookups)}` : "unused"),
  );
  byId("caches").replaceChildren(barList(caches, "No cache is in use."));
}

function showSparkline(requests) {
  const answered = requests.filter(({ status, timings_ms: timings }) => status < 400 && "generate" in timings);
  const totals = answered.map(({ timings_ms: timings }) => timings.total).reverse();
  if (totals.length < 2) return byId("sparkline").replaceChildren();
  const highest = Math.max(...totals);
  const x = (at) => ((WIDTH * at) / (totals.length - 1)).toFixed(1);
  const y = (ms) => (HEIGHT - 3 - ((HEIGHT - 6) * ms) / (highest || 1)).toFixed(1);
  const points = totals.map((ms, at) => `${x(at)},${y(ms)}`).join(" ");
  const words = `the last ${totals.length} answers, ${duration(Math.min(...totals))} to ${duration(highest)}`;
  byId("sparkline").replaceChildren(
    make(
      "figure",
      { class: "sparkline" },
      draw(
        "svg",
        { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `Latency of ${words}` },
        draw("polygon", { points: `0,${HEIGHT} ${points} ${WIDTH},${HEIGHT}` }),
        draw("polyline", { points }),
      ),
      make("figcaption", { class: "note" }, `Total time of ${words}`),
    ),
  );
}

/** The service's time, as seconds since 1970 or as ISO text, on this computer's clock. */
function clock(time) {
  const date = new Date(typeof time === "number" ? time * 1000 : time);
  return make("time", { datetime: date.toISOString() }, date.toLocaleTimeString("en-GB"));
}

function showRecent(requests) {
  const totals = requests.map(({ timings_ms: timings }) => timings.total);
  const longest = Math.max(...totals, 0);
  const rows = requests.map(({ request_id: id, time, route, status, version, timings_ms: timings, question }) => [
    clock(time),
    make("span", { class: "status", "data-kind": `${String(status)[0]}xx` }, String(status)),
    make("span", { class: "number" }, duration(timings.total)),
    stageBar(timings, longest),
    make("span", { class: "path" }, route),
    make("span", { class: "id" }, version ?? "–"),
    make("span", { class: "id", title: question ?? false }, id),
  ]);
  const head = ["Time", "Status", "Total", "Stages", "Route", "Version", "Request"];
  byId("recent").replaceChildren(
    rows.length
      ? table("Recent requests, newest first", head, rows)
      : make("p", { class: "note" }, "Nobody has asked yet. Requests appear here as they are answered."),
  );
}

function showState() {
  byId("traffic-state").textContent = paused ? "Paused" : "Updates every 2 seconds while you look at it";
  byId("pause").textContent = paused ? "Resume" : "Pause";
}

async function refresh() {
  clearTimeout(timer);
  if (!isWanted() || loading) return;
  loading = true;
  try {
    const [{ requests }, text] = await Promise.all([getJson("v1/recent"), getText("metrics")]);
    const samples = readMetrics(text);
    byId("traffic-problem").replaceChildren();
    showFigures(samples);
    showSparkline(requests);
    showStages(samples);
    showCounts(samples);
    showRecent(requests);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    // The notice is read aloud once, not every two seconds.
    if (!byId("traffic-problem").firstChild) byId("traffic-problem").append(problemNotice(error));
  } finally {
    loading = false;
    if (isWanted()) timer = setTimeout(refresh, EVERY_MS);
  }
}

export function startTraffic() {
  document.addEventListener("tab", ({ detail }) => {
    shown = detail === "tab-traffic";
    refresh();
  });
  document.addEventListener("visibilitychange", refresh);
  byId("pause").addEventListener("click", () => {
    paused = !paused;
    showState();
    refresh();
  });
  showState();
}
