// Draws the path of an answer whose bundle looks further: turns in order, and what each found.

import { count, make } from "./elements.js";

const EDGES = {
  title_out: "names its title",
  title_in: "is named in it",
  document: "same document",
  shared: "shares a name",
  linked: "answers what it asks",
  own: "edge that was brought",
};

const named = (title) => title || "Untitled";

/** What a turn did: a word for it, and what it is about. */
export function turnInWords({ action, title, query, writer }) {
  if (action === "start") return ["Question", query];
  if (action === "pick") return ["Pick", named(title)];
  if (action === "search") {
    const on = title === undefined ? "" : `, on ${named(title)}`;
    return ["Search", `${query} (query writer ${writer}${on})`];
  }
  return action === "stop" ? ["Stop", ""] : ["Not allowed", ""];
}

/** How a turn came to a passage; `titles` has those of the passages by id. */
export function foundInWords({ by, edge, source }, titles) {
  if (by === "query") return "found by the query";
  if (by === "title") return "named in the question";
  return `hop from ${named(titles.get(source))}: ${EDGES[edge] ?? edge}`;
}

function foundItem(found, titles, picked) {
  return make(
    "li",
    { "data-id": found.id, class: picked.has(found.id) ? "was-picked" : null },
    make("span", { class: "found-title" }, named(found.title)),
    make("span", { class: "note" }, foundInWords(found, titles)),
  );
}

/** The turns of one answer; `element` goes into the page. */
export class PathView {
  #turns = [];
  #list = make("ol", { class: "turns" });

  constructor() {
    this.element = make(
      "section",
      { class: "path", "aria-label": "Path", hidden: true },
      make("h2", {}, "Path"),
      make("p", { class: "note" }, "What was picked and searched in turn, and what each turn found."),
      this.#list,
    );
  }

  add(turn) {
    this.show([...this.#turns, turn]);
  }

  /** `turns` is null where the bundle does not look further. */
  show(turns) {
    this.#turns = turns ?? [];
    const all = this.#turns.flatMap(({ found }) => found);
    const titles = new Map(all.map(({ id, title }) => [id, title]));
    const picks = this.#turns.filter(({ action }) => action === "pick");
    const picked = new Set(picks.map(({ passage_id: id }) => id));
    this.#list.replaceChildren(...this.#turns.map((turn) => this.#item(turn, titles, picked)));
    this.element.hidden = this.#turns.length === 0;
  }

  #item(turn, titles, picked) {
    const [word, about] = turnInWords(turn);
    const items = turn.found.map((found) => foundItem(found, titles, picked));
    const leftOut = turn.num_left_out
      ? make("p", { class: "note" }, `${count(turn.num_left_out)} more found no room.`)
      : null;
    return make(
      "li",
      { class: "turn", "data-kind": turn.action },
      make("p", { class: "turn-head" }, make("b", {}, word), about ? ` ${about}` : null),
      items.length ? make("ul", { class: "found" }, ...items) : null,
      leftOut,
    );
  }
}
