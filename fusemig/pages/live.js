
"use strict";
// Draws what /events sends. Text from the daemon becomes text nodes only, never HTML.
const STATES = ["in-flight", "dirty", "missing", "sent", "allocated", "hole"];
const NAMES = { "in-flight": "in flight", dirty: "dirty", missing: "at the source", sent: "sent", allocated: "allocated", hole: "hole" };
const KEPT_MS = 5 * 60 * 1000;
const OVER = ["completed", "failed", "cancelled", "in-doubt"];
const $ = (id) => document.getElementById(id);
let last = null, points = [], records = [], seen = "", token = "", isLive = false, isFilled = false;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function size(bytes) {
  let unit = 0;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  while (Math.abs(bytes) >= 1024 && unit < 4) { bytes /= 1024; unit += 1; }
  return bytes.toFixed(unit ? 1 : 0) + " " + units[unit];
}

function duration(ms) {
  if (ms < 1000) return Math.round(ms) + " ms";
  if (ms < 120000) return (ms / 1000).toFixed(1) + " s";
  return Math.floor(ms / 60000) + " min " + Math.round(ms % 60000 / 1000) + " s";
}

const clock = (ms) => new Date(ms).toLocaleTimeString();
const total = (list) => list.reduce((sum, one) => sum + one, 0);
const plural = (n, what) => n.toLocaleString("en") + " " + what + (n === 1 ? "" : "s");

// The canvas of a fitting resolution, cleared; its width and height in CSS pixels.
function begin(canvas, height) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  return [pen, width, height];
}

function cellsOf(map) { return Math.ceil(map.chunks / map["chunks-per-cell"]); }

function drawMap(canvas, map) {
  const n = cellsOf(map), room = canvas.clientWidth;
  const side = Math.max(5, Math.min(18, Math.floor(Math.sqrt(room * 190 / Math.max(1, n)))));
  const columns = Math.max(1, Math.floor(room / side)), rows = Math.ceil(n / columns);
  const [pen] = begin(canvas, rows * side);
  const colors = STATES.map(color), hot = color("hot");
  for (let cell = 0; cell < n; cell += 1) {
    const x = (cell % columns) * side, y = Math.floor(cell / columns) * side, inner = side - 1;
    const chunks = Math.min(map["chunks-per-cell"], map.chunks - cell * map["chunks-per-cell"]);
    let bottom = y + inner;
    // Shares, from the bottom up, the most important first; what is there at all is seen.
    STATES.forEach((state, at) => {
      const count = map[state].length ? map[state][cell] : 0;
      if (!count || bottom <= y) return;
      const height = Math.min(bottom - y, Math.max(2, Math.round(inner * count / chunks)));
      pen.fillStyle = colors[at];
      pen.fillRect(x, bottom - height, inner, height);
      bottom -= height;
    });
    if (bottom > y) { // rounding
      const lowest = STATES.filter((state) => map[state].length && map[state][cell]).pop();
      pen.fillStyle = color(lowest || "hole");
      pen.fillRect(x, y, inner, bottom - y);
    }
    if (map.hot.length && map.hot[cell]) {
      pen.fillStyle = hot;
      pen.beginPath();
      pen.arc(x + inner / 2, y + inner / 2, Math.max(1.6, side / 5), 0, 7);
      pen.fill();
    }
  }
  canvas.dataset.columns = columns;
  canvas.dataset.side = side;
}

function tellCell(canvas, map, under, event) {
  const at = canvas.getBoundingClientRect(), side = Number(canvas.dataset.side);
  const cell = Math.floor((event.clientY - at.top) / side) * Number(canvas.dataset.columns) + Math.floor((event.clientX - at.left) / side);
  if (cell < 0 || cell >= cellsOf(map)) { under.textContent = ""; return; }
  const first = cell * map["chunks-per-cell"], end = Math.min(map.chunks, first + map["chunks-per-cell"]);
  const parts = STATES.filter((state) => map[state].length && map[state][cell]).map((state) => map[state][cell] + " " + NAMES[state]);
  if (map.hot.length && map.hot[cell]) parts.push(map.hot[cell] + " hot");
  under.textContent = "at " + size(first * 1048576) + ", " + plural(end - first, "chunk") + ": " + parts.join(", ");
}

