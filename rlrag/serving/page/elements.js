// Makes page elements and readable numbers. Data becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.setAttribute("class", value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element; `onclick` and the like are functions, children are elements or text. */
export const make = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** The same for a drawing. */
export const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** A part from 0 to 1 as the custom property `--part`, which the style sheet turns into a length. */
export function withPart(element, part) {
  element.style.setProperty("--part", Math.min(Math.max(part, 0), 1).toFixed(4));
  return element;
}

/** A table with a caption for screen readers; rows are arrays whose first cell heads the row. */
export function table(caption, head, rows) {
  return make(
    "table",
    {},
    make("caption", { class: "unseen" }, caption),
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
    make(
      "tbody",
      {},
      ...rows.map(([first, ...others]) =>
        make("tr", {}, make("th", { scope: "row" }, first), ...others.map((cell) => make("td", {}, cell))),
      ),
    ),
  );
}

/** 4.21 -> "4.2 ms", 236.4 -> "236 ms", 1240 -> "1.24 s". */
export function duration(ms) {
  if (!Number.isFinite(ms)) return "–";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/** 0.42 -> "42 %", 0.0625 -> "6.3 %", 0.0004 -> "< 0.1 %"; only a certain 1 is "100 %". */
export function percent(part) {
  if (!Number.isFinite(part)) return "–";
  if (part > 0 && part < 0.001) return "< 0.1 %";
  if (part > 0.999 && part < 1) return "> 99.9 %";
  const digits = (part > 0 && part < 0.0995) || (part >= 0.995 && part < 1) ? 1 : 0;
  return `${(part * 100).toFixed(digits)} %`;
}

/** 12400 -> "12,400". */
export const count = (number) =>
  Number.isFinite(number) ? number.toLocaleString("en", { maximumFractionDigits: 0 }) : "–";

/** A number with a minus sign in place of a hyphen: by digits behind the point, or of all. */
export const fixed = (number, digits) => number.toFixed(digits).replace("-", "−");
export const rounded = (number, digits) => number.toPrecision(digits).replace("-", "−");
