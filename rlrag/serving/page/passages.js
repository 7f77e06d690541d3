// The list of picked passages: why each was picked, and where the answer is in it.

import { make, percent, rounded, withPart } from "./elements.js";

const EXCERPT_CHARS = 320;
const BEFORE_MATCH = 110;
const MAX_WORDS = 40;

/** A pattern that finds these words, whatever stands between them, but never a part of a word. */
function wordsPattern(words) {
  const escaped = words.map((word) => word.replaceAll(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"));
  return new RegExp(`(?<![\\p{L}\\p{N}])${escaped.join("[^\\p{L}\\p{N}]+")}(?![\\p{L}\\p{N}])`, "giu");
}

/** Numbers and capitalised words are what an answer usually turns on. */
const isTelling = (words) => words.some((word) => /\p{N}|^\p{Lu}.{3}/u.test(word));

/**
 * The pattern of the answer as it stands in a text: all of it, or the longest run of its words that
 * occurs there and holds a number or a name. Null where there is none.
 */
export function answerPattern(answer, text) {
  const words = answer.match(/[\p{L}\p{N}](?:\S*[\p{L}\p{N}])?/gu)?.slice(0, MAX_WORDS) ?? [];
  for (let length = words.length; length > 0; length--) {
    for (let start = 0; start + length <= words.length; start++) {
      const run = words.slice(start, start + length);
      if (length < words.length && !isTelling(run)) continue;
      const pattern = wordsPattern(run);
      if (text.search(pattern) >= 0) return pattern;
    }
  }
  return null;
}

/** Text as nodes, with what the pattern finds in <mark>. */
function marked(text, pattern) {
  if (!pattern) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    nodes.push(text.slice(end, match.index), make("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

/** The part of a long text that shows the first match, cut between words. */
function excerpt(text, pattern) {
  const match = pattern ? Math.max(text.search(pattern), 0) : 0;
  let start = match < EXCERPT_CHARS - BEFORE_MATCH ? 0 : match - BEFORE_MATCH;
  if (start > 0) start = text.indexOf(" ", start) + 1;
  const end = text.lastIndexOf(" ", start + EXCERPT_CHARS);
  const stop = end > start ? end : start + EXCERPT_CHARS;
  return `${start > 0 ? "… " : ""}${text.slice(start, stop)} …`;
}

/** One passage; `element` goes into the page. */
class PassageItem {
  #passage;
  #title = make("h3", {});
  #body = make("p", { class: "passage-text" });
  #change = make("span", { class: "change", hidden: true });
  #toggle = null;
  #pattern = null;
  #open = false;

  constructor(passage, rank, prefix) {
    this.#passage = passage;
    this.#body.id = `${prefix}-passage-${rank}`;
    if (passage.text.length > EXCERPT_CHARS * 1.2) this.#toggle = this.#makeToggle();
    this.element = make(
      "li",
      { class: "passage", "data-id": passage.id },
      make("span", { class: "rank", "aria-hidden": "true" }, String(rank)),
      make(
        "div",
        { class: "passage-main" },
        make("div", { class: "passage-head" }, this.#title, this.#change),
        this.#body,
        this.#toggle,
      ),
      this.#facts(),
    );
    this.show();
  }

  #makeToggle() {
    const onclick = () => {
      this.#open = !this.#open;
      this.show();
    };
    return make("button", { type: "button", class: "link", "aria-controls": this.#body.id, onclick });
  }

  #facts() {
    const { selection_prob: prob, retriever_score: score, id } = this.#passage;
    const bar = withPart(make("span", { class: "meter", "aria-hidden": "true" }), prob);
    return make(
      "dl",
      { class: "facts" },
      make("div", { class: "prob" }, make("dt", {}, "Probability"), make("dd", {}, percent(prob), bar)),
      make("div", {}, make("dt", {}, "Retriever score"), make("dd", {}, score === null ? "found on the path" : rounded(score, 4))),
      make("div", {}, make("dt", {}, "Passage"), make("dd", { class: "id" }, id)),
    );
  }

  show() {
    const { title, text } = this.#passage;
    this.#title.replaceChildren(...marked(title || "Untitled", this.#pattern));
    const shown = this.#toggle && !this.#open ? excerpt(text, this.#pattern) : text;
    this.#body.replaceChildren(...marked(shown, this.#pattern));
    if (!this.#toggle) return;
    this.#toggle.textContent = this.#open ? "Show less" : "Show all";
    this.#toggle.setAttribute("aria-expanded", String(this.#open));
    this.#toggle.setAttribute("aria-label", `${this.#toggle.textContent} of ${title || "the text"}`);
  }

  markAnswer(answer) {
    this.#pattern = answerPattern(answer, this.#passage.text);
    this.show();
  }

  /** `change` is {kind, text} of compare.js, or null. */
  setChange(change) {
    this.#change.hidden = !change;
    if (!change) return;
    this.#change.textContent = change.text;
    this.#change.dataset.kind = change.kind;
    this.element.dataset.kind = change.kind;
  }
}

/** The passages of one answer; `element` goes into the page, `passages` are those shown. */
export class PassageList {
  passages = [];
  #items = [];
  #list = make("ol", { class: "passages" });
  #prefix;

  constructor(prefix) {
    this.#prefix = prefix;
    this.element = make(
      "section",
      { class: "picked", "aria-label": "Passages", hidden: true },
      make("h2", {}, "Passages"),
      make(
        "p",
        { class: "note" },
        "In the order picked. The bar is the probability of each pick, given those before it.",
      ),
      this.#list,
    );
  }

  show(passages) {
    this.passages = passages;
    this.#items = passages.map((passage, at) => new PassageItem(passage, at + 1, this.#prefix));
    this.#list.replaceChildren(...this.#items.map((item) => item.element));
    this.element.hidden = passages.length === 0;
  }

  markAnswer(answer) {
    for (const item of this.#items) item.markAnswer(answer);
  }

  setChanges(changes) {
    this.#items.forEach((item, at) => item.setChange(changes[at]));
  }
}
