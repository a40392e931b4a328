"use strict";
document.documentElement.classList.add("scripted");
const $ = (id) => document.getElementById(id);

// The table: sort by a heading, filter by text and budget, mark the best of the rows shown; each part separately.
if ($("table") !== null) {
  const table = $("table"), heads = [...table.tHead.rows[0].cells];
  const parts = [...table.tBodies].map((body) => ({ body, rows: [...body.rows].filter((row) => row.className !== "part") }));
  const all = parts.flatMap((part) => part.rows);

  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
    const text = cell.textContent.trim();
    return heads[column].classList.contains("num") || text === "" || text === "-" ? null : text;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  const shown = (rows) => rows.filter((row) => !row.classList.contains("hidden"));

  function sortBy(column) {
    const head = heads[column], before = head.getAttribute("aria-sort");
    const orders = Number(head.dataset.direction) > 0 ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = [...orders, null][orders.indexOf(before) + 1];
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    if (order !== null) head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    for (const { body, rows } of parts) {
      const known = rows.filter((row) => value(row, column) !== null);
      const rest = rows.filter((row) => value(row, column) === null);
      known.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      // Rows without a value stay last in both orders.
      body.append(...(order === null ? rows : [...known, ...rest]));
    }
  }

  function filter() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const equal = $("equal") !== null && $("equal").checked;
    for (const row of all) {
      // Only names and counts are searched, not measurements: "40" is a budget, not 0.40 ms.
      const named = [...row.cells].filter((_, column) => /^(text|count)$/.test(heads[column]?.dataset.kind));
      const text = named.map((cell) => cell.textContent).join(" ").toLowerCase();
      const keep = words.every((word) => text.includes(word)) && !(equal && row.dataset.equal === "0");
      row.classList.toggle("hidden", !keep);
    }
    $("count").textContent = `${shown(all).length} of ${all.length} rows`;
    heads.forEach((head, column) => {
      const sign = Number(head.dataset.direction);
      // Rows over a part of the samples are in a second part and never marked as best.
      for (const { rows } of sign ? parts.slice(0, 1) : []) {
        const values = shown(rows).map((row) => value(row, column)).filter((v) => v !== null);
        const top = Math.max(...values.map((v) => sign * v));
        for (const row of rows) {
          const v = value(row, column);
          row.cells[column].classList.toggle("best", values.length > 1 && v !== null && sign * v === top);
        }
      }
    });
  }

  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sortBy(column)));
  $("filter").addEventListener("input", filter);
  $("details").addEventListener("change", () => table.classList.toggle("brief", !$("details").checked));
  $("equal")?.addEventListener("change", filter);
  filter();
}

// Commands: copied to the clipboard, or selected where a page from disk may not write there.
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "copied";
    } catch {
      const code = [...document.querySelectorAll(".commands code")].find((c) => c.textContent === button.dataset.copy);
      getSelection().selectAllChildren(code);
      code.scrollIntoView({ block: "center" });
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}

// The predictions browser: two systems side by side.
if ($("data") !== null) {
  const data = JSON.parse($("data").textContent), right = data.right, step = 50;
  const tests = {
    all: () => true,
    wrong: (a, b) => !b,
    fixed: (a, b) => !a && b,
    broken: (a, b) => a && !b,
    "both right": (a, b) => a && b,
    "both wrong": (a, b) => !a && !b,
  };
  let verdict = "all", limit = step;

  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  for (const [id, chosen] of [["first", data.first], ["second", data.second]]) {
    data.systems.forEach((system, i) => {
      const option = make("option", system.label);
      option.value = i;
      option.selected = i === chosen;
      $(id).append(option);
    });
    $(id).addEventListener("change", () => { limit = step; show(); });
  }
  for (const name of Object.keys(tests)) {
    const chip = make("button", name, "chip");
    chip.type = "button";
    chip.dataset.verdict = name;
    chip.addEventListener("click", () => { verdict = name; limit = step; show(); });
    $("verdicts").append(chip, " ");
  }
  $("search").addEventListener("input", () => { limit = step; show(); });
  $("more").addEventListener("click", () => { limit += step; show(); });

  const answer = ([text, score]) => {
    const cell = make("td", undefined, "wrap");
    cell.append(make("span", text.trim() === "" ? "(empty)" : text, `answer ${score >= right ? "right" : "wrong"}`));
    if (score > 0 && score < 1) cell.append(` ${score.toFixed(2)}`);
    return cell;
  };

  function show() {
    const [a, b] = [data.systems[$("first").value], data.systems[$("second").value]];
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const counts = Object.fromEntries(Object.keys(tests).map((name) => [name, 0]));
    const rows = [];
    data.samples.forEach((sample, i) => {
      const [before, after] = [a.predictions[i], b.predictions[i]];
      if (before[1] === null || after[1] === null) return;
      const text = [sample.question, ...sample.answers, before[0], after[0], sample.kind].join(" ").toLowerCase();
      if (!words.every((word) => text.includes(word))) return;
      for (const [name, test] of Object.entries(tests)) {
        if (!test(before[1] >= right, after[1] >= right)) continue;
        counts[name] += 1;
        if (name === verdict) rows.push([sample, before, after]);
      }
    });
    for (const chip of document.querySelectorAll(".chip")) {
      chip.textContent = `${chip.dataset.verdict} ${counts[chip.dataset.verdict]}`;
      chip.setAttribute("aria-pressed", String(chip.dataset.verdict === verdict));
    }
    const head = make("tr");
    head.append(...["question", "expected", a.label, b.label, "kind", "sample"].map((title) => make("th", title)));
    $("browser").tHead.replaceChildren(head);
    $("browser").tBodies[0].replaceChildren(...rows.slice(0, limit).map(([sample, before, after]) => {
      const row = make("tr"), id = make("td");
      if (sample.card === null) id.append(make("code", sample.id));
      else { const link = make("a", sample.id); link.href = `#card-${sample.card}`; id.append(link); }
      row.append(make("td", sample.question, "wrap"), make("td", sample.answers.join(" | "), "wrap"),
        answer(before), answer(after), make("td", sample.kind, "soft"), id);
      return row;
    }));
    $("more").classList.toggle("hidden", rows.length <= limit);
    $("more").textContent = `show more (${rows.length - limit} left)`;
  }
  show();
}
