"use strict";
// Whatever a model wrote reaches the page as textContent, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const special = new Set(data.special);
const EAGER_TOKENS = 20000; // of a group; beyond, only its first response starts unfolded

// `of` gives the value of token t of a sample, null where it has none, which is left uncoloured; a `spread` below 1 is
// the share of tokens that the scale must hold. What stale samples differ by is the policy's movement since, not numerics.
const QUANTITIES = [
  { name: "influence weight", of: (s, t) => s.weights[t], neutral: 1, spread: 1 },
  { name: "advantage", of: (s) => s.advantage, neutral: 0, spread: 1 },
  { name: "mismatch", title: "trainer - engine log-prob", of: (s, t) => s.stale ? null : s.old[t] - s.rollout[t], neutral: 0, spread: 0.99 },
  { name: "log-ratio", title: "new - old log-prob", of: (s, t) => s.new[t] - s.old[t], neutral: 0, spread: 0.99 },
  { name: "surprise", title: "-log-prob by the trainer, in nats", of: (s, t) => -s.old[t], neutral: 0, spread: 0.99 },
];
const FILTERS = [
  { name: "all", holds: () => true },
  { name: "right", holds: (s) => s.accuracy === 1 },
  { name: "wrong", holds: (s) => s.accuracy !== 1 },
  { name: "truncated", holds: (s) => s.truncated },
];
const state = { step: data.steps.length - 1, group: 0, quantity: 0, filter: 0, cursor: null };
const $ = (id) => document.getElementById(id);

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function format(value) {
  if (value === 0) return "0";
  return Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// Control characters, line separators and marks that change the direction of text, as escapes.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

// ------------------------------------------------------------------ colours

// The scale of a quantity over a whole step, so that its groups can be compared: [lowest, neutral, highest].
function scaleOf(step, quantity) {
  if (!step.scales) step.scales = new Map();
  if (!step.scales.has(quantity)) {
    const offsets = [];
    for (const group of step.groups)
      for (const sample of group.samples)
        for (let t = 0; t < sample.ids.length; t++) {
          const value = quantity.of(sample, t);
          if (value !== null) offsets.push(value - quantity.neutral);
        }
    const sizes = offsets.map(Math.abs).sort((a, b) => a - b);
    const limit = sizes[Math.ceil(quantity.spread * sizes.length) - 1] || 0;
    step.scales.set(quantity, { limit, less: offsets.some((x) => x < 0), more: offsets.some((x) => x > 0) });
  }
  return step.scales.get(quantity);
}

function color(offset, limit) {
  const strength = limit > 0 ? Math.min(1, Math.abs(offset) / limit) : 0;
  const depth = `calc(${strength.toFixed(3)} * var(--depth))`;
  return strength < 0.01 ? "" : `rgb(var(${offset > 0 ? "--more" : "--less"}) / ${depth})`;
}

function paint(spans) {
  const quantity = QUANTITIES[state.quantity];
  const { limit } = scaleOf(data.steps[state.step], quantity);
  for (const span of spans) {
    const value = quantity.of(span.sample, span.place);
    span.style.backgroundColor = value === null ? "" : color(value - quantity.neutral, limit);
  }
}

function drawLegend() {
  const quantity = QUANTITIES[state.quantity];
  const { limit, less, more } = scaleOf(data.steps[state.step], quantity);
  const offsets = [...(less ? [-limit] : []), 0, ...(more ? [limit] : [])];
  const stops = offsets.map((x) => color(x, limit) || "transparent");
  $("scale").style.backgroundImage = stops.length > 1 ? `linear-gradient(to right, ${stops.join(", ")})` : "none";
  const beyond = quantity.spread < 1 && limit > 0;
  $("ticks").replaceChildren(...offsets.map((x) => {
    const sign = beyond && x !== 0 ? (x < 0 ? "\u2264 " : "\u2265 ") : "";
    return make("span", "", sign + format(quantity.neutral + x));
  }));
}

// ------------------------------------------------------------------ parts of the page

function drawChoice(id, options, chosen, choose) {
  $(id).replaceChildren(...options.map((option, i) => {
    const button = make("button", "", option.name);
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(i === chosen));
    if (option.title) button.title = option.title;
    button.addEventListener("click", () => choose(i));
    return button;
  }));
}

function shownGroups() {
  const { holds } = FILTERS[state.filter];
  return data.steps[state.step].groups.map((group, i) => i).filter((i) => data.steps[state.step].groups[i].samples.some(holds));
}