function legend(map) {
  const list = make("ul", undefined, "legend");
  const add = (name, label, count, className) => {
    const item = make("li"), mark = make("i", undefined, className);
    mark.style.background = color(name);
    item.append(mark, label + " " + count.toLocaleString("en"));
    list.append(item);
  };
  for (const state of STATES) {
    if (state !== "missing" || map[state].length) add(state, NAMES[state], total(map[state]));
  }
  add("hot", "hot", total(map.hot), "dot");
  return list;
}

function showDisks(view) {
  const place = $("disks");
  if (place.childElementCount !== view.disks.length) {
    place.replaceChildren(...view.disks.map(() => {
      const disk = make("div", undefined, "disk"), canvas = make("canvas"), under = make("div", undefined, "under faint");
      canvas.setAttribute("role", "img");
      disk.append(make("div", undefined, "name"), canvas, under, make("ul"));
      return disk;
    }));
  }
  view.disks.forEach((disk, at) => {
    const state = view.status.disks[at], [name, canvas, under, list] = place.children[at].children;
    name.replaceChildren(make("strong", disk.name), make("span", state.size ? size(state.size) : "size unknown"));
    const notes = [state.state, state.gate === "open" ? "writable" : state.gate === "closed" ? "frozen" : "read-only"];
    if (state["parked-writes"]) notes.push(plural(state["parked-writes"], "parked write"));
    if (disk["waiting-writes"]) notes.push(plural(disk["waiting-writes"], "slowed write"));
    if (state["waiting-requests"]) notes.push(plural(state["waiting-requests"], "request") + " waiting for the source");
    if (map(disk)) notes.push(plural(disk.map["chunks-per-cell"], "chunk") + " of 1 MiB per cell");
    name.append(make("span", notes.join(" · "), "faint"));
    if (state["io-error"]) name.append(make("span", "I/O ERROR", "bad"));
    if (state["in-doubt"]) name.append(make("span", "IN DOUBT: " + state["in-doubt"], "bad"));
    canvas.hidden = !map(disk);
    if (!map(disk)) { list.replaceChildren(make("li", "still to come")); return; }
    drawMap(canvas, disk.map);
    const fresh = legend(disk.map);
    list.className = fresh.className;
    list.replaceChildren(...fresh.children);
    canvas.setAttribute("aria-label", "chunk map of " + disk.name + ": " + list.textContent);
    canvas.onmousemove = (event) => tellCell(canvas, disk.map, under, event);
    canvas.onmouseleave = () => { under.textContent = ""; };
  });
}

const map = (disk) => disk.map && disk.map.chunks ? disk.map : null;

function figure(name, value) {
  const box = make("div");
  box.append(make("dt", name), make("dd", value));
  return box;
}

function showMigration(view) {
  const info = view.status.migration, own = info && info["x-fusemig"], guest = lastRates();
  const figures = [];
  $("error").hidden = !(info && info["error-desc"]);
  $("error").textContent = (info && info["error-desc"]) || "";
  $("bar").hidden = !own;
  if (!own) {
    $("title").textContent = view.status.incoming ? "Waiting for disks at " + view.status.incoming.uri : "No migration";
  } else {
    const isSource = own.role === "source";
    $("title").textContent = (isSource ? "Sending: " : "Receiving: ") + own.phase + (own.waiting ? ", no connection (" + own.waiting + ")" : "");
    const share = info.disk.total ? 1 - Math.min(1, info.disk.remaining / info.disk.total) : 0;
    $("done").style.width = 100 * share + "%";
    $("bar").setAttribute("aria-valuenow", Math.round(100 * share));
    figures.push(figure("pending", size(info.disk.remaining)));
    figures.push(figure("on the wire", size(own["wire-bytes"])));
    if (isSource) {
      figures.push(figure("rate", size(own.bandwidth) + "/s"), figure("dirtied", size(own["dirty-rate"]) + "/s"));
      if (info["expected-downtime"] !== undefined) {
        figures.push(figure("downtime, of limit", duration(info["expected-downtime"]) + " of " + duration(view.parameters["downtime-limit"])));
      }
      if (own.eta !== undefined) figures.push(figure("time left", duration(own.eta)));
      if (own.converges === false) figures.push(figure("forecast", "does not converge"));
      if (info.downtime !== undefined) figures.push(figure("downtime", duration(own["frozen-ms"])));
      if (own.pacing.mirror !== "none") figures.push(figure("mirrored (" + own.pacing.mirror + ")", plural(own.pacing["mirrored-chunks"], "chunk")));
    }
    figures.push(figure("pass", String(own.pass)));
    if (info["total-time"] !== undefined) figures.push(figure("running for", duration(info["total-time"])));
  }
  if (guest) figures.push(figure("guests write", size(guest.written) + "/s"), figure("guests read", size(guest.read) + "/s"));
  figures.push(figure("parked writes", String(view.status["parked-writes"])));
  $("figures").replaceChildren(...figures);
  const phase = own && own.role === "source" ? own.phase : "none";
  $("cancel").disabled = !["setup", "bulk", "dirty", "pre-switchover", "frozen"].includes(phase) || !token;
  $("continue").disabled = phase !== "pre-switchover" || !token;
  $("start-postcopy").disabled = !["bulk", "dirty"].includes(phase) || own.wire !== "native" || !token;
  $("hint").textContent = "Looking needs nothing; a button needs the token, which lies in " + (view.status["web-token"] || "a file") + " on the host.";
}

