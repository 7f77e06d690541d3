// The two buttons that send feedback on an answer.

import { Problem, sendFeedback } from "./api.js";
import { draw, make } from "./elements.js";

const THUMB = "M3 9h3v8H3zM6 9l4-7c1.4 0 2.2 1 2 2.3L11.5 8H16c1.2 0 2 1 1.7 2.1l-1.4 5.5A2 2 0 0 1 14.4 17H6";

let off = false;

const thumb = (direction) =>
  draw("svg", { class: `icon ${direction}`, viewBox: "0 0 20 20", "aria-hidden": "true" }, draw("path", { d: THUMB }));

/** The buttons, or nothing where the service has said that it records no feedback. */
export function feedbackView(requestId) {
  if (off) return null;
  const note = make("span", { class: "note", role: "status" });
  const buttons = {};
  const view = make("div", { class: "feedback", role: "group", "aria-label": "Was this answer right?" }, note);
  const give = async (thumbs) => {
    const chosen = buttons[thumbs];
    try {
      await sendFeedback(requestId, thumbs);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      off = error.type === "urn:rlrag:feedback-off";
      note.textContent = off ? "This service records no feedback." : `Not recorded: ${error.message}.`;
      if (off) for (const button of Object.values(buttons)) button.remove();
      return;
    }
    for (const button of Object.values(buttons)) button.setAttribute("aria-pressed", button === chosen);
    note.textContent = "Recorded, thank you.";
  };
  for (const [thumbs, label] of [["up", "Right answer"], ["down", "Wrong answer"]]) {
    const attributes = { type: "button", class: "quiet", "aria-pressed": "false", "aria-label": label, title: label };
    buttons[thumbs] = make("button", { ...attributes, onclick: () => give(thumbs) }, thumb(thumbs));
    view.append(buttons[thumbs]);
  }
  return view;
}
