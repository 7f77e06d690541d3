// The question form: asks once, or twice to compare two versions.

import { AnswerView } from "./answer.js";
import { Problem, getJson } from "./api.js";
import { changesOf, differenceInWords, lossesOf } from "./compare.js";
import { byId, duration, make } from "./elements.js";

const form = byId("ask-form");
const question = byId("question");
const button = byId("ask");
const status = byId("ask-status");
const comparing = byId("compare");

/** The number fields: element, field of the request, label. */
const NUMBERS = [
  ["num-selected", "num_selected", "Passages"],
  ["num-candidates", "num_candidates", "Candidates"],
];

let running = null;
let versions = [];

/** [version, what it does] of the versions in use. */
function versionsIn({ active, canary, canary_share: share, shadow }) {
  const named = [[active, "active"]];
  if (canary) named.push([canary, `canary, ${Math.round(share * 100)} %`]);
  if (shadow) named.push([shadow, "shadow"]);
  return named;
}

const option = ([version, role]) => make("option", { value: version }, `${version} (${role})`);

async function loadVersions() {
  try {
    versions = versionsIn(await getJson("v1/versions"));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    // The page works without the list; the question itself shows what is wrong.
    versions = [];
  }
  const chosen = { version: byId("version").value, a: byId("version-a").value, b: byId("version-b").value };
  const names = versions.map(([version]) => version);
  const fallback = { version: "", a: names[0], b: names[1] };
  byId("version").replaceChildren(byId("version").options[0], ...versions.map(option));
  for (const name of ["a", "b"]) byId(`version-${name}`).replaceChildren(...versions.map(option));
  for (const [name, id] of [["version", "version"], ["a", "version-a"], ["b", "version-b"]])
    byId(id).value = names.includes(chosen[name]) ? chosen[name] : (fallback[name] ?? "");
}

async function setComparing() {
  byId("pair").hidden = !comparing.checked;
  byId("version-field").hidden = comparing.checked;
  document.body.classList.toggle("comparing", comparing.checked);
  if (!comparing.checked) return;
  await loadVersions();
  const enough = versions.length > 1;
  const note = byId("pair-note");
  note.hidden = enough;
  note.textContent = versions.length
    ? "Only one version is in use. A second one can be loaded as canary or shadow."
    : "The service does not say which versions are in use.";
  for (const id of ["version-a", "version-b"]) byId(id).disabled = !enough;
}

/** Tells what is wrong with a field, or with "" that nothing is; returns null for its callers. */
function complain(text, field = question) {
  const notice = byId("question-problem");
  notice.textContent = text;
  notice.hidden = !text;
  question.toggleAttribute("aria-invalid", Boolean(text) && field === question);
  if (text) field.focus();
  return null;
}

/** The request's body, or null after telling what is missing. */
function readForm() {
  const body = { question: question.value.trim() };
  if (!body.question) return complain("Type a question first.");
  for (const [id, name, label] of NUMBERS) {
    const input = byId(id);
    if (!input.validity.valid) {
      byId("options").open = true;
      return complain(`${label} must be a whole number from 1 on.`, input);
    }
    if (input.value) body[name] = input.valueAsNumber;
  }
  if (byId("explain").checked) body.explain = true;
  if (comparing.checked) {
    const [a, b] = [byId("version-a").value, byId("version-b").value];
    if (versions.length < 2) return complain("There are no two versions to compare.", comparing);
    if (a === b) return complain("Choose two different versions.", byId("version-b"));
  } else if (byId("version").value) body.version = byId("version").value;
  complain("");
  return body;
}

function setRunning(controller) {
  running = controller;
  button.textContent = controller ? "Stop" : "Ask";
  button.classList.toggle("stop", Boolean(controller));
  form.setAttribute("aria-busy", String(Boolean(controller)));
}

/** Ends the running request, if any; true when there was one. */
export function stop() {
  if (!running) return false;
  running.abort();
  return true;
}

async function askOne(body, signal) {
  const view = new AnswerView("one");
  byId("results").replaceChildren(view.element);
  const answered = await view.run(body, signal, { retry: submit });
  return answered ? `Answered in ${duration(view.result.timings_ms.total)}.` : "";
}

async function askTwo(body, signal) {
  const chosen = [byId("version-a").value, byId("version-b").value];
  const summary = make("p", { class: "difference", role: "status" });
  const views = chosen.map((version, at) => new AnswerView(`version-${at}`, version));
  const columns = make("div", { class: "columns" }, ...views.map((view) => view.element));
  byId("results").replaceChildren(summary, columns);
  const mark = () => {
    const [first, second] = views.map((view) => view.passages.passages);
    if (!first.length || !second.length) return;
    views[0].passages.setChanges(lossesOf(first, second));
    views[1].passages.setChanges(changesOf(first, second));
  };
  const runs = views.map((view, at) => view.run({ ...body, version: chosen[at] }, signal, { onpassages: mark }));
  const answered = await Promise.all(runs);
  if (!answered.every(Boolean)) return "";
  mark();
  const longest = Math.max(...views.map((view) => view.result.timings_ms.total));
  for (const view of views) view.scaleTimings(longest);
  summary.textContent = differenceInWords(views[0].result, views[1].result);
  return "Both versions have answered.";
}

async function submit() {
  if (running) return;
  const body = readForm();
  if (!body) return;
  const controller = new AbortController();
  setRunning(controller);
  byId("ask-empty").hidden = true;
  status.textContent = "Asking.";
  try {
    const outcome = await (comparing.checked ? askTwo : askOne)(body, controller.signal);
    status.textContent = outcome;
    if (controller.signal.aborted) showStopped();
  } finally {
    setRunning(null);
  }
}

function showStopped() {
  status.textContent = "Stopped.";
  byId("results").prepend(make("p", { class: "stopped" }, "Stopped before the answer was complete."));
}

/** Grows with what is typed, up to the height that the style sheet allows. */
function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

export function startAsking() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!stop()) submit();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  question.addEventListener("input", () => {
    fit();
    complain("");
  });
  comparing.addEventListener("change", setComparing);
  loadVersions();
}
