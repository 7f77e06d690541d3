// Shows one answer while it is written, with passages, timings and feedback.

import { Problem, ask } from "./api.js";
import { count, fixed, make, rounded, table } from "./elements.js";
import { feedbackView } from "./feedback.js";
import { PassageList } from "./passages.js";
import { PathView } from "./path.js";
import { problemNotice } from "./problem.js";
import { timingsView } from "./timings.js";

/** The candidates that were not picked, where the service was asked to explain; else null. */
function otherCandidates({ candidates, passages }) {
  const picked = new Set(passages.map(({ id }) => id));
  const rows = (candidates ?? [])
    .map(({ id, title, retriever_score: score }, at) => [id, [String(at + 1), title, rounded(score, 4)]])
    .filter(([id]) => !picked.has(id))
    .map(([, row]) => row);
  if (!rows.length) return null;
  const names = ["Retriever's rank", "Title", "Retriever score"];
  return make(
    "details",
    { class: "others" },
    make("summary", {}, `Candidates not picked: ${rows.length}`),
    table("Candidates that were not picked", names, rows),
  );
}

function requestFacts({ request_id: id, bundle_version: version, answer_logp: logp, cached }, named) {
  const facts = [["Request", id]];
  if (logp !== null) facts.push(["Log-probability", fixed(logp, 2)]);
  if (named) facts.unshift(["Version", version]);
  if (cached) facts.push(["Cache", "answered before"]);
  const rows = facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return make("dl", { class: "facts answer-facts" }, ...rows);
}

/** What the prompt had no room for; null where it shows the passages whole. */
function cutNote({ num_cut_tokens: cut, num_passages: shown, passages }) {
  if (!cut) return null;
  const dropped = shown < passages.length ? ` and shows ${shown} of ${passages.length} passages` : "";
  return make("p", { class: "note cut" }, `The prompt leaves out ${count(cut)} tokens of the passages${dropped}.`);
}

/** `result` is the service's whole answer once it is there; `element` goes into the page. */
export class AnswerView {
  result = null;
  #text = make("p", { class: "answer waiting", "aria-live": "polite", "aria-busy": "true" });
  #feedback = make("div", {});
  #facts = make("div", {});
  #cut = make("div", {});
  #timings = make("div", {});
  #notice = make("div", {});
  #others = make("div", {});

  #heading;
  #path;

  /** `prefix` sets ids apart on the page; `heading` names the version where two are compared. */
  constructor(prefix, heading = null) {
    this.#heading = heading;
    this.passages = new PassageList(prefix);
    this.#path = new PathView();
    this.element = make(
      "article",
      { class: "answer-view" },
      heading && make("h2", { class: "version-name" }, heading),
      this.#notice,
      make("div", { class: "answer-row" }, this.#text, this.#feedback),
      this.#facts,
      this.#cut,
      this.#timings,
      this.passages.element,
      this.#path.element,
      this.#others,
    );
  }

  /** Asks and shows; true when answered. `onpassages` is told when the passages are there. */
  async run(body, signal, { onpassages = () => {}, retry = null } = {}) {
    try {
      await ask(
        body,
        {
          passages: (passages) => {
            this.passages.show(passages);
            onpassages();
          },
          turn: (turn) => this.#path.add(turn),
          token: (text) => this.#write(text),
          answer: (result) => this.#finish(result),
        },
        signal,
      );
      return true;
    } catch (error) {
      this.#stop();
      if (error instanceof Problem) this.#notice.replaceChildren(problemNotice(error, retry));
      else if (!signal.aborted) throw error;
      return false;
    }
  }

  /** Draws the stages so that `longest` milliseconds fill the bar. */
  scaleTimings(longest) {
    this.#timings.replaceChildren(timingsView(this.result.timings_ms, longest));
  }

  #write(text) {
    this.#text.classList.remove("waiting");
    this.#text.classList.add("writing");
    this.#text.append(text);
  }

  #stop() {
    const started = this.#text.textContent !== "";
    this.#text.classList.remove("waiting", "writing");
    this.#text.classList.toggle("unfinished", started);
    this.#text.hidden = !started;
    this.#text.setAttribute("aria-busy", "false");
  }

  #finish(result) {
    this.result = result;
    this.#text.classList.remove("waiting", "writing");
    this.#text.textContent = result.answer || "The generator wrote nothing.";
    this.#text.classList.toggle("unfinished", !result.answer);
    this.#text.setAttribute("aria-busy", "false");
    this.passages.show(result.passages);
    this.#path.show(result.path);
    this.passages.markAnswer(result.answer);
    this.#facts.replaceChildren(requestFacts(result, this.#heading === null));
    this.#cut.replaceChildren(...[cutNote(result)].filter(Boolean));
    this.#feedback.replaceChildren(...[feedbackView(result.request_id)].filter(Boolean));
    this.scaleTimings(result.timings_ms.total);
    const others = otherCandidates(result);
    if (others) this.#others.replaceChildren(others);
  }
}
