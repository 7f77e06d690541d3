// Shows in words how two answers to one question differ.

/**
 * How each passage of the second list stands against the first, by id: {kind, text} with kind
 * `same`, `up`, `down` or `new`.
 */
export function changesOf(first, second) {
  const place = new Map(first.map(({ id }, at) => [id, at]));
  return second.map(({ id }, at) => {
    if (!place.has(id)) return { kind: "new", text: "new" };
    const steps = place.get(id) - at;
    if (steps === 0) return { kind: "same", text: "same place" };
    return steps > 0 ? { kind: "up", text: `↑ up ${steps}` } : { kind: "down", text: `↓ down ${-steps}` };
  });
}

/** For each passage of the first list: {kind: "gone"} where the second lacks it, else null. */
export function lossesOf(first, second) {
  const kept = new Set(second.map(({ id }) => id));
  return first.map(({ id }) => (kept.has(id) ? null : { kind: "gone", text: "gone" }));
}

const plain = (answer) => answer.trim().toLocaleLowerCase().replace(/[.\s]+$/, "");

/** One sentence on the answers, one on the passages. */
export function differenceInWords(first, second) {
  const answers =
    plain(first.answer) === plain(second.answer) ? "Both give the same answer." : "The answers differ.";
  const changes = changesOf(first.passages, second.passages);
  const tally = (...kinds) => changes.filter(({ kind }) => kinds.includes(kind)).length;
  const losses = lossesOf(first.passages, second.passages).filter(Boolean).length;
  if (!losses && tally("same") === changes.length) return `${answers} Same passages in the same order.`;
  const kept = tally("same", "up", "down");
  const moved = tally("up", "down");
  return `${answers} Passages: ${kept} in both (${moved} moved), ${tally("new")} new, ${losses} gone.`;
}
