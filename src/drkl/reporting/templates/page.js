"use strict";
// What the page says stands in it without this script; it only sorts, hides and picks. Text goes in as text, never as HTML.
document.documentElement.classList.add("js");

for (const table of document.querySelectorAll("table[data-sortable]")) makeSortable(table);
for (const section of document.querySelectorAll("[data-toggles]")) makeToggles(section);
const store = document.getElementById("samples-data");
if (store) makePicker(document.querySelector(".picker"), JSON.parse(store.textContent));

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeSortable(table) {
  const bar = table.closest("[data-table]").querySelector(".sorting");
  const back = bar.querySelector("[data-back]");
  const said = bar.querySelector("[role=status]");
  const heads = [...table.tHead.rows[0].cells];
  const groups = [...table.tBodies].map((body) => ({ body, rows: [...body.rows] }));
  const rows = groups.flatMap((group) => group.rows).filter((row) => !row.classList.contains("group"));
  const flat = element("tbody");
  flat.setAttribute("role", "rowgroup");
  const grouped = groups.length > 1 || groups[0].rows.length > rows.length;
  if (!grouped) back.textContent = "Back to the first order";
  bar.hidden = false;

  heads.forEach((head, column) => {
    const button = element("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(column));
  });
  back.addEventListener("click", () => {
    for (const { body, rows: own } of groups) {
      body.append(...own);
      table.append(body);
    }
    flat.remove();
    for (const head of heads) head.removeAttribute("aria-sort");
    back.disabled = true;
    said.textContent = grouped ? "In groups again." : "In the first order again.";
    heads[0].firstElementChild.focus();
  });

  function sort(column) {
    const head = heads[column];
    const first = column === 0 ? "ascending" : "descending";
    const other = column === 0 ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === first ? other : first;
    const sign = way === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const sorted = [...rows].sort((a, b) => {
      if (column === 0) return sign * value(a).localeCompare(value(b), "en");
      // What is missing comes last, whichever way.
      if (!value(a) || !value(b)) return (value(a) ? 0 : 1) - (value(b) ? 0 : 1);
      return sign * (Number(value(a)) - Number(value(b)));
    });
    for (const { body } of groups) body.remove();
    flat.append(...sorted);
    table.append(flat);
    for (const one of heads) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way);
    back.disabled = false;
    said.textContent = `Sorted by ${head.textContent.trim().replace(/\s+/g, " ")}, ${way}.`;
  }
}

function makeToggles(section) {
  for (const box of section.querySelectorAll("[data-toggle]")) {
    box.hidden = false;
    box.addEventListener("change", () => {
      for (const part of section.querySelectorAll("[data-series]")) {
        if (part.dataset.series === box.dataset.toggle) part.classList.toggle("off", !box.checked);
      }
    });
  }
}

function makePicker(picker, data) {
  const find = (name) => picker.querySelector(`[data-pick=${name}]`);
  const [prompts, temperatures, previous, next] = ["prompt", "temperature", "previous", "next"].map(find);
  const place = picker.querySelector("article");
  const said = picker.querySelector("[role=status]");
  data.prompts.forEach((prompt, index) => prompts.add(new Option(prompt.label, index)));
  data.temperatures.forEach((temperature, index) => temperatures.add(new Option(temperature, index)));
  temperatures.value = data.main;
  const step = (by) => {
    prompts.selectedIndex = Math.min(Math.max(prompts.selectedIndex + by, 0), data.prompts.length - 1);
    show();
  };
  previous.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  prompts.addEventListener("change", show);
  temperatures.addEventListener("change", show);
  picker.hidden = false;
  show();

  function show() {
    const prompt = data.prompts[prompts.selectedIndex];
    const at = Math.max(temperatures.selectedIndex, 0);
    previous.disabled = prompts.selectedIndex === 0;
    next.disabled = prompts.selectedIndex === data.prompts.length - 1;
    const heading = element("h3", "text", prompt.prompt[0]);
    heading.dir = "auto";
    const parts = [heading, ...cut(prompt.prompt[1])];
    for (const reference of prompt.references) {
      const box = element("div", "reference");
      box.append(element("p", "who", "Reference"), ...text(reference));
      parts.push(box);
    }
    const answers = element("div", "answers");
    data.columns.forEach(([title, subtitle, variable], column) => {
      const box = element("div", "answer-of");
      box.style.borderColor = `var(--${variable})`;
      const who = element("p", "who");
      who.append(element("bdi", "", title));
      if (subtitle) who.append(" ", element("span", "", subtitle));
      box.append(who);
      const samples = prompt.answers[column][at];
      for (const sample of samples) {
        box.append(...text(sample));
        if (sample[2]) box.append(element("p", "length", sample[2]));
      }
      if (!samples.length) box.append(element("p", "length", "No answer of it is in this page here."));
      answers.append(box);
    });
    place.replaceChildren(...parts, answers);
    const warm = data.temperatures.length > 1 ? `, sampling temperature ${data.temperatures[at]}` : "";
    said.textContent = `Prompt ${prompts.selectedIndex + 1} of ${data.prompts.length}${warm}`;
  }

  function text([content, hidden]) {
    const box = content.trim() ? element("div", "text", content) : element("div", "text empty", "(empty answer)");
    box.dir = "auto";
    return [box, ...cut(hidden)];
  }

  function cut(hidden) {
    if (!hidden) return [];
    return [element("p", "note", `${hidden.toLocaleString("en")} more characters are not shown; they are in samples.jsonl.`)];
  }
}
