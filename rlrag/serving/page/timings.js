// The time of each stage, as a stacked bar and as a table.

import { duration, make, table, withPart } from "./elements.js";

const STAGES = ["wait", "retrieve", "select", "generate"];
const NAMES = { wait: "Wait", retrieve: "Retrieve", select: "Select", generate: "Generate", other: "Other" };

/** [stage, ms] in the order in which they happen, without those that took no time; `other` is the rest. */
export function stagesOf(timings) {
  const stages = STAGES.filter((name) => timings[name] > 0).map((name) => [name, timings[name]]);
  const other = timings.total - stages.reduce((sum, [, ms]) => sum + ms, 0);
  return other > 0.05 ? [...stages, ["other", other]] : stages;
}

/** The bar alone; `longest` is the total that fills it. */
export function stageBar(timings, longest = timings.total) {
  const stages = stagesOf(timings);
  const label = stages.map(([name, ms]) => `${NAMES[name]} ${duration(ms)}`).join(", ");
  const parts = stages.map(([name, ms]) =>
    withPart(make("span", { class: "stage", "data-stage": name }), longest > 0 ? ms / longest : 0),
  );
  return make("div", { class: "stage-bar", role: "img", "aria-label": label, title: label }, ...parts);
}

/** Bar, legend and table of one answer. */
export function timingsView(timings, longest = timings.total) {
  const stages = stagesOf(timings);
  const share = (ms) => (timings.total > 0 ? `${Math.round((100 * ms) / timings.total)} %` : "–");
  const rows = stages.map(([name, ms]) => [NAMES[name], duration(ms), share(ms)]);
  return make(
    "section",
    { class: "timings", "aria-label": "Timings" },
    stageBar(timings, longest),
    make(
      "details",
      {},
      make(
        "summary",
        {},
        make("span", {}, `Answered in ${duration(timings.total)}`),
        ...stages.map(([name, ms]) =>
          make("span", { class: "key", "data-stage": name }, `${NAMES[name].toLowerCase()} ${duration(ms)}`),
        ),
      ),
      table("Time by stage", ["Stage", "Time", "Share"], [...rows, ["Total", duration(timings.total), ""]]),
    ),
  );
}
