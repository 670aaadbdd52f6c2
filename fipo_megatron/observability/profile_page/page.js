"use strict";
// Times are microseconds since the first step's beginning; a span is [name, start, duration, lane].

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const LANE = 13, GAP = 7, LABEL = 190, AXIS = 22;
const total = data.steps[data.steps.length - 1][2];
const view = { start: 0, end: total };

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// Neighbours in the sorted names are far apart on the circle of hues.
const color = (name) => `hsl(${(name * 137.5 + 210) % 360} 62% ${50 + (name % 3) * 7}%)`;

// The canvas is as high as what is seen of the rows, and draws that part of them.
const canvas = $("timeline"), context = canvas.getContext("2d"), scroll = $("scroll");
let top_ = AXIS;
for (const row of data.rows) {
  row.lanes = 1 + row.spans.reduce((most, span) => Math.max(most, span[3]), 0);
  row.top = top_;
  top_ += row.lanes * LANE + GAP;
}
const height = top_;

const scale = () => (canvas.clientWidth - LABEL) / (view.end - view.start);
const toX = (time) => LABEL + (time - view.start) * scale();
const toTime = (x) => view.start + (x - LABEL) / scale();

function format(microseconds) {
  if (microseconds >= 1e6) return (microseconds / 1e6).toFixed(3) + " s";
  if (microseconds >= 1e3) return (microseconds / 1e3).toFixed(2) + " ms";
  return microseconds.toFixed(0) + " \u00b5s";
}

function draw() {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  const shown = scroll.clientHeight, first = scroll.scrollTop + AXIS, last = scroll.scrollTop + shown;
  canvas.style.height = `${shown}px`;
  canvas.height = shown * ratio;
  canvas.width = width * ratio;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const style = getComputedStyle(document.documentElement);
  const [text, dim, line, card] = ["--text", "--dim", "--line", "--card"].map((name) => style.getPropertyValue(name));
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.textBaseline = "middle";
  drawSteps(dim, line, shown);
  context.beginPath();
  context.rect(0, AXIS, width, shown - AXIS);
  context.clip();
  context.translate(0, -scroll.scrollTop);
  for (const row of data.rows) {
    const bottom = row.top + row.lanes * LANE + GAP;
    if (bottom < first || row.top > last) continue;
    drawSpans(row);
    context.fillStyle = card;
    context.fillRect(0, row.top - GAP / 2, LABEL, bottom - row.top);
    context.fillStyle = text;
    context.fillText(row.name, 8, row.top + LANE / 2, LABEL - 12);
  }
}

function drawSteps(dim, line, shown) {
  for (const [step, start, end] of data.steps) {
    const x = toX(start);
    if (toX(end) < LABEL || x > canvas.clientWidth) continue;
    context.fillStyle = line;
    context.fillRect(Math.max(x, LABEL), 0, 1, shown);
    context.fillStyle = dim;
    if (toX(end) - Math.max(x, LABEL) > 44) context.fillText(`step ${step}`, Math.max(x, LABEL) + 4, AXIS / 2);
  }
}

function drawSpans(row) {
  const drawnTo = new Array(row.lanes).fill(-1); // spans below a pixel that lie on one are drawn once
  for (const [name, start, duration, lane] of row.spans) {
    const left = Math.max(toX(start), LABEL), right = Math.min(toX(start + duration), canvas.clientWidth);
    if (right < LABEL || left > canvas.clientWidth || right <= drawnTo[lane]) continue;
    const width = Math.max(right - left, 0.6), y = row.top + lane * LANE;
    drawnTo[lane] = left + width;
    context.fillStyle = color(name);
    context.fillRect(left, y, width, LANE - 1);
    if (width > 34) {
      context.save();
      context.beginPath();
      context.rect(left, y, width - 3, LANE);
      context.clip();
      context.fillStyle = "#fff";
      context.fillText(data.names[name], left + 3, y + LANE / 2);
      context.restore();
    }
  }
}

function move(start, end) {
  const length = Math.min(Math.max(end - start, 20), total);
  view.start = Math.min(Math.max(start, 0), total - length);
  view.end = view.start + length;
  draw();
}

