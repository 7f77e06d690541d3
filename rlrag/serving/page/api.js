// Calls the service's API: JSON answers and streams of events.

const KEY = "rlrag.api-key";
const READ_TIMEOUT_MS = 10_000;

/** What went wrong, in the words of the service (application/problem+json) where it gave some. */
export class Problem extends Error {
  constructor({ title, detail = "", status = 0, request_id = "", type = "", errors = null }, retryAfter = null) {
    super(title);
    Object.assign(this, { detail, status, type, retryAfter, requestId: request_id, errors: errors ?? [] });
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

async function problemOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const isProblem = response.headers.get("Content-Type")?.startsWith("application/problem+json");
  if (isProblem) return new Problem(await response.json(), retryAfter);
  const title = `The service answered with status ${response.status}`;
  return new Problem({ title, detail: response.statusText, status: response.status }, retryAfter);
}

/** A response with a status that says success; everything else is thrown as a Problem. */
async function send(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    const detail = "No connection could be made. Is it still running?";
    throw new Problem({ title: "The service cannot be reached", detail });
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** What `read` makes of the response, within a bounded time. */
async function sendBriefly(path, read, body = undefined) {
  try {
    return await read(await send(path, { body, signal: AbortSignal.timeout(READ_TIMEOUT_MS) }));
  } catch (error) {
    if (error.name !== "TimeoutError") throw error;
    const detail = `${path} took longer than ${READ_TIMEOUT_MS / 1000} s.`;
    throw new Problem({ title: "The service did not answer in time", detail });
  }
}

export const getJson = (path) => sendBriefly(path, (response) => response.json());
export const getText = (path) => sendBriefly(path, (response) => response.text());
export const sendFeedback = (requestId, thumbs) =>
  sendBriefly("v1/feedback", () => null, { request_id: requestId, thumbs });

/** Cuts server-sent events out of text that arrives in arbitrary pieces. */
export class EventReader {
  #rest = "";

  /** The events that `text` completes, each as {event, data} with data parsed from JSON. */
  push(text) {
    // A carriage return at the end may be half of a line end; it waits for what follows.
    const all = this.#rest + text;
    const held = all.endsWith("\r") ? "\r" : "";
    const blocks = all.slice(0, all.length - held.length).replaceAll(/\r\n?/g, "\n").split("\n\n");
    this.#rest = blocks.pop() + held;
    return blocks.map(readEvent).filter((event) => event !== null);
  }
}

function readEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (name === "event") event = value;
    if (name === "data") data.push(value);
  }
  return data.length ? { event, data: JSON.parse(data.join("\n")) } : null;
}

/**
 * Asks, and calls `on.passages(list)`, `on.turn(turn)`, `on.token(text)` and `on.answer(whole)` as
 * they arrive.
 * Throws a Problem when the service reports one or breaks off; an AbortError when cancelled.
 */
export async function ask(body, on, signal) {
  const response = await send("v1/answer", { body: { ...body, stream: true }, signal });
  const events = new EventReader();
  const decoder = new TextDecoder();
  const stream = response.body.getReader();
  let answered = false;
  for (;;) {
    const { done, value } = await readPiece(stream, signal);
    if (done) break;
    for (const { event, data } of events.push(decoder.decode(value, { stream: true }))) {
      if (event === "error") throw new Problem(data);
      if (event === "passages") on.passages(data.passages);
      if (event === "turn") on.turn(data);
      if (event === "token") on.token(data.text);
      if (event === "answer") {
        answered = true;
        on.answer(data);
      }
    }
  }
  if (!answered) throw brokenOff();
}

async function readPiece(stream, signal) {
  try {
    return await stream.read();
  } catch (error) {
    throw signal.aborted ? error : brokenOff();
  }
}

const brokenOff = () =>
  new Problem({
    title: "The answer broke off",
    detail: "The connection ended before the answer was complete. Ask again.",
  });
