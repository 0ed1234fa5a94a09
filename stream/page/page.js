// The page of tsdiff. Names come from whoever sends readings: they are only ever text.
"use strict";

const POLL_MS = 2000;
const SLOW_MS = 10000; // An answer that takes longer is none.
const MOST = 200;
const STATES = ["firing", "recovering", "pending", "stale", "warming", "ok"];
const main = document.getElementById("main");

// -- small things ---------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const clock = (ms) => new Date(ms).toISOString().slice(11, 19).replace(/:00$/, "");
const day = (ms) => new Date(ms).toISOString().slice(0, 10);
const moment = (ms, now) => (day(ms) === day(now) ? clock(ms) : `${day(ms)} ${clock(ms)}`);
const figure = (x) => (x === null ? "–" : x >= 100 ? x.toFixed(0) : x.toFixed(2));
const count = (x) => x.toLocaleString("en");
const link = (entity) => `#/entity/${encodeURIComponent(entity)}`;

function tile(label, value, kind = "") {
  return el("li", kind ? { class: kind } : {}, el("b", {}, value), el("span", { class: "faint" }, label));
}

// Replaces what is there, and leaves the keyboard where it was.
function refill(node, children) {
  const focused = node.contains(document.activeElement) && document.activeElement.dataset.key;
  node.replaceChildren(...children);
  if (focused) node.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

// -- theme ----------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

function stored(value) {
  try { // Storage may be forbidden.
    if (value !== undefined) localStorage.setItem("tsdiff-theme", value);
    return localStorage.getItem("tsdiff-theme");
  } catch { return null; }
}

function setTheme(name) {
  if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
  view?.recolour();
}

function colour(name) { // A chart needs the colour itself, not the name of it.
  const probe = document.getElementById("service");
  probe.style.borderColor = `var(--${name})`;
  const found = getComputedStyle(probe).borderTopColor;
  probe.style.borderColor = "";
  return found;
}

// -- overview -------------------------------------------------------------------------------

function spark(values, trigger) {
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  const top = Math.min(4, Math.max(1.5 * trigger, ...values.map((x) => x ?? 0)));
  const y = (x) => 29 - 27 * Math.min(x, top) / top;
  for (const [key, value] of Object.entries({
    class: "spark", viewBox: "0 0 120 30", preserveAspectRatio: "none", "aria-hidden": "true",
  })) svg.setAttribute(key, value);
  const line = document.createElementNS(ns, "line");
  for (const [key, value] of Object.entries({ x1: 0, x2: 120, y1: y(trigger), y2: y(trigger) })) {
    line.setAttribute(key, value);
  }
  let path = "", pen = false;
  values.forEach((value, i) => {
    if (value !== null) path += `${pen ? "L" : "M"}${(120 * i / Math.max(1, values.length - 1)).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value !== null;
  });
  const curve = document.createElementNS(ns, "path");
  curve.setAttribute("d", path);
  svg.append(line, curve);
  return svg;
}

function reason(entity) {
  const faulty = Object.entries(entity.faulty).map(([name, state]) => `${name} is ${state}`);
  return [...entity.channels, ...faulty].slice(0, 4).join(", ");
}

function entityRow(entity, trigger) {
  const link_ = el("a", { href: link(entity.entity), "data-key": entity.entity },
    el("span", { class: "name", title: entity.entity }, entity.entity),
    el("span", { class: `state ${entity.state}` }, entity.state),
    el("span", { class: "number" }, figure(entity.anomaly_score)),
    spark(entity.spark, trigger),
    el("span", { class: "why faint" }, reason(entity)));
  return el("li", {}, link_);
}

function eventLine(event, now, named) {
  return el("li", {},
    el("span", { class: "faint" }, `${moment(event.timestamp_ms, now)} `),
    el("span", { class: `state ${event.state}` }, event.state), " ",
    named ? el("a", { href: link(event.entity) }, event.summary) : event.summary);
}

class Overview {
  constructor() {
    this.most = 50;
    this.tiles = el("ul", { class: "tiles" });
    this.search = el("input", { type: "search", placeholder: "search by name ( / )", "aria-label": "search entities by name" });
    this.search.addEventListener("input", () => poll());
    this.shown = el("span", { class: "faint" });
    this.more = el("button", { type: "button" }, "show more");
    this.more.addEventListener("click", () => { this.most = MOST; poll(); });
    this.rows = el("ul", { class: "rows" });
    this.events = el("ul", { class: "events" });
    main.replaceChildren(this.tiles,
      el("div", { class: "tools" }, this.search, this.shown, this.more),
      this.rows, el("h2", {}, "Alerts of late"), this.events,
      el("p", { class: "faint" }, "Worst first. A score of 1 is as rare as was asked to be woken for; times are UTC."));
    document.title = "tsdiff";
  }

  url() {
    return `api/overview?most=${this.most}&match=${encodeURIComponent(this.search.value)}`;
  }

  show(data) {
    const service = data.service, states = service.entities;
    this.tiles.replaceChildren(
      ...STATES.filter((state) => states[state] || state === "firing" || state === "ok")
        .map((state) => tile(state, el("span", { class: state }, count(states[state])))),
      ...Object.entries(service.channels).filter(([, n]) => n)
        .map(([state, n]) => tile(`${state} channels`, el("span", { class: state }, count(n)))),
      tile("readings/s", rate("readings", service)),
      tile("behind", `${service.lag_seconds.toFixed(service.lag_seconds < 10 ? 1 : 0)} s`),
      tile("dead letters", count(service.dead_letters)),
      tile("model", service.model ?? "–", "long"));
    const all = Object.values(states).reduce((a, b) => a + b, 0);
    const beyond = all > data.kept ? `; ${count(all - data.kept)} more are beyond metrics.max_entities` : "";
    this.shown.textContent = `${count(data.entities.length)} of ${count(data.matching)}${beyond}`;
    this.more.hidden = data.entities.length >= Math.min(data.matching, MOST);
    refill(this.rows, data.entities.length
      ? data.entities.map((entity) => entityRow(entity, data.trigger))
      : [el("li", {}, el("p", { class: "faint none" }, service.not_ready ?? "nothing here yet"))]);
    refill(this.events, data.events.map((event) => eventLine(event, service.now_ms, true)));
  }

  recolour() {}

  missing() {}
}

// -- one entity -----------------------------------------------------------------------------

let charts = null; // The library, once it is asked for: a promise.

function loadCharts() {
  charts ??= new Promise((resolve, reject) => {
    const script = el("script", { src: "page/plotly.min.js" });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => { charts = null; reject(new Error("no charts")); });
    document.head.append(script);
  });
  return charts;
}

function layout(shapes = [], top = undefined) {
  const axis = { gridcolor: colour("line"), zeroline: false, fixedrange: true, automargin: true };
  return {
    margin: { l: 44, r: 8, t: 4, b: 22 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), size: 11, family: "system-ui, sans-serif" },
    showlegend: false, dragmode: false, hovermode: "x unified",
    hoverlabel: { bgcolor: colour("card"), font: { color: colour("text") } },
    xaxis: { ...axis, type: "date" },
    yaxis: { ...axis, nticks: 4, ...(top === undefined ? {} : { range: [0, top] }) },
    shapes,
  };
}

function stateShapes(data, end) {
  return data.states.map((run, i) => ({ ...run, to_ms: data.states[i + 1]?.from_ms ?? end }))
    .filter((run) => ["pending", "firing", "recovering", "stale"].includes(run.state))
    .map((run) => ({
      type: "rect", xref: "x", yref: "paper", x0: run.from_ms, x1: run.to_ms, y0: 0, y1: 1,
      line: { width: 0 }, opacity: 0.16, layer: "below",
      fillcolor: colour(run.state === "stale" ? "other" : run.state),
    }));
}

class Entity {
  constructor(name) {
    this.name = name;
    this.seen = null;
    this.figures = new Map();
    this.visible = new Set();
    this.state = el("span", { class: "state" });
    this.score = el("span", {});
    this.when = el("span", { class: "faint" });
    this.sentence = el("p", { class: "sentence", "aria-live": "polite" }, "waiting");
    this.note = el("p", { class: "faint" });
    this.scoreChart = el("div", { class: "chart", role: "img", "aria-label": "anomaly score over time" });
    this.history = el("ul", { class: "events" });
    this.events = el("ul", { class: "events" });
    this.search = el("input", { type: "search", placeholder: "channels ( / )", "aria-label": "search channels by name" });
    this.search.addEventListener("input", () => { this.seen = null; poll(); });
    this.shown = el("span", { class: "faint" });
    this.grid = el("div", { class: "charts" });
    main.replaceChildren(
      el("p", {}, el("a", { href: "#/" }, "← all entities")),
      el("div", { class: "head" }, el("h1", {}, name), this.state, this.score, this.when),
      this.sentence, this.note,
      el("figure", { class: "card score" },
        el("figcaption", {}, el("span", { class: "name" }, "anomaly score"), el("span", { class: "faint firing" }, "dashed: threshold")),
        this.scoreChart),
      el("h2", {}, "Channels"),
      el("div", { class: "tools" }, this.search, this.shown, el("span", { class: "faint" },
        el("span", { class: "key observed" }, "observed"), el("span", { class: "key expected" }, "expected"),
        el("span", { class: "key band" }, "90 % band"))),
      this.grid,
      el("h2", {}, "State history"), this.history,
      el("h2", {}, "Alerts"), this.events,
      el("p", { class: "faint" }, "Times are UTC."));
    document.title = `${name} – tsdiff`;
    // Charts out of sight are drawn when they come into it.
    this.watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) this.visible.add(entry.target); else this.visible.delete(entry.target);
        if (entry.isIntersecting) this.draw(entry.target);
      }
    }, { rootMargin: "200px" });
    this.watcher.observe(this.scoreChart);
  }

  url() {
    const seen = this.seen === null ? "" : `&seen=${this.seen}`;
    return `api/entity?name=${encodeURIComponent(this.name)}&match=${encodeURIComponent(this.search.value)}${seen}`;
  }

  missing(data) {
    this.sentence.textContent = `${data.error}${data.service.not_ready ? `: ${data.service.not_ready}` : "; it comes with its next score"}`;
  }

  show(data) {
    if (data.unchanged) return;
    this.seen = data.timestamp_ms;
    this.data = data;
    const now = data.service.now_ms;
    this.state.className = `state ${data.state}`;
    this.state.textContent = data.state;
    this.score.textContent = `score ${figure(data.anomaly_score)}`;
    this.when.textContent = `at ${moment(data.timestamp_ms, now)}`;
    this.sentence.textContent = `${data.summary.replace(/^nothing /, "Nothing ")}.`;
    this.note.textContent = this.notes(data, now).join(". ");
    const width = data.period_ms;
    const xs = data.scores.map((_, i) => data.start_ms + i * width);
    const end = data.start_ms + data.scores.length * width;
    const top = Math.max(1.5 * data.trigger, ...data.scores.map((x) => x ?? 0)) * 1.05;
    this.figures.set(this.scoreChart, () => [
      [{ x: xs, y: data.scores, name: "score", line: { color: colour("text"), width: 1.4 }, mode: "lines" }],
      layout([...stateShapes(data, end), {
        type: "line", xref: "paper", x0: 0, x1: 1, y0: data.trigger, y1: data.trigger,
        line: { color: colour("firing"), width: 1.5, dash: "dash" },
      }], top),
    ]);
    this.showChannels(data, xs);
    const runs = data.states.map((run, i) => ({ ...run, last: i === data.states.length - 1 })).reverse();
    refill(this.history, runs.slice(0, 50).map((run) => el("li", {},
      el("span", { class: "faint" }, `${moment(run.from_ms, now)} `),
      el("span", { class: `state ${run.state ?? "unknown"}` }, run.state ?? "not known"),
      run.last ? " until now" : "")));
    refill(this.events, data.events.length ? data.events.map((event) => eventLine(event, now, false)) : [el("li", {}, "none of late")]);
    for (const chart of this.visible) this.draw(chart);
  }

  notes(data, now) {
    const notes = [];
    if (data.since_ms > data.start_ms) notes.push(`scores since ${moment(data.since_ms, now)}`);
    if (data.channels_since_ms === null) notes.push("channels from the next slot on: they are kept of the worst entities and of those looked at");
    else if (data.channels_since_ms > data.since_ms) notes.push(`channels since ${moment(data.channels_since_ms, now)}`);
    if (data.imputed_ratio > 0) notes.push(`${Math.round(100 * data.imputed_ratio)} % of the last readings are missing`);
    if (!data.service.charts) notes.push("No charts: they need the extra page, pip install 'tsdiff[page]'");
    return notes;
  }

  showChannels(data, xs) {
    const matching = data.channels_matching;
    this.shown.textContent = data.channels.length < matching ? `${data.channels.length} of ${matching}` : "";
    const old = new Map([...this.grid.children].map((node) => [node.dataset.key, node]));
    const nodes = data.channels.map((channel) => {
      const node = old.get(channel.channel) ?? this.channelNode(channel);
      old.delete(channel.channel);
      const [mark, chart] = [node.querySelector(".mark"), node.querySelector(".chart")];
      const alerting = ["pending", "firing", "recovering"].includes(data.state);
      const share = alerting && channel.contribution !== null ? `share ${Math.round(100 * channel.contribution)} %` : "";
      mark.textContent = [channel.state, share].filter(Boolean).join(", ");
      mark.className = `mark ${channel.state ?? "faint"}`;
      if (channel.observed) this.figures.set(chart, () => this.channelFigure(channel, xs));
      return node;
    });
    for (const node of old.values()) {
      const chart = node.querySelector(".chart");
      this.watcher.unobserve(chart);
      this.visible.delete(chart);
      this.figures.delete(chart);
    }
    // Moving a chart that is in its place would take the keyboard and the eye away.
    const same = nodes.length === this.grid.children.length && nodes.every((node, i) => this.grid.children[i] === node);
    if (!same) this.grid.replaceChildren(...nodes);
  }

  channelNode(channel) {
    const chart = el("div", { class: "chart", role: "img" });
    chart.setAttribute("aria-label", `${channel.channel}: observed, expected and band over time`);
    this.watcher.observe(chart);
    const unit = channel.unit ? ` (${channel.unit})` : "";
    return el("figure", { class: "card", "data-key": channel.channel },
      el("figcaption", {}, el("span", { class: "name", title: channel.channel }, channel.channel + unit), el("span", { class: "mark" })),
      chart);
  }

  channelFigure(channel, xs) {
    const edge = { x: xs, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    return [[
      { ...edge, y: channel.lower },
      { ...edge, y: channel.upper, fill: "tonexty", fillcolor: colour("band") },
      { x: xs, y: channel.expected, name: "expected", mode: "lines", line: { color: colour("accent"), width: 1, dash: "dot" } },
      { x: xs, y: channel.observed, name: "observed", mode: "lines", line: { color: colour("text"), width: 1.2 } },
    ], layout()];
  }

  async draw(chart) {
    const make = this.figures.get(chart);
    if (!make || !this.data.service.charts) return;
    try {
      const plotly = await loadCharts();
      if (view !== this || !chart.isConnected) return;
      const [traces, shape] = make();
      plotly.react(chart, traces, shape, { displayModeBar: false, responsive: true });
    } catch (error) {
      this.note.textContent = `No charts: ${error.message}`;
    }
  }

  recolour() {
    for (const chart of this.visible) this.draw(chart);
  }

  close() {
    this.watcher.disconnect();
    for (const chart of this.figures.keys()) window.Plotly?.purge(chart);
  }
}

// -- polling --------------------------------------------------------------------------------

let view = null, timer = null, asked = 0, silentSince = null;
const totals = [];

function rate(name, service) { // Over the last ten seconds of looking.
  const first = totals[0];
  if (!first || service.now_ms <= first.now_ms || service[name] < first[name]) return "–";
  return count(Math.round(1000 * (service[name] - first[name]) / (service.now_ms - first.now_ms)));
}

function showService(service) {
  totals.push(service);
  if (service.readings < totals[0].readings) totals.length = 0; // It was started anew.
  while (totals.length > 6) totals.shift();
  const state = service.not_healthy ? `not healthy: ${service.not_healthy}`
    : service.not_ready ? `not ready: ${service.not_ready}` : "ready";
  document.getElementById("service").textContent = `${state}, ${clock(service.now_ms)} UTC`;
}

async function poll() {
  clearTimeout(timer);
  const turn = ++asked, asking = view;
  let data = null, missing = false;
  try {
    const answer = await fetch(asking.url(), { signal: AbortSignal.timeout(SLOW_MS), cache: "no-store" });
    missing = answer.status === 404;
    if (!answer.ok && !missing) throw new Error(`answered ${answer.status}`);
    data = await answer.json();
  } catch { data = null; }
  if (turn !== asked) return; // Somebody asked for something else meanwhile.
  const trouble = document.getElementById("trouble");
  if (data === null) {
    silentSince ??= Date.now();
    trouble.textContent = `No answer since ${clock(silentSince)} UTC; trying again. What is shown is from before.`;
  } else {
    silentSince = null;
    showService(data.service);
    if (missing) asking.missing(data); else asking.show(data);
  }
  trouble.hidden = data !== null;
  timer = setTimeout(poll, POLL_MS);
}

function route() {
  view?.close?.();
  const found = /^#\/entity\/(.+)$/.exec(location.hash);
  let name = null;
  try { name = found && decodeURIComponent(found[1]); } catch { name = null; }
  view = name === null ? new Overview() : new Entity(name);
  window.scrollTo(0, 0);
  poll();
}

// -- keyboard -------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  const writing = event.target instanceof HTMLInputElement;
  if (event.key === "Escape" && writing) { event.target.blur(); return; }
  if (event.key === "Escape" && view instanceof Entity) location.hash = "#/";
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !writing) { event.preventDefault(); view.search.focus(); return; }
  const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  if (!step || !(view instanceof Overview) || (writing && event.key.length === 1)) return;
  const rows = [...view.rows.querySelectorAll("a")];
  const next = rows[rows.indexOf(document.activeElement) + step];
  if (next) { event.preventDefault(); next.focus(); }
});

document.getElementById("theme").addEventListener("click", () => {
  const name = isDark() ? "light" : "dark";
  stored(name);
  setTheme(name);
});
dark.addEventListener("change", () => view?.recolour());
window.addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });

setTheme(stored());
route();
