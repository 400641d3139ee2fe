"use strict";
// Everything is readable without this script; it adds the evidence behind cells, filters, the step cursor and copying.
document.documentElement.classList.add("scripted");
const dialog = document.getElementById("evidence");
const known = new Map();
const read = (id) => {
  if (!known.has(id)) known.set(id, JSON.parse(document.getElementById(id).textContent));
  return known.get(id);
};
const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return element;
};

function describeFacts(facts) {
  const list = make("dl");
  for (const [label, value] of facts) {
    const detail = make("dd");
    detail.append(value.includes("\n") ? make("pre", value) : value);
    list.append(make("dt", label), detail);
  }
  return list;
}

function openEvidence(button) {
  const evidence = read(button.closest("[data-evidence]").dataset.evidence);
  const row = evidence.rows[button.dataset.row];
  const body = dialog.querySelector(".body");
  dialog.querySelector("h2").textContent = row.label;
  body.replaceChildren(make("p"));
  body.firstChild.append(make("code", row.spelling));
  let asked = null;
  for (const number of row.sections) {
    const [name, title, word, tone, expected, facts] = evidence.sections[number];
    const part = make("div", "", name === button.dataset.verdict ? "asked" : "");
    const heading = make("h3", title);
    if (word) heading.append(make("span", word, `verdict ${tone}`));
    if (expected) heading.append(make("span", `expected: ${expected}`, "soft"));
    part.append(heading, facts.length ? describeFacts(facts) : make("p", "No further evidence was recorded.", "soft"));
    body.append(part);
    if (part.className) asked = part;
  }
  dialog.showModal();
  dialog.scrollTop = 0;
  if (asked && asked.offsetTop + asked.offsetHeight > dialog.clientHeight) asked.scrollIntoView({ block: "center" });
}

if (dialog) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-row]");
    if (button) openEvidence(button);
  });
}

// One cell of a grid can be reached with Tab; the arrows, Home and End go from there.
function moveInGrid(grid, event) {
  const cell = event.target.closest("td");
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -99], End: [0, 99] };
  if (!cell || !moves[event.key]) return;
  event.preventDefault();
  const rows = [...grid.tBodies[0].rows].filter((row) => !row.hidden);
  const [down, right] = moves[event.key];
  const at = rows.indexOf(cell.parentElement);
  const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
  const cells = [...rows[clamp(at + down, rows.length)].querySelectorAll("td")];
  const column = [...cell.parentElement.querySelectorAll("td")].indexOf(cell);
  const next = cells[clamp(column + right, cells.length)].querySelector("button");
  if (!next) return;
  grid.querySelectorAll('button[tabindex="0"]').forEach((button) => (button.tabIndex = -1));
  next.tabIndex = 0;
  next.focus();
}
for (const grid of document.querySelectorAll('[role="grid"]')) {
  grid.addEventListener("keydown", (event) => moveInGrid(grid, event));
  grid.addEventListener("focusin", (event) => {
    if (event.target.tabIndex === 0 || !event.target.matches("button")) return;
    grid.querySelectorAll('button[tabindex="0"]').forEach((button) => (button.tabIndex = -1));
    event.target.tabIndex = 0;
  });
}

for (const field of document.querySelectorAll("input[data-filters]")) {
  const table = document.getElementById(field.dataset.filters);
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    document.getElementById(`${field.id}-count`).textContent = `${shown} of ${rows.length} cells`;
    const first = table.querySelector("tbody tr:not([hidden]) button");
    table.querySelectorAll('button[tabindex="0"]').forEach((button) => (button.tabIndex = -1));
    if (first) first.tabIndex = 0;
  });
}

// An entry of a mixing matrix says under its picture what it means; the arrows go from entry to entry.
for (const figure of document.querySelectorAll("figure[data-mixing]")) {
  const rows = [...figure.querySelectorAll('g[role="row"]')].map((row) => [...row.querySelectorAll('[role="gridcell"]')]);
  const grid = rows.filter((row) => row.length);
  const says = figure.querySelector(".says");
  const say = (event) => {
    const cell = event.target.closest('[role="gridcell"]');
    if (cell) says.textContent = cell.getAttribute("aria-label");
    return cell;
  };
  figure.addEventListener("pointerover", say);
  figure.addEventListener("focusin", (event) => {
    const cell = say(event);
    if (!cell) return;
    grid.flat().forEach((other) => other.setAttribute("tabindex", other === cell ? 0 : -1));
  });
  figure.addEventListener("keydown", (event) => {
    const down = grid.findIndex((row) => row.includes(event.target));
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -99], End: [0, 99] }[event.key];
    if (down < 0 || !step) return;
    event.preventDefault();
    const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
    const row = grid[clamp(down + step[0], grid.length)];
    row[clamp(grid[down].indexOf(event.target) + step[1], row.length)].focus();
  });
}

// A slider and the pointer move one cursor; the values at that step stand in the key.
for (const figure of document.querySelectorAll("figure[data-plot]")) {
  const plot = JSON.parse(figure.querySelector("script").textContent);
  const slider = figure.querySelector("input");
  const cursor = figure.querySelector(".cursor");
  const area = figure.querySelector(".area");
  const outputs = figure.querySelectorAll(".keys output");
  const [first, last] = plot.steps;
  const show = (step) => {
    slider.value = step;
    figure.querySelector(".stepper output").textContent = step;
    cursor.style.display = "block";
    cursor.style.left = `${last > first ? (100 * (step - first)) / (last - first) : 0}%`;
    plot.lines.forEach((points, number) => {
      const before = points.filter((point) => point[0] <= step).pop();
      outputs[number].textContent = before ? before[2] : "–";
    });
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    show(Math.round(first + share * (last - first)));
  });
}

for (const button of document.querySelectorAll("button[data-copies]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(source.textContent.trim());
    } catch {
      const range = document.createRange(); // a page from file:// may not be let at the clipboard
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