// Where the prompts of a step begin to differ, at the start of a word: before lies the instruction that all share.
function distinctStart(prompts) {
  const [first, ...others] = prompts;
  let length = others.length ? first.length : 0;
  for (const prompt of others) while (!prompt.startsWith(first.slice(0, length))) length--;
  return first.slice(0, length).search(/\S*$/);
}

function drawGroups() {
  const groups = data.steps[state.step].groups;
  const start = distinctStart(groups.map((group) => group.prompt));
  $("groups").replaceChildren(...shownGroups().map((i) => {
    const group = groups[i];
    const right = group.samples.filter((s) => s.accuracy === 1).length;
    const button = make("button");
    button.setAttribute("aria-current", String(i === state.group));
    button.append(make("span", "prompt", visible(group.prompt.slice(start, start + 200))));
    const outcome = make("span", "outcome");
    const marks = make("span", "marks");
    for (const s of group.samples) marks.append(make("span", s.accuracy === 1 ? "good" : "bad", s.accuracy === 1 ? "●" : "○"));
    outcome.append(marks, make("span", "", `${right} of ${group.samples.length}`));
    button.append(outcome);
    button.addEventListener("click", () => show({ group: i }));
    return button;
  }));
  document.querySelector("nav [aria-current=true]")?.scrollIntoView({ block: "nearest" });
}

// A line of `name value` pairs; a third entry is the value's class.
function facts(pairs) {
  const line = make("div", "facts");
  for (const [name, value, className] of pairs) {
    const fact = make("span", "", name + " ");
    fact.append(make("b", className || "", value));
    line.append(fact);
  }
  return line;
}

function drawGroup() {
  const group = data.steps[state.step].groups[state.group];
  const shown = group ? group.samples.filter(FILTERS[state.filter].holds) : [];
  if (!shown.length) {
    $("group").replaceChildren(make("p", "nothing", "No response of this step passes the filter."));
    return;
  }
  const right = group.samples.filter((s) => s.accuracy === 1).length;
  const problem = make("section", "problem");
  problem.append(
    facts([["group", group.uid], ["accuracy", `${right} of ${group.samples.length}`], ["ground truth", visible(group.truth)],
      ["rewards", group.samples.map((s) => format(s.reward)).join("  ")]]),
    make("pre", "", visible(group.prompt)),
  );
  const numTokens = shown.reduce((sum, s) => sum + s.ids.length, 0);
  const unfolded = shown.map((s, i) => i === 0 || numTokens <= EAGER_TOKENS);
  $("group").replaceChildren(problem, ...shown.map((s, i) => response(s, group.samples.indexOf(s) + 1, unfolded[i])));
  $("group").scrollTop = 0;
}

function response(sample, number, unfolded) {
  const card = make("details", sample.accuracy === 1 ? "right" : "");
  const head = make("summary");
  const verdict = sample.accuracy === 1 ? ["", "✓ right", "good"] : ["", "✗ wrong", "bad"];
  head.append(facts([[`#${number}`, ""], verdict, ["answer", visible(sample.prediction)], ["reward", format(sample.reward)],
    ["advantage", format(sample.advantage)], ["tokens", String(sample.ids.length)],
    ...(sample.stale ? [["stale", `sampled ${sample.stale} step${sample.stale > 1 ? "s" : ""} before`]] : []),
    ...(sample.truncated ? [["", "cut off at the limit", "bad"]] : [])]));
  const body = make("div", "tokens");
  card.append(head, body);
  const unfold = () => {
    for (let t = 0; t < sample.ids.length; t++) body.append(token(sample, sample.ids[t], t));
    paint(body.children);
  };
  card.open = unfolded;
  if (unfolded) unfold();
  else card.addEventListener("toggle", unfold, { once: true });
  return card;
}

function token(sample, id, place) {
  const bytes = data.bytes[id];
  const span = make("span", bytes ? "bytes" : special.has(id) ? "special" : "");
  span.textContent = bytes || visible(data.tokens[id]).replaceAll("\n", "↵\n");
  span.sample = sample;
  span.place = place;
  return span;
}

// ------------------------------------------------------------------ the numbers of a token

