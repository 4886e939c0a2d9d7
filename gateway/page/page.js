// Polls status.json and shows the answer. A status that does not come leaves the last one on the page, with its age.

const POLL_MS = 1000, ANSWER_MS = 10000, HISTORY = 120;
const drawnOf = new Map(), history = [];
let answeredMs = null, problem = null;

function at(id) {
  return document.getElementById(id);
}

/** Draws a part of the page only if what it shows has changed, so that it can be selected and scrolled. */
function redraw(id, draw, ...shown) {
  const key = JSON.stringify(shown);
  if (drawnOf.get(id) === key) return;
  drawnOf.set(id, key);
  at(id).replaceChildren(...draw(...shown));
}

function drawEvents(events) {
  return events.toReversed().map((event) => {
    const when = new Date(event.unix_s * 1000);
    const time = make("time", { text: when.toLocaleTimeString("en-GB"), title: when.toLocaleString() });
    return make(
      "li",
      {},
      time,
      make("span", { className: event.kind, text: event.kind }),
      make("span", { className: "subject", text: event.subject }),
      make("span", { className: "detail", text: event.detail }),
    );
  });
}

function drawHistory(perS) {
  if (perS === null) return;
  history.push(perS);
  if (history.length > HISTORY) history.shift();
  const most = Math.max(1, ...history);
  const points = history.map((rate, i) => `${HISTORY - history.length + i},${(23 - (22 * rate) / most).toFixed(1)}`);
  document.querySelector("#history polyline").setAttribute("points", points.join(" "));
}

function draw(status) {
  const { pool } = status;
  document.title = `${status.model} · Farshore`;
  at("model").textContent = `${status.model} · ${status.dtype}, KV as ${status.kv_format} · version ${status.version}`;
  at("rate").textContent = perSecond(status.tokens_per_s);
  drawHistory(status.tokens_per_s);
  at("running").textContent = count(status.running);
  at("queued").textContent = `${count(status.waiting)} waiting, ${count(status.parked)} parked`;
  at("used").textContent = bytes(pool.budget_bytes - pool.free_bytes);
  at("budget").textContent = `held of ${bytes(pool.budget_bytes)}`;
  redraw("pool", memory, pool);
  redraw("workers", drawWorkers, status.workers, status.workers_left_out);
  redraw("sequences", drawSequences, status.sequences, status.sequences_left_out);
  redraw("events", drawEvents, status.events);
}

function showAge() {
  const old = answeredMs !== null && Math.floor((performance.now() - answeredMs) / 1000);
  at("age").textContent = old === false ? "no status yet" : old < 2 ? "live" : `as it was ${some(old, "second")} ago`;
  document.body.classList.toggle("stale", problem !== null);
  at("problem").hidden = problem === null;
  const said = problem === null ? "" : `No status: ${problem}`;
  // Set again, the same text would be read out again.
  if (at("problem").textContent !== said) at("problem").textContent = said;
}

async function ask() {
  const signal = AbortSignal.timeout(ANSWER_MS);
  const answer = await fetch("status.json", { cache: "no-store", signal }).catch(() => {
    throw new Error("the gateway does not answer");
  });
  const body = await answer.json().catch(() => null);
  if (!answer.ok || body === null) throw new Error(body?.error?.message ?? `HTTP ${answer.status}`);
  return body;
}

async function poll() {
  try {
    draw(await ask());
    answeredMs = performance.now();
    problem = null;
  } catch (error) {
    problem = error.message;
  }
  showAge();
}

/** One poll after the other, while the page can be seen. */
async function watch() {
  if (!document.hidden) await poll();
  setTimeout(watch, POLL_MS);
}

setInterval(showAge, 1000);
watch();
