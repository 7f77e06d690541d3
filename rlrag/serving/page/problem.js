// Shows a failed request: what happened, and what to do.

import { byId, make } from "./elements.js";

const openSettings = () => byId("settings").showPopover();

function remedy(problem, retry) {
  if (problem.status === 401 || problem.status === 403)
    return make("button", { type: "button", onclick: openSettings }, "Enter an API key");
  return retry ? make("button", { type: "button", onclick: retry }, "Try again") : null;
}

function footnote({ status, requestId, retryAfter }) {
  const parts = [
    status && `Status ${status}`,
    requestId && `request ${requestId}`,
    retryAfter && `the service asks to wait ${retryAfter} s`,
  ];
  return parts.filter(Boolean).join(" · ");
}

const fieldError = ({ field, message }) => make("li", {}, `${field}: ${message}`);

/** The notice; `retry` is called by its button. */
export function problemNotice(problem, retry = null) {
  const note = footnote(problem);
  return make(
    "div",
    { class: "problem", role: "alert" },
    make("h2", {}, problem.message),
    problem.detail ? make("p", {}, problem.detail) : null,
    problem.errors.length ? make("ul", {}, ...problem.errors.map(fieldError)) : null,
    note ? make("p", { class: "note" }, note) : null,
    remedy(problem, retry),
  );
}
