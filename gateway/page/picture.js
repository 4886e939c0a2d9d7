"use strict";
// Draws the pool: memory, workers by node, and which worker holds what of each sequence. Every text goes through
// textContent: names of hosts and workers are not ours.

const MOST_LANE_PX = 56, LEAST_LANE_PX = 22, GROUP_PX = 9, LEAST_LANE = 0.03;
const hues = new Map();

function make(tag, options = {}, ...children) {
  const { text, ...properties } = options;
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function count(number) {
  return number.toLocaleString("en");
}

function some(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  for (; number >= 1024 && unit < units.length - 1; unit++) number /= 1024;
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

function perSecond(number) {
  return number === null ? "–" : number < 100 ? number.toFixed(1) : count(Math.round(number));
}

/** Gives an element the colour of a worker. Neighbours in the order of arrival differ most. */
function colour(element, worker) {
  if (!hues.has(worker)) hues.set(worker, (255 + hues.size * 137.5) % 360);
  element.classList.add("coloured");
  element.style.setProperty("--hue", hues.get(worker).toFixed(1));
  return element;
}

function memory({ budget_bytes: budget, free_bytes: free, cached_bytes: cached }) {
  const bar = make("div", { className: "bar", ariaHidden: "true" });
  for (const [kind, part] of [["held", budget - free], ["cached", cached]]) {
    const piece = make("div", { className: kind });
    piece.style.width = `${budget ? (100 * part) / budget : 0}%`;
    bar.append(piece);
  }
  const text = `${bytes(budget - free)} held, ${bytes(cached)} cached, ${bytes(free - cached)} free`;
  return [bar, make("p", { className: "memory", text })];
}

function workerCard(worker) {
  const dense = worker.kind === "dense";
  const card = make(
    "article",
    { className: `worker ${worker.state}` },
    make(
      "h4",
      {},
      make("span", { className: "swatch" }),
      make("span", { className: "name", text: worker.worker_id }),
      make("span", { className: `state ${worker.state}`, text: worker.state, title: `${worker.kind} worker` }),
    ),
  );
  const alarms = worker.failure ? [worker.failure] : [];
  if (worker.state !== "unreachable" && worker.state !== "failed") {
    card.append(...memory(worker));
    const does = dense
      ? [`${perSecond(worker.tokens_per_s)} tokens/s`, `${worker.running} running`, `${worker.waiting} waiting`]
      : [];
    if (worker.parked) does.push(`${worker.parked} parked`);
    const read = worker.attended_bytes_per_s;
    if (!dense) does.push(`KV read ${read === null ? "–" : `${bytes(read)}/s`}`);
    if (worker.p99_ms !== null) does.push(`p99 ${Number(worker.p99_ms.toPrecision(3))} ms`);
    card.append(make("p", { className: "does", text: does.join(" · ") }));
    if (worker.slow) alarms.push("slower than the others");
    if (worker.failures) alarms.push(some(worker.failures, "late or lost answer"));
  }
  if (alarms.length) card.append(make("p", {}, make("span", { className: "alarm", text: alarms.join(" · ") })));
  return colour(card, worker.worker_id);
}

function drawWorkers(workers, leftOut) {
  const nodes = new Map();
  for (const worker of workers) {
    const host = worker.host || "unknown node";
    nodes.set(host, [...(nodes.get(host) ?? []), worker]);
  }
  const drawn = [...nodes].map(([host, its]) => {
    const cards = make("div", { className: "cards" }, ...its.map(workerCard));
    return make("div", { className: "node" }, make("h3", { text: host }), cards);
  });
  if (!drawn.length) drawn.push(make("p", { className: "none", text: "No workers." }));
  if (leftOut) drawn.push(make("p", { className: "none", text: `And ${some(leftOut, "more worker")}.` }));
  return drawn;
}

/** A rectangle of a lane. All are parts of 1: left, width, top, height. */
function rectangle(className, worker, title, [left, width, top, height]) {
  const made = make("div", { className, title });
  for (const [name, part] of Object.entries({ left, width, top, height })) made.style[name] = `${100 * part}%`;
  return colour(made, worker);
}

function sequenceRow(sequence, longest) {
  const { tokens, spans, tail_first: tailFirst, owner } = sequence;
  const length = Math.max(tokens, ...spans.map((span) => span.last), 1);
  const groups = Math.max(1, ...spans.map((span) => span.group1));
  // Spans are granted for the whole prompt before it is computed.
  const computing = tokens < tailFirst;
  const lane = make("div", { className: computing ? "lane computing" : "lane" });
  lane.style.width = `${100 * Math.max(LEAST_LANE, length / longest)}%`;
  lane.style.height = `${Math.min(MOST_LANE_PX, Math.max(LEAST_LANE_PX, groups * GROUP_PX))}px`;
  for (const { worker_id: worker, first, last, group0, group1, bytes: size } of spans) {
    const where = `${worker}: tokens ${count(first)} to ${count(last)}, groups ${group0} to ${group1}, ${bytes(size)}`;
    const place = [first / length, (last - first) / length, group0 / groups, (group1 - group0) / groups];
    lane.append(rectangle("span", worker, where, place));
  }
  if (tokens > tailFirst) {
    const where = `${owner}: the tail, tokens ${count(tailFirst)} to ${count(tokens)}`;
    lane.append(rectangle("tail", owner, where, [tailFirst / length, (tokens - tailFirst) / length, 0, 1]));
  }
  const holders = new Set(spans.map((span) => span.worker_id)).size;
  const facts = computing
    ? [`a prompt of ${some(tailFirst, "token")} or more, being computed`]
    : [some(tokens, "token"), `${count(tokens - tailFirst)} in the tail`];
  if (holders) facts.push(`${some(spans.length + sequence.spans_left_out, "span")} on ${some(holders, "worker")}`);
  if (sequence.spans_left_out) facts.push(`${count(sequence.spans_left_out)} spans not drawn`);
  facts.push(`engine ${owner}`);
  lane.role = "img";
  lane.ariaLabel = facts.join(", ");
  const name = make("code", { text: sequence.sequence_id });
  const title = make("h4", {}, name, make("small", { text: facts.join(" · ") }));
  return make("article", { className: "sequence" }, title, lane);
}

function drawSequences(sequences, leftOut) {
  const longest = Math.max(1, ...sequences.flatMap(({ tokens, spans }) => [tokens, ...spans.map((span) => span.last)]));
  const drawn = sequences.map((sequence) => sequenceRow(sequence, longest));
  if (!drawn.length) drawn.push(make("p", { className: "none", text: "No sequence has stored KV now." }));
  if (leftOut) drawn.push(make("p", { className: "none", text: `And ${some(leftOut, "shorter sequence")}.` }));
  return drawn;
}