function showTip(span) {
  const { sample, place } = span;
  const id = sample.ids[place];
  const text = id in data.bytes ? `bytes ${data.bytes[id]}` : visible(JSON.stringify(data.tokens[id]));
  $("tip").replaceChildren(
    make("div", "text", text),
    make("div", "place", `token ${place + 1} of ${sample.ids.length}, id ${id}`),
  );
  QUANTITIES.forEach((quantity, i) => {
    const value = quantity.of(sample, place);
    if (value !== null) row(quantity.name, value, i === state.quantity);
  });
  if (sample.stale) row("staleness", sample.old[place] - sample.rollout[place]);
  row("engine log-prob", sample.rollout[place]);
  row("old log-prob", sample.old[place]);
  row("new log-prob", sample.new[place]);
  row("new / old probability", Math.exp(sample.new[place] - sample.old[place]));
  $("tip").hidden = false;
  const box = span.getBoundingClientRect(), tip = $("tip").getBoundingClientRect();
  const below = box.bottom + 6 + tip.height < innerHeight;
  $("tip").style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.width - 8))}px`;
  $("tip").style.top = `${Math.max(4, below ? box.bottom + 6 : box.top - tip.height - 6)}px`;
}

function row(name, value, chosen) {
  $("tip").append(make("span", chosen ? "chosen" : "", name), make("span", chosen ? "value chosen" : "value", exact(value)));
}

function exact(value) {
  return Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(4) : String(Number(value.toFixed(6)));
}

function moveCursor(distance) {
  const spans = [...document.querySelectorAll("details[open] > .tokens > span")];
  const here = spans.indexOf(state.cursor);
  const next = spans[here < 0 ? 0 : Math.max(0, Math.min(spans.length - 1, here + distance))];
  if (next) setCursor(next);
}

function setCursor(span) {
  state.cursor?.classList.remove("cursor");
  state.cursor = span;
  span.classList.add("cursor");
  span.scrollIntoView({ block: "nearest" });
  showTip(span);
}

// ------------------------------------------------------------------ what the reader does

function show(change) {
  Object.assign(state, change, { cursor: null });
  const step = data.steps[state.step];
  const shown = shownGroups();
  if (!shown.includes(state.group)) state.group = shown.find((i) => i > state.group) ?? shown[0] ?? 0;
  $("tip").hidden = true;
  $("step").value = String(state.step);
  $("summary").textContent = step.summary;
  drawChoice("filter", FILTERS, state.filter, (i) => show({ filter: i }));
  drawChoice("quantity", QUANTITIES, state.quantity, recolor);
  drawLegend();
  drawGroups();
  drawGroup();
}

function recolor(quantity) {
  state.quantity = quantity;
  drawChoice("quantity", QUANTITIES, quantity, recolor);
  drawLegend();
  paint(document.querySelectorAll(".tokens > span"));
  if (state.cursor) showTip(state.cursor);
}

function moveGroup(distance) {
  const shown = shownGroups();
  const next = shown[shown.indexOf(state.group) + distance];
  if (next !== undefined) show({ group: next });
}

function moveStep(distance) {
  const next = state.step + distance;
  if (next >= 0 && next < data.steps.length) show({ step: next });
}

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
}

const KEYS = {
  j: () => moveGroup(1), ArrowDown: () => moveGroup(1), k: () => moveGroup(-1), ArrowUp: () => moveGroup(-1),
  "]": () => moveStep(1), "[": () => moveStep(-1),
  f: () => show({ filter: (state.filter + 1) % FILTERS.length }),
  ArrowRight: () => moveCursor(1), ArrowLeft: () => moveCursor(-1),
  Escape: () => { $("tip").hidden = true; },
  t: switchTheme,
};
QUANTITIES.forEach((quantity, i) => { KEYS[i + 1] = () => recolor(i); });

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (Object.hasOwn(KEYS, event.key)) {
    KEYS[event.key]();
    event.preventDefault();
  }
});
$("group").addEventListener("mouseover", ({ target }) => {
  if (target.sample) showTip(target);
  else $("tip").hidden = true;
});
$("group").addEventListener("mouseleave", () => { $("tip").hidden = true; });
$("group").addEventListener("click", ({ target }) => { if (target.sample) setCursor(target); });
$("step").addEventListener("change", ({ target }) => show({ step: Number(target.value) }));
$("theme").addEventListener("click", switchTheme);

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
$("run").textContent = data.run;
$("algorithm").textContent = data.algorithm;
$("step").append(...data.steps.map((step, i) => {
  const option = make("option", "", String(step.step));
  option.value = String(i);
  return option;
}));
$("step-control").hidden = data.steps.length < 2;
show({});