function remember(view) {
  const before = last, info = view.status.migration, own = info && info["x-fusemig"];
  const point = { clock: view.clock, rate: null, dirty: null, written: null, read: null, pending: info && info.disk ? info.disk.remaining : 0 };
  const passed = before ? (view.clock - before.clock) / 1000 : 0;
  if (passed > 0 && before.status.pid === view.status.pid && before.disks.length === view.disks.length) {
    const rise = (key) => Math.max(0, total(view.disks.map((disk, at) => disk[key] - before.disks[at][key]))) / passed;
    point.written = rise("written-bytes");
    point.read = rise("read-bytes");
    const was = before.status.migration && before.status.migration["x-fusemig"];
    if (own && was && own.session === was.session) point.rate = Math.max(0, own["wire-bytes"] - was["wire-bytes"]) / passed;
  }
  if (own && own.role === "source" && !OVER.includes(own.phase)) point.dirty = own["dirty-rate"];
  if (before && before.status.pid !== view.status.pid) { points = []; isFilled = false; }
  points.push(point);
  points = points.filter((one) => view.clock - one.clock < KEPT_MS);
  last = view;
}

// What happened before this page was opened, as far as the daemon remembers it.
function fillIn() {
  const newest = records[records.length - 1];
  if (isFilled || !points.length) return;
  isFilled = true;
  if (!newest || newest.info["x-fusemig"].role !== "source") return;
  const offset = last.clock - last.at; // from the daemon's time of day to its clock
  const past = newest.samples.map((one) => ({
    clock: newest.began + one["at-ms"] + offset, rate: one.bandwidth, dirty: one["dirty-rate"], written: null, read: null, pending: one.remaining,
  }));
  points = past.filter((one) => one.clock < points[0].clock && last.clock - one.clock < KEPT_MS).concat(points);
}

const lastRates = () => points.length && points[points.length - 1].written !== null ? points[points.length - 1] : null;

function drawChart(canvas, keys, lines) {
  const [pen, width, height] = begin(canvas, 144);
  const end = points.length ? points[points.length - 1].clock : 0;
  const span = Math.max(30000, end - (points.length ? points[0].clock : 0));
  const top = Math.max(1024, ...points.flatMap((point) => lines.map((line) => point[line.key] || 0)));
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = color("faint");
  pen.strokeStyle = color("line");
  pen.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    const y = 14 + (height - 30) * (1 - share);
    pen.beginPath();
    pen.moveTo(0, y + 0.5);
    pen.lineTo(width, y + 0.5);
    pen.stroke();
    if (share) pen.fillText(size(top * share) + (lines[0].isRate ? "/s" : ""), 2, y - 3);
  }
  pen.fillText("-" + duration(span), 2, height - 3);
  pen.textAlign = "right";
  pen.fillText("now", width - 2, height - 3);
  for (const line of lines) {
    pen.strokeStyle = color(line.color);
    pen.setLineDash(line.isDashed ? [5, 4] : []);
    pen.lineWidth = 2;
    pen.beginPath();
    let isDown = false;
    for (const point of points) {
      if (point[line.key] === null) { isDown = false; continue; }
      const x = width * (1 - (end - point.clock) / span), y = 14 + (height - 30) * (1 - point[line.key] / top);
      if (isDown) pen.lineTo(x, y); else pen.moveTo(x, y);
      isDown = true;
    }
    pen.stroke();
  }
  keys.replaceChildren(...lines.map((line) => {
    const key = make("span"), mark = make("i", undefined, line.isDashed ? "dashed" : "");
    mark.style.borderTopColor = color(line.color);
    key.append(mark, line.name);
    return key;
  }));
}

