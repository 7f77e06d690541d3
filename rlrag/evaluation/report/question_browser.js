// The packed questions of the page in; a list of them that is compared, sorted and searched, out.
// Everything that comes from a run becomes text nodes, never markup.
"use strict";

(async () => {
  const PAGE_SIZE = 20;
  const MEASURES = { f1: "F1", em: "EM", contained: "contained" };
  const ORDERS = {
    gains: (change) => -change,
    losses: (change) => change,
    changes: (change) => -Math.abs(change),
    file: () => 0,
  };
  const byId = (id) => document.getElementById(id);

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  async function unpacked() {
    const packed = Uint8Array.from(atob(byId("question-data").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  const number = (value) => (value === null ? "–" : value.toFixed(2));
  const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(value).toFixed(2)}`;

  let data;
  try {
    data = await unpacked();
  } catch (error) {
    byId("question-note").textContent = `This browser cannot show the single questions: ${error}`;
    return;
  }

  const controls = Object.fromEntries(
    ["run", "ours", "theirs", "measure", "order", "change", "type", "search"].map((name) => [
      name,
      byId(`question-${name}`),
    ]),
  );
  let run = null;
  let texts = [];
  let shown = [];
  let page = 0;

  function setOptions(select, values, chosen) {
    select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
    if (chosen !== undefined) select.value = String(chosen);
  }

  /** Fill what can be chosen from what the run has. */
  function openRun() {
    run = data.runs[Number(controls.run.value)];
    const names = run.systems.map((name, at) => [at, name]);
    const named = (...wanted) => {
      const found = wanted.map((name) => run.systems.indexOf(name)).filter((at) => at >= 0);
      return found[0] ?? run.systems.length - 1;
    };
    setOptions(controls.ours, names, named("trained", "tuned_retriever"));
    setOptions(controls.theirs, names, named("retriever_order", "original_retriever", run.systems[0]));
    const types = [...new Set(run.questions.map((question) => question.type ?? ""))].sort();
    setOptions(controls.type, [["*", "all"], ...types.map((type) => [`=${type}`, type || "without a type"])]);
    byId("question-type-field").hidden = types.length < 2;
    texts = run.questions.map((question) =>
      [question.id, question.question, ...question.golden, ...question.answers.map((given) => given.answer ?? "")]
        .join("\n")
        .toLowerCase(),
    );
  }

  const scoreOf = (question, system) => question.answers[system][controls.measure.value];

  /** Ours minus theirs; null where one of them gave no answer. */
  function changeOf(question) {
    const ours = scoreOf(question, controls.ours.value);
    const theirs = scoreOf(question, controls.theirs.value);
    return ours === null || theirs === null ? null : ours - theirs;
  }

  function kindOf(change) {
    if (change === null) return "unanswered";
    return Math.abs(change) < 1e-9 ? "same" : change > 0 ? "gained" : "lost";
  }

  function update() {
    const words = controls.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const type = controls.type.value;
    const counts = { gained: 0, lost: 0, same: 0, unanswered: 0 };
    shown = [];
    run.questions.forEach((question, at) => {
      if (type !== "*" && `=${question.type ?? ""}` !== type) return;
      if (!words.every((word) => texts[at].includes(word))) return;
      const change = changeOf(question);
      const kind = kindOf(change);
      counts[kind] += 1;
      if (controls.change.value === "all" || controls.change.value === kind) shown.push({ question, change, at });
    });
    const order = ORDERS[controls.order.value];
    const last = Number.POSITIVE_INFINITY; // what was not answered comes after the rest
    const key = ({ change }) => (change === null && controls.order.value !== "file" ? last : order(change));
    shown.sort((a, b) => (key(a) === key(b) ? a.at - b.at : key(a) - key(b)));
    const told = Object.entries(counts).filter(([kind, count]) => count || kind !== "unanswered");
    byId("question-status").textContent =
      `${shown.length} of ${run.questions.length} questions. Of those that match: ` +
      `${told.map(([kind, count]) => `${count} ${kind}`).join(", ")}.`;
    page = 0;
    turnPage(0);
  }

  function turnPage(by) {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE_SIZE));
    page = Math.min(Math.max(page + by, 0), pages - 1);
    const part = shown.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    byId("question-list").replaceChildren(...part.map(questionView));
    byId("question-page").textContent = `Page ${page + 1} of ${pages}`;
    // Not `disabled`, which would take the focus away from the button that was just pressed.
    byId("question-previous").setAttribute("aria-disabled", String(page === 0));
    byId("question-next").setAttribute("aria-disabled", String(page === pages - 1));
  }

  /** One line, which opens; what is in it is made when it is opened first. */
  function questionView({ question, change }) {
    const kind = kindOf(change);
    const scores = [controls.theirs, controls.ours].map((select) => number(scoreOf(question, select.value)));
    const title = make(
      "summary",
      {},
      make("span", { class: `change ${kind}` }, change === null ? "none" : signed(change)),
      make("span", { class: "asked", dir: "auto" }, question.question),
      make("span", { class: "scores" }, `${MEASURES[controls.measure.value]} ${scores.join(" → ")}`),
    );
    const details = make("details", { class: "question" }, title);
    details.addEventListener("toggle", () => details.append(...questionParts(question)), { once: true });
    return make("li", {}, details);
  }

  function questionParts(question) {
    const gold = new Set(question.gold.filter((one) => typeof one === "number"));
    const parts = [
      make("p", { class: "facts" }, `${question.id}${question.type ? `, ${question.type}` : ""}`),
      fact("Golden answers", question.golden.length ? question.golden.join(" | ") : "none: it has no answer"),
      answerTable(question, gold),
    ];
    for (const [name, found] of Object.entries(question.retrieved)) {
      parts.push(foundView(name, found, gold));
    }
    const all = new Set(Object.values(question.retrieved).flat());
    const missed = question.gold.filter((one) => !all.has(one)).map((one) => data.passages[one]?.[0] ?? one);
    if (missed.length) parts.push(fact("Gold passages that were not retrieved", missed.join(", ")));
    return parts;
  }

  const fact = (name, text) => make("p", {}, make("b", {}, `${name}: `), make("span", { dir: "auto" }, text));

  function passageName(at) {
    const [id, title] = data.passages[at];
    return title || id;
  }

  const goldMark = () => make("span", { class: "gold" }, "gold");

  function pathView(path) {
    if (!path.length) return null;
    const turns = path.map(([action, passage, query, numFound]) => {
      const about = passage === null ? query : passageName(passage);
      const found = numFound ? ` (found ${numFound})` : "";
      return make("li", { dir: "auto" }, `${action}${about ? `: ${about}` : ""}${found}`);
    });
    return make("details", {}, make("summary", {}, "path"), make("ol", { class: "picks" }, ...turns));
  }

  function answerTable(question, gold) {
    const head = ["system", "answer", "EM", "F1", "contained", "picked, in order"];
    const compared = [controls.ours.value, controls.theirs.value];
    const rows = question.answers.map((given, at) => {
      const picks = given.picked.map((pick) =>
        make("li", { dir: "auto" }, passageName(pick), gold.has(pick) ? " " : null, gold.has(pick) ? goldMark() : null),
      );
      const answer = given.error === null ? given.answer || "(empty)" : `no answer: ${given.error}`;
      return make(
        "tr",
        compared.includes(String(at)) ? { class: "compared" } : {},
        make("th", { scope: "row" }, run.systems[at]),
        make("td", { class: given.answer ? "answer" : "answer none", dir: "auto" }, answer),
        ...["em", "f1", "contained"].map((measure) => make("td", {}, number(given[measure]))),
        make("td", {}, picks.length ? make("ol", { class: "picks" }, ...picks) : "–", pathView(given.path)),
      );
    });
    return make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Answers of each system" },
      make(
        "table",
        { class: "prose answers" },
        make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...rows),
      ),
    );
  }

  function foundView(name, found, gold) {
    const items = found.map((at) => {
      const mark = gold.has(at) ? [" ", goldMark()] : [];
      const [, , text] = data.passages[at];
      const title = make("summary", { dir: "auto" }, passageName(at), ...mark);
      return make("li", {}, make("details", {}, title, make("p", { class: "passage", dir: "auto" }, text)));
    });
    const count = found.filter((at) => gold.has(at)).length;
    const told = `${found.length} passages found by ${name === "retriever" ? "the retriever" : name}, ${count} gold`;
    return make("details", { class: "found" }, make("summary", {}, told), make("ol", {}, ...items));
  }

  setOptions(controls.run, data.runs.map(({ name }, at) => [at, name]));
  byId("question-run-field").hidden = data.runs.length < 2;
  controls.run.addEventListener("change", () => {
    openRun();
    update();
  });
  for (const name of ["ours", "theirs", "measure", "order", "change", "type"]) {
    controls[name].addEventListener("change", update);
  }
  controls.search.addEventListener("input", update);
  byId("question-controls").addEventListener("submit", (event) => event.preventDefault());
  byId("question-previous").addEventListener("click", () => turnPage(-1));
  byId("question-next").addEventListener("click", () => turnPage(1));
  openRun();
  update();
  byId("question-note").hidden = true;
  byId("question-browser").hidden = false;
})();