function zoom(factor, center) {
  move(center - (center - view.start) * factor, center + (view.end - center) * factor);
}

function find(x, fromTop) {
  const time = toTime(x), slack = 1.5 / scale(), y = fromTop + scroll.scrollTop;
  const row = data.rows.find((each) => y >= each.top && y < each.top + each.lanes * LANE);
  if (!row || x < LABEL || fromTop < AXIS) return null;
  const lane = Math.floor((y - row.top) / LANE);
  const span = row.spans.find((s) => s[3] === lane && s[1] - slack <= time && time <= s[1] + s[2] + slack);
  return span ? { row, span } : null;
}

function showTip(event) {
  const box = canvas.getBoundingClientRect(), found = find(event.clientX - box.left, event.clientY - box.top);
  const tip = $("tip");
  tip.hidden = !found;
  if (!found) return;
  const [name, start, duration] = found.span;
  tip.textContent = `${data.names[name]}: ${format(duration)}\n${found.row.name}\nat ${format(start)}`;
  tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 16}px`;
}

let dragged = null;
canvas.addEventListener("mousedown", (event) => { dragged = { x: event.clientX, ...view }; });
window.addEventListener("mouseup", () => { dragged = null; });
canvas.addEventListener("mousemove", (event) => {
  if (dragged) {
    const by = (dragged.x - event.clientX) / scale();
    move(dragged.start + by, dragged.end + by);
  }
  showTip(event);
});
canvas.addEventListener("mouseleave", () => { $("tip").hidden = true; });
canvas.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return; // scrolls
  event.preventDefault();
  zoom(Math.exp(event.deltaY / 400), toTime(event.clientX - canvas.getBoundingClientRect().left));
}, { passive: false });
document.addEventListener("keydown", (event) => {
  const middle = (view.start + view.end) / 2, by = (view.end - view.start) / 5;
  const keys = {
    "+": () => zoom(0.6, middle), "-": () => zoom(1 / 0.6, middle), 0: () => move(0, total),
    ArrowLeft: () => move(view.start - by, view.end - by), ArrowRight: () => move(view.start + by, view.end + by),
  };
  if (keys[event.key] && !event.ctrlKey && !event.metaKey) keys[event.key]();
});

function addSteps() {
  const all = make("button", "all");
  all.addEventListener("click", () => move(0, total));
  $("steps").append(all);
  for (const [step, start, end] of data.steps) {
    const isReported = step >= data.reported[0];
    const button = make("button", `step ${step}, ${format(end - start)}`, isReported ? "reported" : "");
    button.title = isReported ? "in the tables" : "not in the tables: warms up";
    button.addEventListener("click", () => move(start, end));
    $("steps").append(button);
  }
}

function addLegend() {
  const totals = new Map();
  for (const row of data.rows) {
    for (const [name, , duration] of row.spans) totals.set(name, (totals.get(name) || 0) + duration);
  }
  for (const [name] of [...totals].sort((a, b) => b[1] - a[1])) {
    const entry = make("span"), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of [["width", "100%"], ["height", "100%"], ["rx", 3], ["fill", color(name)]]) {
      square.setAttribute(key, value);
    }
    svg.append(square);
    entry.append(svg, data.names[name]);
    $("legend").append(entry);
  }
}

function addTable({ title, header, rows }) {
  const figure = make("figure", undefined, header.length > 5 ? "wide" : ""), table = make("table"), head = make("tr");
  head.append(...header.map((cell) => make("th", cell)));
  table.createTHead().append(head);
  const body = table.createTBody();
  for (const row of rows) {
    const line = make("tr");
    line.append(...row.map((cell) => make("td", cell)));
    body.append(line);
  }
  figure.append(make("figcaption", title), table);
  $("tables").append(figure);
}

$("title").textContent = data.title;
$("rows").style.height = `${height}px`;
addSteps();
addLegend();
data.tables.forEach(addTable);
const reported = data.steps.filter(([step]) => step >= data.reported[0]);
move(reported[0][1], reported[reported.length - 1][2]);
scroll.addEventListener("scroll", draw);
window.addEventListener("resize", draw);