function drawCharts() {
  drawChart($("rates"), $("rate-keys"), [
    { key: "rate", name: "on the wire", color: "sent", isRate: true },
    { key: "dirty", name: "dirtied", color: "dirty", isDashed: true },
    { key: "written", name: "guests write", color: "faint", isRate: true },
  ]);
  drawChart($("pending"), $("pending-keys"), [{ key: "pending", name: "still to be sent", color: "sent" }]);
}

function rows(table, head, lines) {
  const first = make("tr");
  first.append(...head.map((name) => make("th", name)));
  table.replaceChildren(first, ...lines.map((cells) => {
    const line = make("tr");
    for (const cell of cells) {
      const box = make("td");
      box.append(cell);
      line.append(box);
    }
    return line;
  }));
}

function showHistory() {
  const newest = records[records.length - 1];
  $("passes-card").hidden = !newest || !newest.passes.length;
  $("history-card").hidden = !records.length;
  if (newest) {
    const ends = newest.passes.slice(1).map((one) => one["at-ms"]);
    rows($("passes"), ["pass", "began after", "took", "pending then", "on the wire by then"], newest.passes.map((one, at) => [
      String(one.pass), duration(one["at-ms"]), at < ends.length ? duration(ends[at] - one["at-ms"]) : "", size(one.remaining), size(one["wire-bytes"]),
    ]).slice(-12).reverse());
  }
  rows($("history"), ["began", "what", "outcome", "took", "downtime", "passes", ""], records.map((one) => {
    const own = one.info["x-fusemig"], link = make("a", "report");
    link.href = "/report?began=" + one.began;
    return [
      clock(one.began), (own.role === "source" ? "to " : "from ") + one.peer, own.phase,
      one.info["total-time"] === undefined || !OVER.includes(own.phase) ? "" : duration(one.info["total-time"]),
      one.info.downtime === undefined ? "" : duration(own["frozen-ms"]), String(own.pass), link,
    ];
  }).reverse());
}

async function fetchHistory() {
  try {
    const answer = await fetch("/history", { cache: "no-store" });
    if (!answer.ok) return;
    records = await answer.json();
    showHistory();
    fillIn();
  } catch (_) { seen = ""; } // asked again with the next view
}

function show(view) {
  remember(view);
  const { status } = view;
  $("status").textContent = status.status;
  $("status").className = status.status === "running" ? "good" : status.status === "io-error" ? "bad" : "";
  $("where").textContent = "fusemig " + status.version + " · " + status.mountpoint + " · pid " + status.pid;
  document.title = status.status + " · fusemig " + status.mountpoint;
  showMigration(view);
  showDisks(view);
  drawCharts();
  $("events").replaceChildren(...view.events.slice(-12).reverse().map((one) => make("li", clock(one.at) + "  " + one.event + (one.text ? ": " + one.text : ""))));
  const own = status.migration && status.migration["x-fusemig"];
  const now = [status.pid, view.events.length && view.events[view.events.length - 1].number, own && own.pass + own.phase].join();
  if (now !== seen) { seen = now; fetchHistory(); }
}

function listen() {
  const source = new EventSource("/events");
  source.onmessage = (event) => {
    isLive = true;
    $("link").textContent = "live";
    $("link").className = "good";
    show(JSON.parse(event.data));
  };
  source.onerror = () => {
    $("link").textContent = isLive ? "the daemon is away; trying again" : "no answer yet; trying again";
    $("link").className = "bad";
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 1000); // refused for now, not only lost
  };
}

for (const action of ["cancel", "continue", "start-postcopy"]) {
  $(action).onclick = async () => {
    $("said").textContent = "…";
    try {
      const answer = await fetch("/" + action, { method: "POST", headers: { Authorization: "Bearer " + token } });
      $("said").textContent = answer.ok ? "done" : (await answer.text()).trim();
    } catch (_) { $("said").textContent = "the daemon is away"; }
  };
}
$("token").oninput = () => { token = $("token").value.trim(); if (last) showMigration(last); };
window.onresize = () => { if (last) { showDisks(last); drawCharts(); } };
matchMedia("(prefers-color-scheme: dark)").onchange = window.onresize;
listen();
